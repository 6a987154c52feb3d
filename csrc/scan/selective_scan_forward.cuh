// The forward kernel of selective_scan. A block of 64 threads takes 32 channels and up to 16 states
// (8 complex ones) through their steps, 16 at a time: what is shared by channels or by states is
// made once and read from shared memory, the next steps' data is on its way meanwhile.
//
// Estimates for real states, not measured. Four steps of a warp are 32 exponentials, 256 cycles of
// a quarter of an SM's special function units, and 190 instructions; the rest for 16 steps, a
// unit's loads, softplus, sums and gate, is another 24 of the former and some 500 of the latter.
#pragma once

#include "scan/selective_scan_tile.cuh"

namespace kexue::selective {

constexpr int kForwardPairs = 16, kForwardChannels = 2 * kForwardPairs;
constexpr int kForwardSteps = 16;
constexpr int kForwardThreads = kForwardPairs * kGroups;
static_assert(kForwardThreads == kForwardSteps * kForwardChannels / kUnit, "a unit for each");
static_assert(kForwardThreads == 4 * kForwardSteps, "and one of B or C");

template <class S>
struct ForwardShared {
  float dt[kForwardSteps][kForwardChannels], dtu[kForwardSteps][kForwardChannels];
  float y[kForwardSteps][kGroups][kForwardChannels];  // sums over a group's states
  S B[kForwardSteps][kPadded<S>], C[kForwardSteps][kPadded<S>];
  float D[kForwardChannels], bias[kForwardChannels];
};

// A thread's share of some steps' data, as it came from memory.
template <DType T, class S>
struct ForwardLoads {
  Raw<T> u, delta;
  typename Entries<T, S>::Loaded entries;
};

// A thread on its way through a segment.
template <DType T, class S>
struct ForwardBlock {
  const ForwardArgs& args;
  const Inputs& in;
  const ChannelTile& tile;
  const Segment& segment;
  ForwardShared<S>& shared;
  Unit unit;
  Rows<T> u, delta, z;
  Entries<T, S> entries;

  KEXUE_DEVICE ForwardBlock(const ForwardArgs& args, const ChannelTile& tile, const Unit& unit,
                            const Segment& segment, ForwardShared<S>& shared)
      : args(args),
        in(args.in),
        tile(tile),
        segment(segment),
        shared(shared),
        unit(unit),
        u(in.u, segment.batch, unit.step, tile.begin + unit.channel),
        delta(in.delta, segment.batch, unit.step, tile.begin + unit.channel),
        z(in.z, segment.batch, unit.step, tile.begin + unit.channel),
        entries(in, tile, segment.batch) {}

  KEXUE_DEVICE int live(int64_t step) const {
    return segment.has(step + unit.step) ? unit.live : 0;
  }

  KEXUE_DEVICE Raw<T> load(const Rows<T>& rows, int64_t step) const {
    return rows.load(in.wide, step, live(step));
  }

  KEXUE_DEVICE ForwardLoads<T, S> load(int64_t step) const {
    ForwardLoads<T, S> loads = {};
    if (step >= segment.end) return loads;
    loads.u = load(u, step);
    loads.delta = load(delta, step);
    loads.entries = entries.load(segment, step);
    return loads;
  }

  KEXUE_DEVICE void stage(const ForwardLoads<T, S>& loads, int live) const {
    float u[kUnit], dt[kUnit];
    unpack<T>(loads.u, u);
    unpack<T>(loads.delta, dt);
    step_sizes(in, shared.bias + unit.channel, live, dt);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) u[k] *= dt[k];
    store_row8(shared.dt[unit.step] + unit.channel, dt);
    store_row8(shared.dtu[unit.step] + unit.channel, u);
    entries.store(loads.entries, shared.B[0], shared.C[0]);
  }

  // out = (y + D u) silu(z), or the sums of y for the launch that takes the next states.
  KEXUE_DEVICE void finish(const Raw<T>& raw_u, const Raw<T>& raw_z, int64_t step) const {
    const int live = this->live(step);
    if (live == 0) return;
    const int64_t channel = tile.begin + unit.channel, t = step + unit.step;
    float y[kUnit] = {}, u[kUnit], D[kUnit];
    float* sums = args.sums ? args.sums + (segment.batch * in.L + t) * in.d + channel : nullptr;
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      if (sums && in.first_state > 0 && k < live) y[k] = sums[k];
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float some[kUnit];
      load_row8(shared.y[unit.step][group] + unit.channel, some);
#pragma unroll
      for (int k = 0; k < kUnit; ++k) y[k] += some[k];
    }
    if (!args.finish) {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) {
        if (k < live) sums[k] = y[k];
      }
      return;
    }
    unpack<T>(raw_u, u);
    load_row8(shared.D + unit.channel, D);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) y[k] = fused(D[k], u[k], y[k]);
    gate<T>(in, raw_z, y);
    store_unit<T>(args.out, in, segment.batch, t, channel, live, y);
  }
};

// kQuad steps
template <class S, bool PER_STEP>
KEXUE_DEVICE void advance(const Inputs& in, ForwardShared<S>& shared,
                          const Patch<S, kForwardPairs>& patch, int first, const Pair<S>& A,
                          Pair<S>& B, Pair<S>& C, Pair<S>& x) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const int t = first + i;
    float dt[2], dtu[2], y[2] = {};
    memcpy(dt, shared.dt[t] + 2 * patch.pair, sizeof dt);
    memcpy(dtu, shared.dtu[t] + 2 * patch.pair, sizeof dtu);
    take_row<S, PER_STEP>(in.B, shared.B[t] + patch.state, B);
    take_row<S, PER_STEP>(in.C, shared.C[t] + patch.state, C);
    each<S>([&](int c, int j) {
      S& state = x.of[c][j];
      state = product_plus(decay(dt[c], A.of[c][j]), state, scaled(dtu[c], B.of[c][j]));
      y[c] = plus_real_of_product(C.of[c][j], state, y[c]);
    });
    memcpy(shared.y[t][patch.group] + 2 * patch.pair, y, sizeof y);
  }
}

// The steps of a tile that are inside a stretch, in whole quads.
struct Quads {
  int begin, end;
};
KEXUE_DEVICE Quads quads_of(int64_t step, int steps, const Stretch& stretch) {
  const int64_t from = stretch.begin - step, to = stretch.end - step;
  const int low = from > 0 ? int(from < steps ? from : steps) : 0;
  const int high = to < steps ? int(to > 0 ? to : 0) : steps;
  return {low / kQuad, (high + kQuad - 1) / kQuad};
}

KEXUE_DEVICE float sum_steps(const float (&x)[kForwardSteps][kForwardChannels]) {
  float sum = 0.0f;
#pragma unroll 4
  for (int t = 0; t < kForwardSteps; ++t) sum += x[t][thread_index()];
  return sum;
}

KEXUE_DEVICE void store_time(float* time, const Inputs& in, const ChannelTile& tile, int64_t slot,
                             float sum) {
  const int64_t channel = tile.begin + thread_index();
  if (thread_index() < kForwardChannels && channel < tile.end) time[slot * in.d + channel] = sum;
}

// Through a segment.
template <DType T, class S, bool PER_STEP>
KEXUE_DEVICE void scan_segment(const ForwardBlock<T, S>& block,
                               const Patch<S, kForwardPairs>& patch, int64_t slot,
                               const Pair<S>& A, Pair<S>& B, Pair<S>& C, Pair<S>& x) {
  const ForwardArgs& args = block.args;
  const Inputs& in = args.in;
  const Segment& segment = block.segment;
  int64_t chunk = ceil_div(segment.begin, in.chunk);  // next to be entered
  const int64_t row = segment.batch * ceil_div(in.L, in.chunk);
  const bool idle = patch.warp_is_idle(in);
  float time = 0.0f;
  int64_t step = segment.begin / kForwardSteps * kForwardSteps;
  ForwardLoads<T, S> loads = block.load(step);
#pragma unroll 1
  for (; step < segment.end; step += kForwardSteps) {
    if (args.checkpoints && step == chunk * in.chunk) {
      S* to = const_cast<S*>(transposed_row<S>(args.checkpoints, in, row + chunk++));
      store_pair<S>(to, patch, 1, in.d, x);
    }
    block.stage(loads, block.live(step));
    sync_block();
    const Raw<T> u = loads.u;
    Raw<T> z = {};
    if (args.finish && !args.local) z = block.load(block.z, step);
    loads = block.load(step + kForwardSteps);
    const Quads quads = quads_of(step, kForwardSteps, segment);
#pragma unroll 1
    for (int quad = quads.begin; quad < (idle ? 0 : quads.end); ++quad) {
      advance<S, PER_STEP>(in, block.shared, patch, quad * kQuad, A, B, C, x);
    }
    if (args.local && thread_index() < kForwardChannels) time += sum_steps(block.shared.dt);
    sync_block();
    if (!args.local) block.finish(u, z, step);
  }
  if (args.local) store_time(args.time, in, block.tile, slot, time);
}

template <DType T, class S, bool PER_STEP>
__global__ void __launch_bounds__(kForwardThreads, 4)
    selective_scan_forward_kernel(const __grid_constant__ ForwardArgs args) {
  const Inputs& in = args.in;
  const int64_t row = block_index() % in.cut.rows, index = block_index() / in.cut.rows;
  const ChannelTile tile = channel_tile(in.cut, index, kForwardChannels);
  if (tile.begin >= in.d) return;
  const Patch<S, kForwardPairs> patch(in, tile);
  auto& shared = block_shared<ForwardShared<S>>();
  const Unit unit = unit_of<kForwardSteps, kForwardChannels>(in, thread_index(), tile);
  stage_parameter<kForwardChannels>(in.D, tile, shared.D);
  stage_parameter<kForwardChannels>(in.bias, tile, shared.bias);
  for (int i = thread_index(); i < int(sizeof shared.y / sizeof(float)); i += kForwardThreads) {
    shared.y[0][0][i] = 0.0f;  // idle warps leave it so
  }
  const Pair<S> A = load_decays<S>(in, patch);
  Pair<S> B = load_invariant<S>(in.B, in, patch), C = load_invariant<S>(in.C, in, patch);
  each<S>([&](int c, int j) { C.of[c][j] = scaled(Kind<S>::kOutput, C.of[c][j]); });
  sync_block();

#pragma unroll 1
  for (int64_t slot = row; slot < in.cut.slots; slot += in.cut.rows) {
    const Segment segment = segment_of(in, slot);
    if (!segment.there || (args.local && segment.last)) continue;
    Pair<S> x = {};
    if (args.entering) {
      x = load_pair<S>(transposed_row<S>(args.entering, in, slot), patch, 1, in.d);
    } else if (!args.local) {
      x = load_pair<S>(matrix_row<S>(in.initial, in, segment.sequence), patch, in.n, 1);
    }
    const ForwardBlock<T, S> block(args, tile, unit, segment, shared);
    scan_segment<T, S, PER_STEP>(block, patch, slot, A, B, C, x);
    if (args.local) {
      store_pair<S>(const_cast<S*>(transposed_row<S>(args.local, in, slot)), patch, 1, in.d, x);
    } else if (segment.last) {
      store_pair<S>(const_cast<S*>(matrix_row<S>(args.final, in, segment.sequence)), patch, in.n,
                    1, x);
    }
  }
}

}  // namespace kexue::selective
