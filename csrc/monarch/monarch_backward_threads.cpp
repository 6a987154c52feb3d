// Backward: rounds of a few chunks of rows. In each, threads first make what is between the
// factors (z) and its gradient (dz), then dx and each block's share of dw1 and dw2.
#include "monarch/monarch_threads.h"

#include "monarch/chunks.h"

namespace kexue::monarch {
namespace {

constexpr int64_t kRoundWork = 1 << 21;  // products for a round to be worth its barriers
constexpr int64_t kSumsBytes = 512 << 10;  // from where on sums leave a cache between rounds
constexpr int64_t kRoundBytes = 12 << 20;  // of lines, for these sums to come and go seldom
constexpr int64_t kRun = 16;             // floats that are read side by side
constexpr int64_t kCacheLine = 64;       // bytes
constexpr int64_t kOuts = 48;            // floats of a block's output that are made at once

// A part of a block at one of a round's chunks.
struct Step {
  int64_t part, c;
};

// Parts in runs of neighbours, for threads to share.
struct Runs {
  const Parts& parts;
  const int64_t chunks, length;

  Runs(const Parts& parts, int64_t chunks, int64_t jobs)
      : parts(parts), chunks(chunks), length(std::max<int64_t>(1, parts.count() / (16 * jobs))) {}

  int64_t count() const { return ceil_div(parts.count(), length); }

  // body(step, the next one or null) for run i
  template <class Body>
  void each(int64_t i, const Body& body) const {
    const int64_t from = i * length, to = std::min(from + length, parts.count());
    for (Step at{from, 0}; at.part < to;) {
      const Step next = at.c + 1 < chunks ? Step{at.part, at.c + 1} : Step{at.part + 1, 0};
      body(at, next.part < to ? &next : nullptr);
      at = next;
    }
  }
};

class Backward {
 public:
  Backward(const MonarchMatmul& call, const Rows& grad, void* dx, void* dw1, void* dw2,
           int threads)
      : call_(call),
        grad_(grad),
        dx_{dx, call.first.blocks * call.first.in, 1},
        dw1_(dw1),
        dw2_(dw2),
        u_(chunks_.unit),
        weights_(weights_of(call.first, u_) + weights_of(call.second, u_)),
        far_(weights_ * int64_t(sizeof(float)) > kSumsBytes),
        jobs_(jobs_for(call.N, 3 * weights_, threads)),
        group_(std::min(call.second.blocks, kRun / u_)),
        w1_(chunks_.kernels, call.dtype, call.first, call.w1, false),
        w1_t_(chunks_.kernels, call.dtype, call.first, call.w1, true),
        w2_t_(chunks_.kernels, call.dtype, call.second, call.w2, true),
        z_lines_(transposed_lines(call.second.in, call.second.blocks, of_z_)),
        dz_lines_(transposed_lines(call.second.blocks, call.second.in, of_dz_)),
        sums1_(chunks_.kernels, call.dtype, call.first, call.N),
        sums2_(chunks_.kernels, call.dtype, call.second, call.N),
        row_(std::max(dw1 ? sums1_.row() : 0, dw2 ? sums2_.row() : 0)),
        owns_(jobs_) {
    const auto [l, s, r] = call.second;
    if (group_ == l) {
      grad_lines_ = transposed_lines(s, l, of_g_);
    } else {
      for (int64_t t = 0; t < group_ * u_; ++t) {
        grad_lines_.push_back(of_g_.at(t / u_ * s) + t % u_);
      }
    }
  }

  void run() {
    prepare_output(dx_.data, dx_.data ? call_.N * dx_.row * item_bytes(call_.dtype) : 0);
    const int64_t chunks = ceil_div(call_.N, kRows), round = std::min(chunks, chunks_of_a_round());
    Workspace space;
    ask(space, round);
    space.make();
    for (const Own& own : owns_) std::fill_n(own.rows, kRows * row_, 0.0f);
    for (const FloatWeights* w : {&w1_, &w1_t_, &w2_t_}) w->unpack_all(jobs_);
    for (int64_t first = 0; first < chunks; first += round) {
      run_round(first, std::min(round, chunks - first));
    }
    if (dw1_) sums1_.finish(dw1_, jobs_);
    if (dw2_) sums2_.finish(dw2_, jobs_);
  }

 private:
  void ask(Workspace& space, int64_t round) {
    if (dw2_) w1_.ask_for_all(space);
    if (dx_.data) w1_t_.ask_for_all(space);
    if (dx_.data || dw1_) w2_t_.ask_for_all(space);
    const int64_t panels = round * chunks_.panels;
    if (dw2_) space.ask(&z_, panels * z_panel());
    if (dx_.data || dw1_) space.ask(&dz_, panels * dz_panel());
    space.ask(&g_, panels * g_panel());
    if (dw1_) sums1_.ask(space);
    if (dw2_) sums2_.ask(space);
    for (Own& own : owns_) {
      chunks_.ask(space, own, call_.first.in, std::min(call_.first.in, kOuts), row_);
    }
  }

  int64_t chunks_of_a_round() const {
    const int64_t blocks = call_.first.blocks + ceil_div(call_.second.blocks, group_);
    const int64_t bytes = chunks_.panels * (z_panel() + dz_panel() + g_panel()) * sizeof(float);
    return std::max({ceil_div(jobs_ * kRoundWork, kRows * weights_), ceil_div(4 * jobs_, blocks),
                     far_ ? kRoundBytes / bytes : 1});
  }

  // Threads take a few neighbouring blocks, all of the round's rows of one before the next: its
  // weights stay in a cache, to which what comes next is fetched in time.
  void run_round(int64_t first, int64_t chunks) {
    const int64_t groups = ceil_div(call_.second.blocks, group_);
    const Parts outs1(call_.first.blocks, call_.first.out, kOuts / u_, jobs_);
    const Parts outs2(call_.second.blocks, call_.second.out, kOuts / u_, jobs_);
    const Runs runs1(outs1, chunks, jobs_), runs2(outs2, chunks, jobs_);
    const int64_t dzs = chunks * groups, dw2s = dw2_ ? runs2.count() : 0;
    share_work(jobs_, dzs + (dw2_ ? runs1.count() : 0), [&](int64_t job, int64_t i) {
      if (i < dzs) return make_dz(first, i % chunks, i / chunks);
      runs1.each(i - dzs, [&](const Step& at, const Step* next) {
        make_z(first, outs1, at, next, owns_[job]);
      });
    });
    share_work(jobs_, dw2s + runs1.count(), [&](int64_t job, int64_t i) {
      const Own& own = owns_[job];
      if (i < dw2s) {
        return runs2.each(i, [&](const Step& at, const Step* next) {
          make_dw2(first, outs2, at, next, own);
        });
      }
      runs1.each(i - dw2s, [&](const Step& at, const Step* next) {
        if (dw1_) make_dw1(first, outs1, at, next, own);
        if (dx_.data) make_dx(first, outs1, at, own);
      });
    });
  }

  Span rows_of(int64_t chunk) const { return span_of(call_.N, kRows, chunk); }
  int64_t z_panel() const { return call_.second.blocks * z_block(); }
  int64_t dz_panel() const { return call_.first.blocks * dz_block(); }
  int64_t g_panel() const { return call_.second.blocks * g_block(); }
  int64_t z_block() const { return of_z_.block() * chunks_.lanes; }
  int64_t dz_block() const { return of_dz_.block() * chunks_.lanes; }
  int64_t g_block() const { return of_g_.block() * chunks_.lanes; }
  float* z_of(int64_t c) const { return z_ + c * chunks_.panels * z_panel(); }
  float* dz_of(int64_t c) const { return dz_ + c * chunks_.panels * dz_panel(); }
  float* g_of(int64_t c) const { return g_ + c * chunks_.panels * g_panel(); }

  // A block's items of x at a step that comes.
  Ahead x_ahead(int64_t first, const Parts& parts, const Step* next) const {
    if (!far_ || !next || call_.x.column != 1) return {};
    const Span rows = rows_of(first + next->c);
    const int64_t size = item_bytes(call_.dtype), p = call_.first.in;
    const char* x = static_cast<const char*>(at_row(call_.dtype, call_.x, rows.from).data);
    return {x + parts.at(next->part).block * p * size, rows.count, call_.x.row * size,
            ceil_div(p * size, kCacheLine), kCacheLine};
  }

  // As many items' lines.
  Ahead lines_ahead(const float* lines, int64_t panel, int64_t items) const {
    const int64_t bytes = items * u_ * chunks_.lanes * int64_t(sizeof(float));
    return {reinterpret_cast<const char*>(lines), chunks_.panels, panel * int64_t(sizeof(float)),
            ceil_div(bytes, kCacheLine), kCacheLine};
  }

  void make_z(int64_t first, const Parts& parts, const Step& step, const Step* next,
              const Own& own) const {
    const auto [blocks, q, p] = call_.first;
    const auto [k, from, to] = parts.at(step.part);
    const Span rows = rows_of(first + step.c);
    const Transfer x = chunks_.transfer(call_.x, rows, k * p, p, own.lines);
    chunks_.kernels.rows_to_lines(x);
    const Scalars w = w1_.part(k, from, to - from, nullptr);
    chunks_.kernels.product({2, rows.count, (to - from) * u_, p * u_, x.data, x.panel, w.data,
                             w.row, z_of(step.c), z_panel(), &z_lines_[(k * q + from) * u_],
                             far_, x_ahead(first, parts, next)});
  }

  // The gradient's lines of a group of blocks of the second factor, and dz of them.
  void make_dz(int64_t first, int64_t c, int64_t group) const {
    const auto [blocks, s, r] = call_.second;
    const Span rows = rows_of(first + c);
    const int64_t l = group * group_, neighbours = std::min(group_, blocks - l);
    const bool whole = group_ == blocks;  // one run, then
    float* g = g_of(c) + l * g_block();
    chunks_.kernels.rows_to_lines({call_.dtype, 2, at_row(call_.dtype, grad_, rows.from),
                                   rows.count, l, whole ? 1 : s, blocks,
                                   (whole ? s : 1) * neighbours * u_, g, g_panel(), u_,
                                   grad_lines_.data(), nullptr});
    for (int64_t i = 0; dz_ && i < neighbours; ++i) {
      const Scalars w = w2_t_.part(l + i, 0, r, nullptr);
      Ahead weights;
      if (far_ && i + 1 < neighbours) {
        const Scalars next = w2_t_.part(l + i + 1, 0, r, nullptr);
        weights = {reinterpret_cast<const char*>(next.data), r * u_,
                   next.row * int64_t(sizeof(float)),
                   ceil_div(s * u_ * int64_t(sizeof(float)), kCacheLine), kCacheLine};
      }
      chunks_.kernels.product({2, rows.count, r * u_, s * u_, g + i * g_block(), g_panel(),
                               w.data, w.row, dz_of(c), dz_panel(),
                               &dz_lines_[(l + i) * r * u_], far_, weights});
    }
  }

  const float* g_of(const Step& step, const Part& part) const {
    return g_of(step.c) + part.block * g_block() + part.from * u_ * chunks_.lanes;
  }
  const float* dz_of(const Step& step, const Part& part) const {
    return dz_of(step.c) + part.block * dz_block() + part.from * u_ * chunks_.lanes;
  }

  void make_dw2(int64_t first, const Parts& parts, const Step& step, const Step* next,
                const Own& own) const {
    const Part part = parts.at(step.part);
    const Span rows = rows_of(first + step.c);
    const int64_t r = call_.second.in;
    const auto z = [&](const Step& step, const Part& part) {
      return z_of(step.c) + part.block * z_block();
    };
    const Scalars zs = chunks_.rows_of(z(step, part), z_panel(), rows, r, sums2_.row(), own);
    OuterSum share{rows.count, g_of(step, part), g_panel(), zs.data, zs.row, far_};
    if (far_ && next) {
      const Part then = parts.at(next->part);
      share.ahead[0] = lines_ahead(z(*next, then), z_panel(), r);
      share.ahead[1] = lines_ahead(g_of(*next, then), g_panel(), then.to - then.from);
    }
    sums2_.add(first + step.c, part, share);
  }

  void make_dw1(int64_t first, const Parts& parts, const Step& step, const Step* next,
                const Own& own) const {
    const Part part = parts.at(step.part);
    const Span rows = rows_of(first + step.c);
    const int64_t p = call_.first.in;
    const Scalars x = chunks_.rows_of(call_.x, rows, part.block * p, p, sums1_.row(), own);
    OuterSum share{rows.count, dz_of(step, part), dz_panel(), x.data, x.row, far_};
    if (far_ && next) {
      const Part then = parts.at(next->part);
      share.ahead[0] = x_ahead(first, parts, next);
      share.ahead[1] = lines_ahead(dz_of(*next, then), dz_panel(), then.to - then.from);
    }
    sums1_.add(first + step.c, part, share);
  }

  void make_dx(int64_t first, const Parts& parts, const Step& step, const Own& own) const {
    const auto [blocks, q, p] = call_.first;
    const Part part = parts.at(step.part, p);
    const Span rows = rows_of(first + step.c);
    for (int64_t from = part.from; from < part.to; from += kOuts) {
      const int64_t outs = std::min(kOuts, part.to - from);
      const Scalars w = w1_t_.part(part.block, from, outs, nullptr);
      const Transfer dx = chunks_.transfer(dx_, rows, part.block * p + from, outs, own.made);
      chunks_.kernels.product({2, rows.count, outs * u_, q * u_,
                               dz_of(step.c) + part.block * dz_block(), dz_panel(), w.data, w.row,
                               dx.data, dx.panel, nullptr});
      chunks_.kernels.lines_to_rows(dx);
    }
  }

  const MonarchMatmul& call_;
  const Rows grad_, dx_;
  void *const dw1_, *const dw2_;
  const Chunks chunks_{call_.dtype};
  const int64_t u_, weights_;
  const bool far_;  // what a round works in leaves a core's caches
  const int64_t jobs_, group_;
  const Lines of_z_{call_.second.in, u_}, of_dz_{call_.first.out, u_}, of_g_{call_.second.out, u_};
  FloatWeights w1_, w1_t_, w2_t_;
  const std::vector<int32_t> z_lines_, dz_lines_;
  std::vector<int32_t> grad_lines_;
  WeightSums sums1_, sums2_;
  const int64_t row_;  // of the longer rows of sums
  // [chunk][panel][line][lanes]; z and g by the second factor's blocks
  float *z_ = nullptr, *dz_ = nullptr, *g_ = nullptr;
  std::vector<Own> owns_;
};

}  // namespace

void monarch_matmul_backward_on_threads(const MonarchMatmul& call, const Rows& grad, void* dx,
                                        void* dw1, void* dw2, int threads) {
  Backward(call, grad, dx, dw1, dw2, threads).run();
}

void block_diag_matmul_backward_on_threads(const BlockDiagMatmul& call, const Rows& grad, void* dx,
                                           void* dw, int threads) {
  if (dx) {
    block_diag_matmul_on_threads({call.dtype, call.N, call.factor, grad, call.w, true}, {}, dx,
                                 threads);
  }
  if (!dw) return;
  const Factor& factor = call.factor;
  const Chunks chunks(call.dtype);
  const int64_t jobs = jobs_for(call.N, weights_of(factor, chunks.unit), threads);
  WeightSums sums(chunks.kernels, call.dtype, factor, call.N);
  std::vector<Own> owns(jobs);
  Workspace space;
  sums.ask(space);
  for (Own& own : owns) chunks.ask(space, own, factor.in, factor.out, sums.row());
  space.make();
  for (const Own& own : owns) std::fill_n(own.rows, kRows * sums.row(), 0.0f);
  const Parts parts(factor.blocks, factor.out, kOuts / chunks.unit, jobs);
  share_work(jobs, parts.count(), [&](int64_t job, int64_t i) {
    const Own& own = owns[job];
    const Part part = parts.at(i);
    for (int64_t c = 0; c * kRows < call.N; ++c) {
      const Span rows = span_of(call.N, kRows, c);
      const int64_t first = part.block * factor.out + part.from;
      const Transfer g = chunks.transfer(grad, rows, first, part.to - part.from, own.made);
      chunks.kernels.rows_to_lines(g);
      const Scalars x =
          chunks.rows_of(call.x, rows, part.block * factor.in, factor.in, sums.row(), own);
      sums.add(c, part, {rows.count, g.data, g.panel, x.data, x.row});
    }
  });
  sums.finish(dw, jobs);
}

}  // namespace kexue::monarch
