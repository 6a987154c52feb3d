#include "scan/selective_scan_threads.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "common/isa.h"
#include "common/pages.h"
#include "common/sequences.h"
#include "scan/linear_scan.h"
#include "scan/selective_scan_cpu.h"

namespace kexue {
namespace {

constexpr int64_t kLargeBytes = 8 << 20;  // new memory from this size on comes in huge pages

float product(float A, double dt) { return float(std::exp(A * dt)); }
Complex product(Complex A, double dt) {
  const double size = std::exp(A.re * dt);
  return {float(size * std::cos(A.im * dt)), float(size * std::sin(A.im * dt))};
}

// Cuts amid a sequence are moved back to checkpoints; the first walk of a tile starts from one.
Shares shares_of(const SelectiveShape& shape, const Sequences& sequences, double summary_cost,
                 int threads) {
  constexpr int64_t kWork = 4;  // of a state: an exponential is worth several multiply-adds
  Shares shares = share(sequences, shape.d, sizeof(float), shape.chunk, summary_cost, threads,
                        kWork * shape.n);
  std::vector<int64_t> cuts{0};
  shares.independent = true;
  for (int64_t cut : shares.cuts) {
    const bool inside = cut < sequences.steps() && cut != sequences.begin(sequences.at(cut));
    if (inside && shape.cu_seqlens) cut = cut / shape.chunk * shape.chunk;
    if (cut <= cuts.back()) continue;
    cuts.push_back(cut);
    if (cut < sequences.steps() && cut != sequences.begin(sequences.at(cut))) {
      shares.independent = false;
    }
  }
  shares.cuts = cuts;
  return shares;
}

// The walks of one direction, with what flows between their chunks: [sequences, d, n] enters at
// one end of each sequence and leaves at the other.
template <class S>
class Relay {
 public:
  Relay(const SelectiveInputs& in, const void* enter, void* leave, bool back, double summary_cost,
        int threads)
      : in_(in),
        shape_(in.shape),
        sequences_{shape_.sequences, shape_.L, shape_.cu_seqlens},
        shares_(shares_of(shape_, sequences_, summary_cost, threads)),
        enter_(static_cast<const S*>(enter)),
        leave_(static_cast<S*>(leave)),
        back_(back) {
    if (!shares_.independent) {
      carried_.resize(shares_.chunks() * states());
      locals_.resize(shares_.chunks() * states());
      dt_sums_.resize(shares_.chunks() * shape_.d);
    }
    for (int64_t i = 0; i < shares_.chunks(); ++i) pieces_.push_back(pieces_of(i));
  }

  const Shares& shares() const { return shares_; }

  // walk(chunk, range, walk) for all; chunks are counted from where the walks begin
  template <class Walk>
  void run(const Walk& walk) {
    pass_empty();
    const int64_t chunks = shares_.chunks(), ranges = shares_.ranges();
    const auto full = [&](int64_t chunk, int64_t range) {
      const std::vector<SelectivePiece>& pieces = pieces_[chunk];
      walk(chunk, range, walk_over(range, pieces.data(), int64_t(pieces.size())));
    };
    if (shares_.independent) {
      return run_jobs(chunks * ranges, [&](int64_t i) { full(i / ranges, i % ranges); });
    }
    run_jobs((chunks - 1) * ranges, [&](int64_t i) {
      const int64_t chunk = i / ranges, range = i % ranges;
      if (chunk == 0) return full(chunk, range);
      SelectivePiece piece = pieces_[chunk].back();
      if (ends(piece)) return;
      piece.enter.data = nullptr;
      piece.leave = {&locals_[chunk * states()], 1, shape_.d};
      SelectiveWalk summary = walk_over(range, &piece, 1);
      summary.outputs = false;
      summary.dt_sums = &dt_sums_[chunk * shape_.d];
      walk(chunk, range, summary);
    });
    for (int64_t chunk = 1; chunk + 1 < chunks; ++chunk) carry(chunk);
    run_jobs((chunks - 1) * ranges, [&](int64_t i) { full(1 + i / ranges, i % ranges); });
  }

 private:
  int64_t states() const { return shape_.d * shape_.n; }

  SelectiveWalk walk_over(int64_t range, const SelectivePiece* pieces, int64_t count) const {
    const int64_t channel = shares_.channels[range];
    return {channel, shares_.channels[range + 1] - channel, pieces, count, true, nullptr};
  }

  int64_t row_begin(int64_t sequence) const {
    return shape_.cu_seqlens ? 0 : sequence * shape_.L;
  }
  bool begins(const SelectivePiece& piece) const {
    const int64_t begin = sequences_.begin(piece.sequence) - row_begin(piece.sequence);
    return back_ ? piece.end == begin + sequences_.size(piece.sequence) : piece.begin == begin;
  }
  bool ends(const SelectivePiece& piece) const {
    const int64_t begin = sequences_.begin(piece.sequence) - row_begin(piece.sequence);
    return back_ ? piece.begin == begin : piece.end == begin + sequences_.size(piece.sequence);
  }

  std::vector<SelectivePiece> pieces_of(int64_t chunk) {
    const int64_t cut = back_ ? shares_.chunks() - 1 - chunk : chunk;
    std::vector<SelectivePiece> pieces;
    for (int64_t step = shares_.cuts[cut]; step < shares_.cuts[cut + 1];) {
      const int64_t n = sequences_.at(step);
      const int64_t end = std::min(sequences_.begin(n + 1), shares_.cuts[cut + 1]);
      const int64_t row = shape_.cu_seqlens ? 0 : n, first = row_begin(n);
      pieces.push_back({row, n, step - first, end - first, {}, {}});
      step = end;
    }
    if (back_) std::reverse(pieces.begin(), pieces.end());
    for (SelectivePiece& piece : pieces) {
      const int64_t at = piece.sequence * states();
      if (!begins(piece)) {
        piece.enter = {&carried_[chunk * states()], 1, shape_.d};
      } else if (enter_) {
        piece.enter = {const_cast<S*>(enter_) + at, shape_.n, 1};
      }
      if (ends(piece)) {
        if (leave_) piece.leave = {leave_ + at, shape_.n, 1};
      } else if (chunk == 0) {  // what leaves a later chunk is known from its summary
        piece.leave = {&carried_[states()], 1, shape_.d};
      }
    }
    return pieces;
  }

  void carry(int64_t chunk) {
    const SelectivePiece& piece = pieces_[chunk].back();
    if (ends(piece)) return;
    const S *A = static_cast<const S*>(in_.A), *local = &locals_[chunk * states()];
    const S* enter = static_cast<const S*>(piece.enter.data);
    const double* dt_sums = &dt_sums_[chunk * shape_.d];
    S* to = &carried_[(chunk + 1) * states()];
    for (int64_t k = 0; k < shape_.n; ++k) {
      for (int64_t c = 0; c < shape_.d; ++c) {
        const S a = product(A[c * shape_.n + k], dt_sums[c]);
        const Affine<S> all{back_ ? conj(a) : a, local[k * shape_.d + c]};
        const S state = enter ? enter[c * piece.enter.channel + k * piece.enter.state] : S{};
        to[k * shape_.d + c] = apply(all, state);
      }
    }
  }

  void pass_empty() const {
    if (!shape_.cu_seqlens || !leave_) return;
    for (int64_t n = 0; n < sequences_.count; ++n) {
      if (sequences_.size(n) > 0) continue;
      const int64_t at = n * states();
      for (int64_t i = at; i < at + states(); ++i) leave_[i] = enter_ ? enter_[i] : S{};
    }
  }

  const SelectiveInputs& in_;
  const SelectiveShape& shape_;
  Sequences sequences_;
  Shares shares_;
  const S* enter_;
  S* leave_;
  bool back_;
  std::vector<std::vector<SelectivePiece>> pieces_;
  std::vector<S> carried_, locals_;  // [chunks, n, d]; carried: what enters the chunk
  std::vector<double> dt_sums_;      // [chunks, d]
};

int64_t item_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

void prepare_outputs(const SelectiveInputs& in, std::initializer_list<void*> outputs) {
  const int64_t bytes = in.shape.batch * in.shape.L * in.shape.d * item_bytes(in.dtype);
  for (void* each : outputs) {
    if (each && bytes >= kLargeBytes) prefer_huge_pages(each, bytes);
  }
}

template <class S>
void forward(const SelectiveForward& call, int threads) {
  const auto kernel = KEXUE_FOR_THIS_CPU(selective_scan_forward);
  prepare_outputs(call.in, {call.out});
  Relay<S>(call.in, call.in.initial, call.final, false, 0.95, threads)
      .run([&](int64_t, int64_t, const SelectiveWalk& walk) { kernel(call, walk); });
}

// Sums that walks have shares in: one row each, added up in their order.
template <class S>
class Rows {
 public:
  Rows(int64_t count, int64_t size, void* out, bool direct)
      : count_(out ? count : 0), size_(size), out_(out), direct_(direct) {
    if (!direct_) rows_.resize(count_ * size);
  }

  S* row(int64_t i) {
    return direct_ || !out_ ? static_cast<S*>(out_) : rows_.data() + i * size_;
  }

  void finish(DType dtype, int threads) const {
    if (direct_ || !out_) return;
    const auto add = KEXUE_FOR_THIS_CPU(add_up);
    const int64_t size = size_ * int64_t(sizeof(S) / sizeof(float));
    const int64_t jobs = std::clamp<int64_t>(count_ * size >> 16, 1, threads);
    run_jobs(jobs, [&](int64_t i) {
      add(dtype, reinterpret_cast<const float*>(rows_.data()), count_, size, size * i / jobs,
          size * (i + 1) / jobs, out_);
    });
  }

 private:
  int64_t count_, size_;
  void* out_;
  bool direct_;
  std::vector<S> rows_;
};

template <class S>
void backward(const SelectiveBackward& call, int threads) {
  const SelectiveInputs& in = call.in;
  const SelectiveShape& shape = in.shape;
  const auto kernel = KEXUE_FOR_THIS_CPU(selective_scan_backward);
  prepare_outputs(in, {call.u, call.delta, call.z});
  Relay<S> relay(in, call.grad_final, call.initial, true, 0.4, threads);

  const int64_t chunks = relay.shares().chunks(), ranges = relay.shares().ranges();
  const int64_t by_channel = shape.d * shape.n;
  const DType B_dtype = sizeof(S) == sizeof(float) ? in.dtype : DType::f32;
  const auto sums = [&](int64_t size, void* out) {
    return Rows<S>(chunks, size, out, chunks == 1);
  };
  const auto projection = [&](const Projection& x, void* out) {
    if (!x.per_step) return sums(by_channel, out);
    const int64_t by_step = shape.batch * shape.L * x.groups * shape.n;
    return Rows<S>(ranges, by_step, out, ranges == 1 && B_dtype == DType::f32);
  };
  Rows<S> A = sums(by_channel, call.A), B = projection(in.B, call.B), C = projection(in.C, call.C);
  Rows<float> D(chunks, shape.d, call.D, chunks == 1);
  Rows<float> bias(chunks, shape.d, call.delta_bias, chunks == 1);

  relay.run([&](int64_t chunk, int64_t range, const SelectiveWalk& walk) {
    kernel(call, walk,
           {A.row(chunk), B.row(in.B.per_step ? range : chunk),
            C.row(in.C.per_step ? range : chunk), D.row(chunk), bias.row(chunk)});
  });
  A.finish(DType::f32, threads);
  B.finish(in.B.per_step ? B_dtype : DType::f32, threads);
  C.finish(in.C.per_step ? B_dtype : DType::f32, threads);
  D.finish(DType::f32, threads);
  bias.finish(DType::f32, threads);
}

}  // namespace

void selective_scan_on_threads(const SelectiveForward& call, int threads) {
  call.in.complex ? forward<Complex>(call, threads) : forward<float>(call, threads);
}

void selective_scan_on_threads(const SelectiveBackward& call, int threads) {
  call.in.complex ? backward<Complex>(call, threads) : backward<float>(call, threads);
}

}  // namespace kexue
