// Backward: rounds of a few chunks of rows. In each, threads first make what is between the
// factors (z) and its gradient (dz), then dx and each block's share of dw1 and dw2.
#include "monarch/monarch_threads.h"

#include <cstring>

#include "monarch/workspace.h"

namespace kexue::monarch {
namespace {

constexpr int64_t kRows = 64;            // of a chunk, whose products are summed first
constexpr int64_t kChunks = 16;          // whose sums are summed then
constexpr int64_t kRoundWork = 1 << 21;  // products for a round to be worth its barriers
constexpr int64_t kSumsBytes = 512 << 10;  // from where on sums leave a cache between rounds
constexpr int64_t kRoundBytes = 12 << 20;  // of lines, for these sums to come and go seldom
constexpr int64_t kRun = 16;             // floats that are read side by side
constexpr int64_t kOuts = 48;            // floats of a block's output that are made at once

// The gradient of a factor: floats [blocks, out, row], rows padded.
class WeightSums {
 public:
  WeightSums(const Kernels& kernels, DType dtype, const Factor& factor, int64_t N)
      : kernels_(kernels),
        dtype_(dtype),
        factor_(factor),
        unit_(floats_of(dtype)),
        row_(ceil_div(factor.in * unit_, 2 * kernels.lanes_of_register) * 2 *
             kernels.lanes_of_register),
        size_(factor.blocks * factor.out * unit_ * row_),
        sum_(zeros(size_)),
        total_(N > kRows * kChunks ? zeros(size_) : Buffer()) {}

  int64_t row() const { return row_; }

  // The c-th chunk's share of items [from, to) of block b, from their lines.
  void add(int64_t c, int64_t b, int64_t from, int64_t to, int64_t count, const float* lines,
           int64_t panel, const float* rows, int64_t rows_row) {
    const int64_t first = (b * factor_.out + from) * unit_ * row_, outs = (to - from) * unit_;
    float* sum = sum_.data() + first;
    kernels_.outer_sum({count, outs, row_, lines, panel, rows, rows_row, sum});
    if (total_.data() && (c + 1) % kChunks == 0) move(first, outs * row_);
  }

  void finish(void* gradient, int64_t jobs) {
    const int64_t block = factor_.out * unit_ * row_;
    const float* found = total_.data() ? total_.data() : sum_.data();
    share_work(jobs, factor_.blocks, [&](int64_t, int64_t b) {
      if (total_.data()) move(b * block, block);
      char* to = static_cast<char*>(gradient) + b * factor_.out * factor_.in * item_bytes(dtype_);
      kernels_.pack({dtype_, factor_.out, factor_.in, found + b * block, row_, to});
    });
  }

 private:
  static Buffer zeros(int64_t size) {
    Buffer buffer(size);
    std::fill_n(buffer.data(), size, 0.0f);
    return buffer;
  }

  void move(int64_t first, int64_t size) {
    float *sum = sum_.data() + first, *total = total_.data() + first;
    for (int64_t i = 0; i < size; ++i) total[i] += sum[i];
    std::fill_n(sum, size, 0.0f);
  }

  const Kernels& kernels_;
  const DType dtype_;
  const Factor factor_;
  const int64_t unit_, row_, size_;
  Buffer sum_, total_;
};

// One thread's.
struct Own {
  Buffer lines, made, rows;
};

// What both ops' gradients have in common: chunks of rows in panels of two registers.
struct Chunks {
  const Kernels kernels;
  DType dtype;
  int64_t unit, lanes, panels;  // panels of a chunk

  explicit Chunks(DType dtype)
      : dtype(dtype),
        unit(floats_of(dtype)),
        lanes(2 * kernels.lanes_of_register),
        panels(kRows / lanes) {}

  // Lines [panel][items] of a chunk, one after another.
  int64_t size(int64_t items) const { return kRows * items * unit; }

  Transfer transfer(const Rows& memory, const Span& rows, int64_t first, int64_t items,
                    float* data) const {
    const int64_t floats = items * unit;
    return {dtype, 2,      at_row(dtype, memory, rows.from), rows.count, first, 1, 0,
            floats, data, floats * lanes, 0, nullptr, nullptr};
  }

  Own own(int64_t ins, int64_t outs, int64_t row) const {
    Own own{Buffer(size(ins)), Buffer(size(outs)), Buffer(kRows * row)};
    std::fill_n(own.rows.data(), kRows * row, 0.0f);
    return own;
  }

  // Columns [first, first + items) as floats [rows, row] in a thread's own, and the length of a
  // row.
  Scalars rows_of(const Rows& memory, const Span& rows, int64_t first, int64_t items, int64_t row,
                  const Own& own) const {
    const Rows at = at_row(dtype, memory, rows.from);
    const bool floats = dtype == DType::f32 || dtype == DType::c64;
    if (floats && memory.column == 1) {  // copied, as rows may be far apart and meet in caches
      const float* from = static_cast<const float*>(at.data) + first * unit;
      for (int64_t i = 0; i < rows.count; ++i) {
        std::copy_n(from + i * memory.row * unit, items * unit, own.rows.data() + i * row);
      }
      return {own.rows.data(), row};
    }
    kernels.rows_to_lines(transfer(memory, rows, first, items, own.lines.data()));
    return rows_of(own.lines.data(), items * unit * lanes, rows, items, row, own);
  }

  // The same of lines.
  Scalars rows_of(float* lines, int64_t panel, const Span& rows, int64_t items, int64_t row,
                  const Own& own) const {
    kernels.lines_to_rows({DType::f32, 2, {own.rows.data(), row, 1}, rows.count, 0, 1, 0,
                           items * unit, lines, panel, 0, nullptr, nullptr});
    return {own.rows.data(), row};
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
        jobs_(jobs_for(call.N, 3 * weights_, threads)),
        group_(std::min(call.second.blocks, kRun / u_)),
        w1_(chunks_.kernels, call.dtype, call.first, call.w1, false),
        w1_t_(chunks_.kernels, call.dtype, call.first, call.w1, true),
        w2_t_(chunks_.kernels, call.dtype, call.second, call.w2, true),
        z_lines_(transposed_lines(call.second.in, call.second.blocks, of_z_)),
        dz_lines_(transposed_lines(call.second.blocks, call.second.in, of_dz_)) {
    const auto [l, s, r] = call.second;
    if (group_ == l) {
      grad_lines_ = transposed_lines(s, l, of_g_);
    } else {
      for (int64_t t = 0; t < group_ * u_; ++t) {
        grad_lines_.push_back(of_g_.at(t / u_ * s) + t % u_);
      }
    }
    if (dw1) sums1_ = std::make_unique<WeightSums>(chunks_.kernels, call.dtype, call.first, call.N);
    if (dw2) {
      sums2_ = std::make_unique<WeightSums>(chunks_.kernels, call.dtype, call.second, call.N);
    }
  }

  void run() {
    prepare_output(dx_.data, dx_.data ? call_.N * dx_.row * item_bytes(call_.dtype) : 0);
    if (dw2_) w1_.unpack_all(jobs_);
    if (dx_.data) w1_t_.unpack_all(jobs_);
    if (dx_.data || dw1_) w2_t_.unpack_all(jobs_);
    const int64_t chunks = ceil_div(call_.N, kRows), round = std::min(chunks, chunks_of_a_round());
    const auto lines = [&](bool wanted, int64_t panel) {
      return Buffer(wanted ? round * chunks_.panels * panel : 0);
    };
    z_ = lines(dw2_, z_panel());
    dz_ = lines(dx_.data || dw1_, dz_panel());
    g_ = lines(true, g_panel());
    const int64_t row = std::max(dw1_ ? sums1_->row() : 0, dw2_ ? sums2_->row() : 0);
    for (int64_t job = 0; job < jobs_; ++job) {
      owns_.push_back(chunks_.own(call_.first.in, std::min(call_.first.in, kOuts), row));
    }
    for (int64_t first = 0; first < chunks; first += round) {
      run_round(first, std::min(round, chunks - first));
    }
    if (dw1_) sums1_->finish(dw1_, jobs_);
    if (dw2_) sums2_->finish(dw2_, jobs_);
  }

 private:
  int64_t chunks_of_a_round() const {
    const int64_t blocks = call_.first.blocks + ceil_div(call_.second.blocks, group_);
    const int64_t bytes = chunks_.panels * (z_panel() + dz_panel() + g_panel()) * sizeof(float);
    const bool large = weights_ * int64_t(sizeof(float)) > kSumsBytes;
    return std::max({ceil_div(jobs_ * kRoundWork, kRows * weights_), ceil_div(4 * jobs_, blocks),
                     large ? kRoundBytes / bytes : 1});
  }

  void run_round(int64_t first, int64_t chunks) {
    const int64_t k = call_.first.blocks, groups = ceil_div(call_.second.blocks, group_);
    const int64_t zs = dw2_ ? chunks * k : 0;
    share_work(jobs_, zs + chunks * groups, [&](int64_t job, int64_t i) {
      if (i < zs) return make_z(first, i / k, i % k, owns_[job]);
      make_dz(first, (i - zs) / groups, (i - zs) % groups);
    });
    const Parts parts1(k, call_.first.out, kOuts / u_, jobs_);
    const Parts parts2(call_.second.blocks, call_.second.out, kOuts / u_, jobs_);
    const int64_t dw2s = dw2_ ? parts2.count() : 0, dw1s = dw1_ ? parts1.count() : 0;
    const int64_t dxs = dx_.data ? chunks * k : 0;
    share_work(jobs_, dw2s + dw1s + dxs, [&](int64_t job, int64_t i) {
      const Own& own = owns_[job];
      if (i < dw2s) return make_dw2(first, chunks, parts2, i, own);
      i -= dw2s;
      if (i < dw1s) return make_dw1(first, chunks, parts1, i, own);
      i -= dw1s;
      make_dx(first, i / k, i % k, own);
    });
  }

  Span rows_of(int64_t chunk) const { return span_of(call_.N, kRows, chunk); }
  int64_t z_panel() const { return call_.second.blocks * z_block(); }
  int64_t dz_panel() const { return call_.first.blocks * dz_block(); }
  int64_t g_panel() const { return call_.second.blocks * g_block(); }
  int64_t z_block() const { return of_z_.block() * chunks_.lanes; }
  int64_t dz_block() const { return of_dz_.block() * chunks_.lanes; }
  int64_t g_block() const { return of_g_.block() * chunks_.lanes; }
  float* z_of(int64_t c) const { return z_.data() + c * chunks_.panels * z_panel(); }
  float* dz_of(int64_t c) const { return dz_.data() + c * chunks_.panels * dz_panel(); }
  float* g_of(int64_t c) const { return g_.data() + c * chunks_.panels * g_panel(); }

  // Block k of z, in the c-th chunk of the round.
  void make_z(int64_t first, int64_t c, int64_t k, const Own& own) const {
    const auto [blocks, q, p] = call_.first;
    const Span rows = rows_of(first + c);
    const Transfer x = chunks_.transfer(call_.x, rows, k * p, p, own.lines.data());
    chunks_.kernels.rows_to_lines(x);
    const Scalars w = w1_.part(k, 0, q, nullptr);
    chunks_.kernels.product({2, rows.count, q * u_, p * u_, x.data, x.panel, w.data, w.row,
                             z_of(c), z_panel(), &z_lines_[k * q * u_]});
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
    for (int64_t i = 0; dz_.data() && i < neighbours; ++i) {
      const Scalars w = w2_t_.part(l + i, 0, r, nullptr);
      chunks_.kernels.product({2, rows.count, r * u_, s * u_, g + i * g_block(), g_panel(),
                               w.data, w.row, dz_of(c), dz_panel(),
                               &dz_lines_[(l + i) * r * u_]});
    }
  }

  void make_dw2(int64_t first, int64_t chunks, const Parts& parts, int64_t part,
                const Own& own) const {
    const auto [blocks, s, r] = call_.second;
    const int64_t l = parts.block(part), from = parts.from(part);
    for (int64_t c = 0; c < chunks; ++c) {
      const Span rows = rows_of(first + c);
      float* z = z_of(c) + l * z_block();
      const Scalars zs = chunks_.rows_of(z, z_panel(), rows, r, sums2_->row(), own);
      sums2_->add(first + c, l, from, parts.to(part), rows.count,
                  g_of(c) + l * g_block() + from * u_ * chunks_.lanes, g_panel(), zs.data,
                  zs.row);
    }
  }

  void make_dw1(int64_t first, int64_t chunks, const Parts& parts, int64_t part,
                const Own& own) const {
    const auto [blocks, q, p] = call_.first;
    const int64_t k = parts.block(part), from = parts.from(part);
    for (int64_t c = 0; c < chunks; ++c) {
      const Span rows = rows_of(first + c);
      const Scalars x = chunks_.rows_of(call_.x, rows, k * p, p, sums1_->row(), own);
      sums1_->add(first + c, k, from, parts.to(part), rows.count,
                  dz_of(c) + k * dz_block() + from * u_ * chunks_.lanes, dz_panel(), x.data,
                  x.row);
    }
  }

  void make_dx(int64_t first, int64_t c, int64_t k, const Own& own) const {
    const auto [blocks, q, p] = call_.first;
    const Span rows = rows_of(first + c);
    for (int64_t from = 0; from < p; from += kOuts) {
      const int64_t outs = std::min(kOuts, p - from);
      const Scalars w = w1_t_.part(k, from, outs, nullptr);
      const Transfer dx = chunks_.transfer(dx_, rows, k * p + from, outs, own.made.data());
      chunks_.kernels.product({2, rows.count, outs * u_, q * u_,
                               dz_of(c) + k * dz_block(), dz_panel(), w.data, w.row, dx.data,
                               dx.panel, nullptr});
      chunks_.kernels.lines_to_rows(dx);
    }
  }

  const MonarchMatmul& call_;
  const Rows grad_, dx_;
  void *const dw1_, *const dw2_;
  const Chunks chunks_{call_.dtype};
  const int64_t u_, weights_, jobs_, group_;
  const Lines of_z_{call_.second.in, u_}, of_dz_{call_.first.out, u_}, of_g_{call_.second.out, u_};
  FloatWeights w1_, w1_t_, w2_t_;
  const std::vector<int32_t> z_lines_, dz_lines_;
  std::vector<int32_t> grad_lines_;
  std::unique_ptr<WeightSums> sums1_, sums2_;
  Buffer z_, dz_, g_;  // [chunk][panel][line][lanes]; z and g by the second factor's blocks
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
  std::vector<Own> owns;
  for (int64_t job = 0; job < jobs; ++job) {
    owns.push_back(chunks.own(factor.in, factor.out, sums.row()));
  }
  const Parts parts(factor.blocks, factor.out, kOuts / chunks.unit, jobs);
  share_work(jobs, parts.count(), [&](int64_t job, int64_t i) {
    const Own& own = owns[job];
    const int64_t b = parts.block(i), from = parts.from(i), outs = parts.to(i) - from;
    for (int64_t c = 0; c * kRows < call.N; ++c) {
      const Span rows = span_of(call.N, kRows, c);
      const int64_t first = b * factor.out + from;
      const Transfer g = chunks.transfer(grad, rows, first, outs, own.made.data());
      chunks.kernels.rows_to_lines(g);
      const Scalars x = chunks.rows_of(call.x, rows, b * factor.in, factor.in, sums.row(), own);
      sums.add(c, b, from, from + outs, rows.count, g.data, g.panel, x.data, x.row);
    }
  });
  sums.finish(dw, jobs);
}

}  // namespace kexue::monarch
