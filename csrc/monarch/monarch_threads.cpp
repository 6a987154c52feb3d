// Forward: a tile of rows goes through both factors while what is between them stays in L2.
#include "monarch/monarch_threads.h"

#include "monarch/workspace.h"

namespace kexue::monarch {
namespace {

constexpr int64_t kTileBytes = 256 << 10;  // of what is between the factors
constexpr int64_t kMostPanels = 8;         // of a tile, or together
constexpr int64_t kManyWeights = 12 << 20;  // bytes: more are not fetched anew for each tile
constexpr int64_t kChunk = 24;             // floats of a block's output that are made at once
constexpr int64_t kFewChunk = 96;          // the same in panels of one register
constexpr int64_t kRun = 16;               // floats that are written side by side

std::vector<float> floats_of_bias(const Kernels& kernels, DType dtype, const Bias& bias,
                                  int64_t size) {
  std::vector<float> floats;
  if (!bias.data) return floats;
  // a complex row becomes two
  floats.resize(size * floats_of(dtype) * floats_of(dtype));
  kernels.unpack({dtype, bias.data, 1, size, 0, bias.stride, false}, floats.data());
  for (int64_t i = 1; dtype == DType::c64 && i < 2 * size; i += 2) floats[i] = -floats[i];
  return floats;
}

// How rows are cut into panels, and panels into tiles.
struct Tiling {
  int vectors;
  int64_t lanes, panels, jobs;
  int64_t tile;  // panels
  bool alone;    // there are tiles enough for each thread to take whole ones

  Tiling(const Kernels& kernels, int64_t N, int64_t weights, int64_t lines, int threads) {
    vectors = N <= kernels.lanes_of_register ? 1 : 2;
    lanes = vectors * kernels.lanes_of_register;
    panels = ceil_div(N, lanes);
    jobs = jobs_for(N, weights, threads);
    const int64_t most = kTileBytes / (lines * lanes * int64_t(sizeof(float)));
    tile = std::clamp<int64_t>(std::min(most, panels / (2 * jobs)), 1, kMostPanels);
    alone = panels >= 2 * jobs;
  }

  int64_t tiles() const { return ceil_div(panels, tile); }
  Span span(int64_t N, int64_t i) const { return span_of(N, tile * lanes, i); }
};

// One thread's.
struct Own {
  Buffer lines, made, weights;
};

class MonarchForward {
 public:
  MonarchForward(const MonarchMatmul& call, const Bias& bias, void* y, int threads)
      : call_(call),
        u_(floats_of(call.dtype)),
        z_({call.second.in, u_}),
        lines_(call.second.blocks * z_.block()),
        weights_(weights_of(call.first, u_) + weights_of(call.second, u_)),
        tiling_(kernels_, call.N, weights_, lines_, threads),
        columns_(call.second.out * call.second.blocks),
        y_{y, columns_, 1},
        w1_(kernels_, call.dtype, call.first, call.w1, false),
        w2_(kernels_, call.dtype, call.second, call.w2, false),
        bias_(floats_of_bias(kernels_, call.dtype, bias, columns_)),
        group_(std::min(call.second.blocks, kRun / u_)),
        chunk_(std::min(call.second.out, (tiling_.vectors == 1 ? kFewChunk : kChunk) / u_)),
        z_lines_(transposed_lines(call.second.in, call.second.blocks, z_)) {
    for (int64_t s = 0; s < chunk_; ++s) {
      for (int64_t part = 0; part < u_; ++part) {
        made_lines_.push_back(int32_t(s * group_ * u_ + part));
      }
    }
  }

  void run() {
    const bool many = weights_ * int64_t(sizeof(float)) >= kManyWeights;
    if (tiling_.alone && !many) {
      run_tiles();
    } else {
      run_together(many ? std::min(tiling_.panels, kMostPanels) : tiling_.panels);
    }
  }

 private:
  int64_t line() const { return tiling_.lanes; }
  int64_t z_panel() const { return lines_ * line(); }
  int64_t groups() const { return ceil_div(call_.second.blocks, group_); }

  Own own(int64_t panels) const {
    const Factor& first = call_.first;
    return {Buffer(panels * first.in * u_ * line()),
            Buffer(panels * chunk_ * group_ * u_ * line()),
            Buffer(std::max(w1_.own_size(first.out), w2_.own_size(chunk_)))};
  }

  // Each thread takes tiles.
  void run_tiles() {
    Workspace space;
    for (FloatWeights* w : {&w1_, &w2_}) w->ask_for_all(space);
    space.make();
    for (const FloatWeights* w : {&w1_, &w2_}) w->unpack_all(tiling_.jobs);
    std::vector<Own> owns(tiling_.jobs);
    std::vector<Buffer> z(tiling_.jobs);
    share_work(tiling_.jobs, tiling_.tiles(), [&](int64_t job, int64_t i) {
      if (!z[job].data()) {
        owns[job] = own(tiling_.tile);
        z[job] = Buffer(tiling_.tile * z_panel());
      }
      const Span rows = tiling_.span(call_.N, i);
      for (int64_t k = 0; k < call_.first.blocks; ++k) {
        first(rows, {k, 0, call_.first.out}, z[job].data(), owns[job]);
      }
      for (int64_t group = 0; group < groups(); ++group) {
        second(rows, {group, 0, call_.second.out}, z[job].data(), owns[job]);
      }
    });
  }

  // Threads take blocks, of the one factor and then of the other, for some panels at a time.
  void run_together(int64_t panels) {
    const int64_t jobs = tiling_.jobs;
    float* z;
    Workspace space;
    space.ask(&z, panels * z_panel());
    space.make();
    std::vector<Own> owns;
    for (int64_t job = 0; job < jobs; ++job) owns.push_back(own(panels));
    const Parts ks(call_.first.blocks, call_.first.out, kChunk / u_, jobs);
    const Parts ls(groups(), call_.second.out, chunk_, jobs);
    for (int64_t from = 0; from < call_.N; from += panels * line()) {
      const Span rows{from, std::min(panels * line(), call_.N - from)};
      share_work(jobs, ks.count(), [&](int64_t job, int64_t i) {
        first(rows, ks.at(i), z, owns[job]);
      });
      share_work(jobs, ls.count(), [&](int64_t job, int64_t i) {
        second(rows, ls.at(i), z, owns[job]);
      });
    }
  }

  // Items of block k of the first factor, to where the second reads them.
  void first(const Span& rows, const Part& part, float* z, const Own& own) const {
    const auto [k, from, to] = part;
    const int64_t depth = call_.first.in * u_, panel = depth * line();
    kernels_.rows_to_lines({call_.dtype, tiling_.vectors, at_row(call_.dtype, call_.x, rows.from),
                            rows.count, k * call_.first.in, 1, 0, depth, own.lines.data(), panel,
                            0, nullptr, nullptr});
    const Scalars w = w1_.part(k, from, to - from, own.weights.data());
    kernels_.product({tiling_.vectors, rows.count, (to - from) * u_, depth,
                      own.lines.data(), panel, w.data, w.row, z, z_panel(),
                      &z_lines_[(k * call_.first.out + from) * u_]});
  }

  // Items of a group of blocks of the second factor.
  void second(const Span& rows, const Part& part, const float* z, const Own& own) const {
    for (int64_t s = part.from; s < part.to; s += chunk_) {
      second_chunk(rows, part.block * group_, s, std::min(chunk_, part.to - s), z, own);
    }
  }

  void second_chunk(const Span& rows, int64_t l, int64_t from, int64_t outs, const float* z,
                    const Own& own) const {
    const int64_t blocks = call_.second.blocks, depth = call_.second.in * u_;
    const int64_t neighbours = std::min(group_, blocks - l), panel = chunk_ * group_ * u_ * line();
    for (int64_t i = 0; i < neighbours; ++i) {
      const Scalars w = w2_.part(l + i, from, outs, own.weights.data());
      kernels_.product({tiling_.vectors, rows.count, outs * u_, depth,
                        z + (l + i) * z_.block() * line(), z_panel(), w.data, w.row,
                        own.made.data() + i * u_ * line(), panel, made_lines_.data()});
    }
    const bool whole = group_ == blocks;  // one run, then
    kernels_.lines_to_rows({call_.dtype, tiling_.vectors, at_row(call_.dtype, y_, rows.from),
                            rows.count, from * blocks + l, whole ? 1 : outs, blocks,
                            (whole ? outs : 1) * neighbours * u_, own.made.data(), panel,
                            group_ * u_, nullptr, bias_.empty() ? nullptr : bias_.data()});
  }

  const Kernels kernels_;
  const MonarchMatmul& call_;
  const int64_t u_;
  const Lines z_;
  const int64_t lines_, weights_;
  const Tiling tiling_;
  const int64_t columns_;
  const Rows y_;
  FloatWeights w1_, w2_;
  const std::vector<float> bias_;
  const int64_t group_, chunk_;
  const std::vector<int32_t> z_lines_;
  std::vector<int32_t> made_lines_;
};

class BlockDiagForward {
 public:
  BlockDiagForward(const BlockDiagMatmul& call, const Bias& bias, void* y, int threads)
      : call_(call),
        factor_(call.transposed ? transposed(call.factor) : call.factor),
        u_(floats_of(call.dtype)),
        columns_(factor_.blocks * factor_.out),
        y_{y, columns_, 1},
        tiling_(kernels_, call.N, weights_of(factor_, u_), (factor_.in + factor_.out) * u_,
                threads),
        w_(kernels_, call.dtype, call.factor, call.w, call.transposed),
        bias_(floats_of_bias(kernels_, call.dtype, bias, columns_)) {}

  void run() {
    prepare_output(y_.data, call_.N * columns_ * item_bytes(call_.dtype));
    Workspace space;
    if (tiling_.tiles() > 1) {
      w_.ask_for_all(space);
      space.make();
      w_.unpack_all(tiling_.jobs);
    }
    std::vector<Own> owns;
    for (int64_t job = 0; job < tiling_.jobs; ++job) {
      owns.push_back({Buffer(tiling_.tile * panel(factor_.in)),
                      Buffer(tiling_.tile * panel(factor_.out)),
                      Buffer(w_.own_size(factor_.out))});
    }
    if (tiling_.alone) {
      run_tiles(owns);
    } else {
      run_parts(owns);
    }
  }

 private:
  // Each thread takes tiles: while it multiplies a block, the next block's items of the same rows
  // are on their way to its cache.
  void run_tiles(const std::vector<Own>& owns) const {
    share_work(tiling_.jobs, tiling_.tiles(), [&](int64_t job, int64_t i) {
      const Span rows = tiling_.span(call_.N, i);
      for (int64_t b = 0; b < factor_.blocks; ++b) multiply(rows, {b, 0, factor_.out}, owns[job]);
    });
  }

  // Few rows: threads take blocks, or parts of them.
  void run_parts(const std::vector<Own>& owns) const {
    const int64_t jobs_of_tile = ceil_div(tiling_.jobs, tiling_.tiles());
    const Parts parts(factor_.blocks, factor_.out, kChunk / u_, jobs_of_tile);
    share_work(tiling_.jobs, tiling_.tiles() * parts.count(), [&](int64_t job, int64_t i) {
      multiply(tiling_.span(call_.N, i / parts.count()), parts.at(i % parts.count()), owns[job]);
    });
  }

  int64_t panel(int64_t items) const { return items * u_ * tiling_.lanes; }

  void multiply(const Span& rows, const Part& part, const Own& own) const {
    const auto [b, from, to] = part;
    const int64_t depth = factor_.in * u_, outs = (to - from) * u_;
    kernels_.rows_to_lines({call_.dtype, tiling_.vectors, at_row(call_.dtype, call_.x, rows.from),
                            rows.count, b * factor_.in, 1, 0, depth, own.lines.data(),
                            panel(factor_.in), 0, nullptr, nullptr});
    const Scalars w = w_.part(b, from, to - from, own.weights.data());
    kernels_.product({tiling_.vectors, rows.count, outs, depth, own.lines.data(),
                      panel(factor_.in), w.data, w.row, own.made.data(), panel(factor_.out),
                      nullptr});
    kernels_.lines_to_rows({call_.dtype, tiling_.vectors, at_row(call_.dtype, y_, rows.from),
                            rows.count, b * factor_.out + from, 1, 0, outs, own.made.data(),
                            panel(factor_.out), 0, nullptr,
                            bias_.empty() ? nullptr : bias_.data()});
  }

  const Kernels kernels_;
  const BlockDiagMatmul& call_;
  const Factor factor_;
  const int64_t u_, columns_;
  const Rows y_;
  const Tiling tiling_;
  FloatWeights w_;
  const std::vector<float> bias_;
};

}  // namespace

void monarch_matmul_on_threads(const MonarchMatmul& call, const Bias& bias, void* y, int threads) {
  const Factor& second = call.second;
  prepare_output(y, call.N * second.out * second.blocks * item_bytes(call.dtype));
  MonarchForward(call, bias, y, threads).run();
}

void block_diag_matmul_on_threads(const BlockDiagMatmul& call, const Bias& bias, void* y,
                                  int threads) {
  BlockDiagForward(call, bias, y, threads).run();
}

}  // namespace kexue::monarch
