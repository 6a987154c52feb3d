// Where sequences are cut into segments: what each does is found at once for all, then from one
// to the next what enters them. Forward that is the forward kernel's states and sums of dt;
// backward it is s of selective_scan_backward.cuh, made here.
#pragma once

#include "scan/selective_scan_backward.cuh"

namespace kexue::selective {

// dt, g, B and C of kForwardSteps steps, in the forward kernel's places for dt, dtu, B and C.
template <DType T, class S>
KEXUE_DEVICE void stage_reverse(const ReverseArgs& args, ForwardShared<S>& shared,
                                const ChannelTile& tile, const Unit& unit,
                                const Entries<T, S>& entries, const Segment& segment,
                                int64_t step) {
  const Inputs& in = args.in;
  const int live = segment.has(step + unit.step) ? unit.live : 0;
  const auto load = [&](const Strided& x) {
    const Rows<T> rows(x, segment.batch, unit.step, tile.begin + unit.channel);
    return rows.load(in.wide, step, live);
  };
  const Raw<T> delta = load(in.delta), grad = load(args.grad_out), z = load(in.z);
  const auto of_matrix = entries.load(segment, step);
  float dt[kUnit], g[kUnit];
  unpack<T>(delta, dt);
  unpack<T>(grad, g);
  step_sizes(in, shared.bias + unit.channel, live, dt);
  gate<T>(in, z, g);
  store_row8(shared.dt[unit.step] + unit.channel, dt);
  store_row8(shared.dtu[unit.step] + unit.channel, g);
  entries.store(of_matrix, shared.B[0], shared.C[0]);
}

template <DType T, class S>
__global__ void __launch_bounds__(kForwardThreads, 4)
    selective_scan_reverse_kernel(const __grid_constant__ ReverseArgs args) {
  const Inputs& in = args.in;
  const int64_t slot = block_index() % in.cut.slots, index = block_index() / in.cut.slots;
  const ChannelTile tile = channel_tile(in.cut, index, kForwardChannels);
  if (tile.begin >= in.d) return;
  const Segment segment = segment_of(in, slot);
  if (!segment.there || segment.first) return;  // nothing comes before
  const Patch<S, kForwardPairs> patch(in, tile);
  auto& shared = block_shared<ForwardShared<S>>();
  const Unit unit = unit_of<kForwardSteps, kForwardChannels>(in, thread_index(), tile);
  const Entries<T, S> entries(in, tile, segment.batch);
  stage_parameter<kForwardChannels>(in.bias, tile, shared.bias);
  const Pair<S> A = load_decays<S>(in, patch);
  Pair<S> C = load_invariant<S>(in.C, in, patch), carry = {};
  each<S>([&](int c, int j) { C.of[c][j] = scaled(Kind<S>::kOutput, C.of[c][j]); });
  sync_block();
  float time = 0.0f;
  const int64_t first = segment.begin / kForwardSteps * kForwardSteps;
#pragma unroll 1
  for (int64_t step = (segment.end - 1) / kForwardSteps * kForwardSteps; step >= first;
       step -= kForwardSteps) {
    stage_reverse<T, S>(args, shared, tile, unit, entries, segment, step);
    sync_block();
#pragma unroll 2
    for (int t = kForwardSteps - 1; t >= 0; --t) {
      float dt[2], g[2];
      memcpy(dt, shared.dt[t] + 2 * patch.pair, sizeof dt);
      memcpy(g, shared.dtu[t] + 2 * patch.pair, sizeof g);
      take_row<S, false>(in.C, shared.C[t] + patch.state, C);
      each<S>([&](int c, int j) {
        const S G = plus_scaled(g[c], conj(C.of[c][j]), carry.of[c][j]);
        carry.of[c][j] = mul(conj(decay(dt[c], A.of[c][j])), G);
      });
    }
    if (thread_index() < kForwardChannels) time += sum_steps(shared.dt);
    sync_block();
  }
  store_pair<S>(const_cast<S*>(transposed_row<S>(args.local, in, slot)), patch, 1, in.d, carry);
  store_time(args.time, in, tile, slot, time);
}

constexpr int kChainThreads = 128;

// A thread takes one state of a channel through a sequence's segments.
template <class S>
__global__ void __launch_bounds__(kChainThreads)
    selective_scan_chain_kernel(const __grid_constant__ ChainArgs args) {
  constexpr int kAtOnce = 8;  // loads under way
  const Inputs& in = args.in;
  const int64_t index = block_index() * kChainThreads + thread_index(), size = in.n * in.d;
  const int64_t sequence = index / size, state = index % size / in.d, channel = index % in.d;
  if (sequence >= in.sequences) return;
  int64_t slot, pieces;
  if (in.cu_seqlens) {
    const int64_t start = in.cu_seqlens[sequence], stop = in.cu_seqlens[sequence + 1];
    slot = first_slot(in, sequence);
    pieces = stop > start ? (stop - 1) / in.cut.split - start / in.cut.split + 1 : 1;
  } else {
    pieces = ceil_div(in.L, in.cut.split);
    slot = sequence * pieces;
  }
  const int direction = args.reverse ? -1 : 1;
  if (args.reverse) slot += pieces - 1;
  const int64_t place = channel * in.n + state;
  const S A = held(static_cast<const S*>(in.A)[place]);
  S x = {};
  if (args.firsts) x = static_cast<const S*>(args.firsts)[sequence * size + place];
  S* states = static_cast<S*>(args.states) + state * in.d + channel;
#pragma unroll 1
  for (int64_t done = 0; done < pieces; done += kAtOnce) {
    S local[kAtOnce];
    float time[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t at = slot + (done + i) * direction;
      const bool there = done + i + 1 < pieces;  // of the last one nothing is known, nor needed
      local[i] = there ? states[at * size] : S{};
      time[i] = there ? args.time[at * in.d + channel] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (done + i >= pieces) continue;
      states[(slot + (done + i) * direction) * size] = x;
      const S a = decay(time[i], A);
      x = add(mul(args.reverse ? conj(a) : a, x), local[i]);
    }
  }
}

}  // namespace kexue::selective
