#include "scan/linear_scan_threads.h"

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "common/isa.h"
#include "common/pages.h"
#include "common/sequences.h"

namespace kexue {
namespace {

// Outputs from this size on are written past the caches, where they would not stay, and to huge
// pages where the memory is new: its first touch costs more than the scan.
constexpr int64_t kLargeBytes = 8 << 20;
constexpr int64_t kLineBytes = 64;

int64_t item_bytes(DType dtype) {
  return dtype == DType::c64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

Sequences sequences_of(const LinearScanShape& shape) {
  return {shape.sequences, shape.L, shape.cu_seqlens};
}

// Steps [from, to) of a sequence, counted in the order of the walk, for some channels.
struct Piece {
  int64_t sequence, from, to;
  int64_t channel, channels;
  bool last;  // the sequence's end
};

template <class S>
struct Ends {
  const S* enter;
  S* leave;
};

// Runs walk(piece, ends) over all pieces, where ends.enter is known, each on one of the threads.
// `enter` and `leave` are states [sequences, D] or null.
template <class S>
class Scan {
 public:
  Scan(const Sequences& sequences, const Shares& shares, int64_t D, const void* enter, void* leave)
      : sequences_(sequences),
        shares_(shares),
        D_(D),
        states_{static_cast<const S*>(enter), static_cast<S*>(leave)} {
    if (!shares.independent) {
      for (auto* each : {&carried_, &products_, &locals_}) each->resize(shares.chunks() * D);
    }
  }

  // summarise(piece, product, local) finds what a piece does to the state that enters it
  template <class Walk, class Summarise>
  void run(const Walk& walk, const Summarise& summarise) {
    pass_empty();
    const int64_t chunks = shares_.chunks(), ranges = shares_.ranges();
    if (shares_.independent) {
      return run_jobs(chunks * ranges,
                      [&](int64_t i) { walk_chunk(walk, i / ranges, i % ranges); });
    }
    run_jobs((chunks - 1) * ranges, [&](int64_t i) {
      const int64_t chunk = i / ranges, range = i % ranges;
      if (chunk == 0) return walk_chunk(walk, chunk, range);
      const Piece piece = tail(chunk, range);
      const int64_t at = chunk * D_ + piece.channel;
      if (!piece.last) summarise(piece, &products_[at], &locals_[at]);
    });
    for (int64_t chunk = 1; chunk + 1 < chunks; ++chunk) carry(chunk);
    run_jobs((chunks - 1) * ranges,
             [&](int64_t i) { walk_chunk(walk, 1 + i / ranges, i % ranges); });
  }

 private:
  void pass_empty() const {
    if (!sequences_.bounds || !states_.leave) return;
    for (int64_t n = 0; n < sequences_.count; ++n) {
      if (sequences_.size(n) > 0) continue;
      S* to = states_.leave + n * D_;
      for (int64_t d = 0; d < D_; ++d) to[d] = states_.enter ? states_.enter[n * D_ + d] : S{};
    }
  }

  template <class Walk>
  void walk_chunk(const Walk& walk, int64_t chunk, int64_t range) {
    int64_t step = shares_.cuts[chunk];
    while (step < shares_.cuts[chunk + 1]) {
      const Piece piece = piece_at(step, chunk, range);
      walk(piece, ends(piece, chunk));
      step += piece.to - piece.from;
    }
  }

  Piece piece_at(int64_t step, int64_t chunk, int64_t range) const {
    const int64_t n = sequences_.at(step), begin = sequences_.begin(n), size = sequences_.size(n);
    const int64_t to = std::min(size, shares_.cuts[chunk + 1] - begin);
    const int64_t channel = shares_.channels[range];
    return {n, step - begin, to, channel, shares_.channels[range + 1] - channel, to == size};
  }

  // The last piece of a chunk.
  Piece tail(int64_t chunk, int64_t range) const {
    const int64_t n = sequences_.at(shares_.cuts[chunk + 1] - 1);
    return piece_at(std::max(shares_.cuts[chunk], sequences_.begin(n)), chunk, range);
  }

  Ends<S> ends(const Piece& piece, int64_t chunk) {
    const int64_t at = piece.sequence * D_ + piece.channel;
    Ends<S> ends{nullptr, nullptr};
    if (piece.from > 0) {
      ends.enter = &carried_[chunk * D_ + piece.channel];
    } else if (states_.enter) {
      ends.enter = states_.enter + at;
    }
    if (!piece.last) {  // what leaves a later chunk is known from its summary
      if (chunk == 0) ends.leave = &carried_[D_ + piece.channel];
    } else if (states_.leave) {
      ends.leave = states_.leave + at;
    }
    return ends;
  }

  void carry(int64_t chunk) {
    for (int64_t range = 0; range < shares_.ranges(); ++range) {
      const Piece piece = tail(chunk, range);
      if (piece.last) continue;
      const S* enter = ends(piece, chunk).enter;
      const int64_t at = chunk * D_ + piece.channel;
      for (int64_t d = 0; d < piece.channels; ++d) {
        const Affine<S> run{products_[at + d], locals_[at + d]};
        carried_[at + D_ + d] = apply(run, enter ? enter[d] : S{});
      }
    }
  }

  const Sequences& sequences_;
  const Shares& shares_;
  int64_t D_;
  Ends<S> states_;
  std::vector<S> carried_, products_, locals_;  // [chunks, D]; carried: what enters the chunk
};

// Where walks find their rows.
struct Layout {
  const LinearScanShape& shape;
  bool from_end;  // walks begin at the sequences' ends

  Rows rows(const Strided& x, int64_t bytes, const Piece& piece, int64_t from) const {
    const int64_t n = piece.sequence;
    const int64_t begin = shape.cu_seqlens ? shape.cu_seqlens[n] : 0;
    const int64_t end = shape.cu_seqlens ? shape.cu_seqlens[n + 1] : shape.L;
    const int64_t batch = shape.cu_seqlens ? 0 : n;
    const int64_t step = from_end ? end - 1 - from : begin + from;
    const int64_t at = batch * x.batch + step * x.step + piece.channel * x.channel;
    return {static_cast<char*>(x.data) + at * bytes, from_end ? -x.step : x.step,
            shape.D == 1 ? 1 : x.channel};
  }

  Strided contiguous(void* data) const { return {data, shape.L * shape.D, shape.D, 1}; }
};

// Whether to write past the caches.
bool prepare_outputs(const LinearScanShape& shape, int64_t bytes,
                     std::initializer_list<void*> outputs) {
  const int64_t size = shape.B * shape.L * shape.D * bytes;
  if (size < kLargeBytes) return false;
  bool aligned = shape.D * bytes % kLineBytes == 0;
  for (void* data : outputs) {
    if (data) prefer_huge_pages(data, size);
    aligned = aligned && reinterpret_cast<uintptr_t>(data) % kLineBytes == 0;
  }
  return aligned;
}

template <class S>
void forward(const LinearScanForward& call, DType dtype, int threads) {
  const LinearScanShape& shape = call.shape;
  const int64_t bytes = item_bytes(dtype);
  const Layout layout{shape, shape.reverse};
  const Sequences sequences = sequences_of(shape);
  const Shares shares = share(sequences, shape.D, bytes, kTileSteps, 2.0 / 3, threads);
  const bool stream = prepare_outputs(shape, bytes, {call.h});
  const auto walk = KEXUE_FOR_THIS_CPU(linear_scan_forward);
  const auto summary = KEXUE_FOR_THIS_CPU(linear_scan_summary);

  Scan<S>(sequences, shares, shape.D, call.initial, call.final)
      .run(
          [&](const Piece& piece, Ends<S> ends) {
            const auto rows = [&](const Strided& x) {
              return layout.rows(x, bytes, piece, piece.from);
            };
            walk(dtype, {piece.to - piece.from, piece.channels, rows(call.a), rows(call.b),
                         rows(layout.contiguous(call.h)), ends.enter, ends.leave, stream});
          },
          [&](const Piece& piece, S* product, S* local) {
            summary(dtype, {piece.to - piece.from, piece.channels,
                            layout.rows(call.a, bytes, piece, piece.from),
                            layout.rows(call.b, bytes, piece, piece.from), false, product, local});
          });
}

// grad_a's rows for a piece; of sums, a sequence has one per tile that it could touch.
Rows grad_a_rows(const LinearScanBackward& call, const Layout& layout, GradA kind,
                 int64_t data_bytes, int64_t sum_bytes, const Piece& piece) {
  const LinearScanShape& shape = call.shape;
  if (kind != GradA::sums) {
    const int64_t bytes = kind == GradA::data ? data_bytes : sum_bytes;
    return layout.rows(layout.contiguous(call.grad_a), bytes, piece, piece.from);
  }
  const int64_t begin = shape.cu_seqlens ? shape.cu_seqlens[piece.sequence] / kTileSteps
                                         : piece.sequence * (shape.L / kTileSteps);
  const int64_t row = begin + piece.sequence + piece.from / kTileSteps;
  const int64_t at = row * shape.D + piece.channel;
  return {static_cast<char*>(call.grad_a) + at * sum_bytes, shape.D, 1};
}

template <class S>
void backward(const LinearScanBackward& call, DType dtype, GradA kind, int threads) {
  const LinearScanShape& shape = call.shape;
  const int64_t bytes = item_bytes(dtype), sum_bytes = sizeof(S);
  const Layout layout{shape, !shape.reverse};
  const Sequences sequences = sequences_of(shape);
  const double summary_cost = kind == GradA::none ? 2.0 / 3 : 2.0 / 5;
  const Shares shares = share(sequences, shape.D, bytes, kTileSteps, summary_cost, threads);
  void* full_grad_a = kind == GradA::sums ? nullptr : call.grad_a;
  const bool stream = prepare_outputs(shape, bytes, {call.grad_b, full_grad_a});
  const auto walk = KEXUE_FOR_THIS_CPU(linear_scan_backward);
  const auto summary = KEXUE_FOR_THIS_CPU(linear_scan_summary);

  Scan<S>(sequences, shares, shape.D, call.grad_final, call.grad_initial)
      .run(
          [&](const Piece& piece, Ends<S> ends) {
            const auto rows = [&](const Strided& x, int64_t from) {
              return layout.rows(x, bytes, piece, from);
            };
            const S* initial = static_cast<const S*>(call.initial);
            if (initial) initial += piece.sequence * shape.D + piece.channel;
            BackwardWalk one{};
            one.steps = piece.to - piece.from;
            one.channels = piece.channels;
            one.a = rows(call.a, piece.from);
            one.grad_h = rows(call.grad_h, piece.from);
            one.first = piece.last;
            one.initial = initial;
            one.enter = ends.enter;
            one.leave = ends.leave;
            one.grad_b = rows(layout.contiguous(call.grad_b), piece.from);
            one.kind = kind;
            if (kind != GradA::none) {
              one.h = rows(call.h, piece.from + 1);
              one.grad_a = grad_a_rows(call, layout, kind, bytes, sum_bytes, piece);
            }
            one.stream = stream;
            walk(dtype, one);
          },
          [&](const Piece& piece, S* product, S* local) {
            summary(dtype, {piece.to - piece.from, piece.channels,
                            layout.rows(call.a, bytes, piece, piece.from),
                            layout.rows(call.grad_h, bytes, piece, piece.from), true, product,
                            local});
          });
}

}  // namespace

void linear_scan_on_threads(const LinearScanForward& call, DType dtype, int threads) {
  const auto run = dtype == DType::c64 ? forward<Complex> : forward<float>;
  run(call, dtype, threads);
}

void linear_scan_on_threads(const LinearScanBackward& call, DType dtype, GradA kind, int threads) {
  const auto run = dtype == DType::c64 ? backward<Complex> : backward<float>;
  run(call, dtype, kind, threads);
}

}  // namespace kexue
