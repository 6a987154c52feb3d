// The kernels of linear_scan: every element is read once and written once, 16 bytes at a time
// where strides and alignment allow (VECTOR), else element by element.
//
// Estimates, not measured. Loads in flight on an SM of 65536 registers, at 128 a thread (16
// warps): forward 2 x 8 Packs a thread = 128 KiB, backward 3 x 4 = 96 KiB; 4.8 TB/s x 0.8 us / 132
// SMs = 29 KB cover the latency, the rest the time a tile spends after its loads. [1, 2^20, 64] in
// float32 at 70% of 4.8 TB/s passes 17 tiles of 256 steps a microsecond along each of two chains,
// so a span of them in 15 us; the state that leaves it takes 2 us (a flag, records, a flag).
#pragma once

#include "scan/linear_scan_chain.cuh"

namespace kexue {

// Steps a thread holds in registers.
constexpr int kForwardSteps = 8;
constexpr int kBackwardSteps = 4;

struct ForwardArgs {
  LinearScanForward call;
  Tiling tiling;
};

struct BackwardArgs {
  LinearScanBackward call;
  Tiling tiling;
  bool partial;  // grad_a takes a row of sums from each tile: [B, chunks, D] states
};

// A thread's part of a tile.
struct Slice {
  int64_t batch, channel;
  int64_t row;   // of the first step
  int direction;  // to the row of the next step
  int steps;     // that exist, of those the thread has registers for
  int live;      // channels that exist
  bool last;     // the sequence's last step (or, in an empty sequence, its only say) is here
};

template <DType T, bool VECTOR, int R>
KEXUE_DEVICE Slice slice_of(const Tile& tile, int64_t D, bool from_end) {
  Slice slice;
  const int64_t done = tile.chunk * (group_count() * R) + group_index() * R;
  const int64_t left = tile.length - done;
  slice.steps = left <= 0 ? 0 : left < R ? int(left) : R;
  slice.last = left == slice.steps && (slice.steps > 0 || done == 0);
  slice.direction = from_end ? -1 : 1;
  slice.row = tile.first + slice.direction * done;
  slice.batch = tile.batch;
  slice.channel = tile.channel + vector_index() * (VECTOR ? kChannels<T> : 1);
  const int64_t beyond = D - slice.channel;
  const int64_t live = (beyond + kGap<VECTOR> - 1) / kGap<VECTOR>;
  slice.live = beyond <= 0 ? 0 : live < kChannels<T> ? int(live) : kChannels<T>;
  return slice;
}

// R rows of x, from `skip` steps on; `fill` where there are none.
template <DType T, bool VECTOR, int R>
KEXUE_DEVICE void load_rows(const Strided& x, const Slice& slice, int skip, int steps, Pack fill,
                            Pack (&rows)[R]) {
  const int64_t delta = slice.direction * x.step;
  const auto* p = static_cast<const StoredOf<T>*>(x.data) + slice.batch * x.batch +
                  (slice.row + skip * slice.direction) * x.step + slice.channel * x.channel;
  if (VECTOR && x.channel == 0) {
#pragma unroll
    for (int r = 0; r < R; ++r) rows[r] = r < steps && slice.live ? splat<T>(p[r * delta]) : fill;
    return;
  }
  if (delta == 0) {  // time-invariant: one load
    const Pack row = load_row<T, VECTOR>(p, x.channel, steps > 0 ? slice.live : 0, fill);
#pragma unroll
    for (int r = 0; r < R; ++r) rows[r] = r < steps ? row : fill;
    return;
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    rows[r] = load_row<T, VECTOR>(p + r * delta, x.channel, r < steps ? slice.live : 0, fill);
  }
}

// Where a thread's first step lies in a contiguous [B, L, D] output.
template <DType T>
KEXUE_DEVICE StoredOf<T>* output_rows(void* data, const LinearScanShape& shape,
                                      const Slice& slice) {
  return static_cast<StoredOf<T>*>(data) + (slice.batch * shape.L + slice.row) * shape.D +
         slice.channel;
}

// ---- forward

template <DType T, int R>
KEXUE_DEVICE Run<T> forward_run(const Pack (&a)[R], const Pack (&b)[R]) {
  Run<T> run;
#pragma unroll
  for (auto& channel : run.channel) channel = identity<T>();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    StateOf<T> at[kChannels<T>], bt[kChannels<T>];
    Element<T>::unpack(a[r], at);
    Element<T>::unpack(b[r], bt);
#pragma unroll
    for (int k = 0; k < kChannels<T>; ++k) {
      AffineOf<T>& own = run.channel[k];
      own = {mul(at[k], own.a), step(at[k], own.b, bt[k])};
    }
  }
  return run;
}

template <DType T, bool VECTOR>
__global__ void __launch_bounds__(kMaxThreads, 2)
    linear_scan_forward_kernel(const __grid_constant__ ForwardArgs args) {
  constexpr int R = kForwardSteps;
  auto& shared = block_shared<Shared<T>>();
  const LinearScanForward& call = args.call;
  const Tile tile = take_tile<T>(call.shape, args.tiling, call.shape.reverse, shared);
  if (tile.chunk < 0) return;
  const auto slice = slice_of<T, VECTOR, R>(tile, call.shape.D, call.shape.reverse);
  const int64_t state_offset = tile.sequence * call.shape.D + slice.channel;

  Pack a[R], b[R];
  load_rows<T, VECTOR>(call.a, slice, 0, slice.steps, ones<T>(), a);
  load_rows<T, VECTOR>(call.b, slice, 0, slice.steps, Pack{}, b);

  States<T> state = enter<T, VECTOR>(forward_run<T>(a, b), args.tiling.chain, tile, call.initial,
                                     call.shape.D, shared);

  auto* h = output_rows<T>(call.h, call.shape, slice);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    forget(a[r]), forget(b[r]);
    StateOf<T> at[kChannels<T>], bt[kChannels<T>];
    Element<T>::unpack(a[r], at);
    Element<T>::unpack(b[r], bt);
#pragma unroll
    for (int k = 0; k < kChannels<T>; ++k) {
      state.channel[k] = step(at[k], state.channel[k], bt[k]);
    }
    if (r < slice.steps) {
      store_row<T, VECTOR>(h + r * slice.direction * call.shape.D, slice.live,
                           Element<T>::pack(state.channel));
    }
  }
  if (call.final && slice.last) {
    store_states<T, VECTOR>(call.final, state_offset, slice.live, state);
  }
}

// ---- backward

// Travels against the forward. What flows from step to step is s_t = conj(a_t) db_t, with
// db_t = g_t + s_{t+1}: it starts as grad_final and ends as grad_initial.
template <DType T, int R>
KEXUE_DEVICE Run<T> backward_run(const Pack (&a)[R], const Pack (&grad_h)[R]) {
  Run<T> run;
#pragma unroll
  for (auto& channel : run.channel) channel = identity<T>();
#pragma unroll
  for (int r = 0; r < R; ++r) {
    StateOf<T> at[kChannels<T>], gt[kChannels<T>];
    Element<T>::unpack(a[r], at);
    Element<T>::unpack(grad_h[r], gt);
#pragma unroll
    for (int k = 0; k < kChannels<T>; ++k) {
      AffineOf<T>& own = run.channel[k];
      const StateOf<T> decay = conj(at[k]);
      own = {mul(decay, own.a), mul(decay, add(gt[k], own.b))};
    }
  }
  return run;
}

// Sums over a tile's groups, in a fixed order; the first group has the result.
template <DType T>
KEXUE_DEVICE States<T> sum_groups(States<T> own, Shared<T>& shared) {
#pragma unroll
  for (int delta = kVectors; delta < kWarp; delta *= 2) {
    const States<T> below = shuffle_up(own, delta);
#pragma unroll
    for (int k = 0; k < kChannels<T>; ++k) {
      if (lane_index() >= delta) own.channel[k] = add(own.channel[k], below.channel[k]);
    }
  }
  if (lane_index() >= kWarp - kVectors) shared.sums[warp_index()][vector_index()] = own;
  sync_block();
  if (group_index() != 0) return own;
  own = {};
#pragma unroll 1
  for (int warp = 0; warp < thread_count() / kWarp; ++warp) {
#pragma unroll
    for (int k = 0; k < kChannels<T>; ++k) {
      own.channel[k] = add(own.channel[k], shared.sums[warp][vector_index()].channel[k]);
    }
  }
  return own;
}

template <DType T, bool VECTOR>
__global__ void __launch_bounds__(kMaxThreads, 2)
    linear_scan_backward_kernel(const __grid_constant__ BackwardArgs args) {
  constexpr int R = kBackwardSteps;
  auto& shared = block_shared<Shared<T>>();
  const LinearScanBackward& call = args.call;
  const bool from_end = !call.shape.reverse;
  const Tile tile = take_tile<T>(call.shape, args.tiling, from_end, shared);
  const auto slice = slice_of<T, VECTOR, R>(tile, call.shape.D, from_end);
  const int64_t part_offset = tile.part * call.shape.D + slice.channel;
  if (tile.chunk < 0) {
    if (args.partial && tile.part >= 0 && group_index() == 0) {
      store_states<T, VECTOR>(call.grad_a, part_offset, slice.live, States<T>{});
    }
    return;
  }
  const int64_t state_offset = tile.sequence * call.shape.D + slice.channel;

  Pack a[R], grad_h[R], previous[R];
  load_rows<T, VECTOR>(call.a, slice, 0, slice.steps, ones<T>(), a);
  load_rows<T, VECTOR>(call.grad_h, slice, 0, slice.steps, Pack{}, grad_h);
  if (call.grad_a) {  // the h that each step multiplied; the last one's is the initial state
    load_rows<T, VECTOR>(call.h, slice, 1, slice.steps - slice.last, Pack{}, previous);
  }

  States<T> state = enter<T, VECTOR>(backward_run<T>(a, grad_h), args.tiling.chain, tile,
                                     call.grad_final, call.shape.D, shared);

  auto* grad_b = output_rows<T>(call.grad_b, call.shape, slice);
  auto* grad_a = output_rows<T>(call.grad_a, call.shape, slice);
  States<T> sum = {};
#pragma unroll
  for (int r = 0; r < R; ++r) {
    forget(a[r]), forget(grad_h[r]);
    StateOf<T> at[kChannels<T>], gt[kChannels<T>];
    Element<T>::unpack(a[r], at);
    Element<T>::unpack(grad_h[r], gt);
#pragma unroll
    for (int k = 0; k < kChannels<T>; ++k) {
      gt[k] = add(gt[k], state.channel[k]);
      state.channel[k] = mul(conj(at[k]), gt[k]);
    }
    if (r >= slice.steps) continue;
    const int64_t offset = r * slice.direction * call.shape.D;
    store_row<T, VECTOR>(grad_b + offset, slice.live, Element<T>::pack(gt));
    if (!call.grad_a) continue;
    StateOf<T> ht[kChannels<T>];
    Element<T>::unpack(previous[r], ht);
    if (slice.last && r == slice.steps - 1) {
      const auto initial = load_states<T, VECTOR>(call.initial, state_offset, slice.live);
#pragma unroll
      for (int k = 0; k < kChannels<T>; ++k) ht[k] = initial.channel[k];
    }
#pragma unroll
    for (int k = 0; k < kChannels<T>; ++k) {
      ht[k] = mul(gt[k], conj(ht[k]));
      sum.channel[k] = add(sum.channel[k], ht[k]);
    }
    if (!args.partial) store_row<T, VECTOR>(grad_a + offset, slice.live, Element<T>::pack(ht));
  }
  if (call.grad_initial && slice.last) {
    store_states<T, VECTOR>(call.grad_initial, state_offset, slice.live, state);
  }
  if (args.partial) {
    sum = sum_groups(sum, shared);
    if (group_index() == 0) {
      store_states<T, VECTOR>(call.grad_a, part_offset, slice.live, sum);
    }
  }
}

}  // namespace kexue
