// The backward kernel of selective_scan. A block of 128 threads takes 64 channels and up to 16
// states (8 complex ones) from the end of a segment to its beginning, a span of 32 steps at a time;
// a warp's lanes differ in channels alone. For 16 steps the states are made again from a checkpoint
// and kept in shared memory; then, against time,
//
//   G_t = conj(C_t) g_t + s_{t+1},  s_t = conj(a_t) G_t,  with s past the last step = grad_final
//
// A warp's sums over channels, of dB and dC of four steps, are 32 numbers of each lane: five rounds
// of exchanges leave every lane with one sum. Block after block they go to memory, to be added in
// a fixed order, as do the sums over steps.
#pragma once

#include "scan/selective_scan_backward_block.cuh"

namespace kexue::selective {

// What a thread carries through its segments.
template <class S>
struct BackwardSums {
  Pair<S> A, B, C;
  float parameter;  // D's, in the first half of the threads, or delta_bias's, of a channel
};

template <class S>
KEXUE_DEVICE void add_steps(BackwardShared<S>& shared, int piece, BackwardSums<S>& sums) {
  const int half = thread_index() / kBackwardChannels;
  const auto& plane = half ? shared.dt : shared.dtu;
  float sum = 0.0f;
#pragma unroll 4
  for (int t = piece; t < piece + kPiece; ++t) {
    sum += plane[t][thread_index() % kBackwardChannels];
  }
  sums.parameter += sum;
}

// Forward through kQuad steps of a span. KEEP: leaves in shared memory what enters them.
template <bool KEEP, bool PER_STEP, class S>
KEXUE_DEVICE void walk(const Inputs& in, BackwardShared<S>& shared,
                       const Patch<S, kBackwardPairs>& patch, int first, const Pair<S>& A,
                       Pair<S>& B, Pair<S>& x) {
#pragma unroll
  for (int i = 0; i < kQuad; ++i) {
    const int t = first + i;
    if (KEEP) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        Pack pack;
        memcpy(&pack, x.of[c], sizeof pack);
        store_pack(shared.held[t % kPiece][c][thread_index()], pack);
      }
    }
    float dt[2], dtu[2];
    memcpy(dt, shared.dt[t] + 2 * patch.pair, sizeof dt);
    memcpy(dtu, shared.dtu[t] + 2 * patch.pair, sizeof dtu);
    take_row<S, PER_STEP>(in.B, shared.B[t] + patch.state, B);
    each<S>([&](int c, int j) {
      S& state = x.of[c][j];
      state = product_plus(decay(dt[c], A.of[c][j]), state, scaled(dtu[c], B.of[c][j]));
    });
  }
}

// Sums over the lanes of a warp: lane i returns that of value[i], modulo what there are.
template <int COUNT>
KEXUE_DEVICE float sum_transposed(const float (&value)[COUNT]) {
  if constexpr (COUNT == 1) {
    return value[0];
  } else {
    constexpr int kHalf = COUNT / 2;
    const bool upper = thread_index() & kHalf;
    float half[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float keep = upper ? value[i + kHalf] : value[i];
      const float give = upper ? value[i] : value[i + kHalf];
      half[i] = keep + shuffle_xor(give, kHalf);
    }
    return sum_transposed(half);
  }
}

// Of dB and dC of a quad's steps, kHeld numbers a step, lane i has in the end the i-th sum. All
// are summed at once where registers allow.
template <bool AT_ONCE>
struct QuadSums {
  float value[AT_ONCE ? kWarp : 1];

  KEXUE_DEVICE void take(int step, const float (&some)[kHeld]) {
    if constexpr (AT_ONCE) {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) value[step * kHeld + k] = some[k];
    } else {
      float sum = sum_transposed(some);
      sum += shuffle_xor(sum, 8);
      sum += shuffle_xor(sum, 16);
      if (thread_index() % kWarp / kHeld == step) value[0] = sum;
    }
  }

  KEXUE_DEVICE float own() const { return sum_transposed(value); }
};

// What the states that a thread has at some moment of its way back are.
template <class S>
struct Way {
  Pair<S> x;      // after the step
  Pair<S> carry;  // s of the step after
};

// Back through kQuad steps.
template <bool PER_STEP, class S>
KEXUE_DEVICE void go_back(const Inputs& in, BackwardShared<S>& shared,
                          const Patch<S, kBackwardPairs>& patch, int first, const Pair<S>& A,
                          Pair<S>& B, Pair<S>& C, Way<S>& way, BackwardSums<S>& sums,
                          QuadSums<PER_STEP>& quad) {
  constexpr int kStates = Kind<S>::kStates, kParts = Kind<S>::kParts;
#pragma unroll
  for (int i = kQuad - 1; i >= 0; --i) {
    if (!PER_STEP) settle();
    const int t = first + i;
    float dt[2], dtu[2], g[2], y[2] = {}, p[2] = {}, q[2] = {};
    memcpy(dt, shared.dt[t] + 2 * patch.pair, sizeof dt);
    memcpy(dtu, shared.dtu[t] + 2 * patch.pair, sizeof dtu);
    memcpy(g, shared.g[t] + 2 * patch.pair, sizeof g);
    take_row<S, PER_STEP>(in.B, shared.B[t] + patch.state, B);
    take_row<S, PER_STEP>(in.C, shared.C[t] + patch.state, C);
    Pair<S> before;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const Pack pack = load_pack(shared.held[t % kPiece][c][thread_index()]);
      memcpy(before.of[c], &pack, sizeof pack);
    }
    S grad_B[kStates] = {}, grad_C[kStates] = {};
    each<S>([&](int c, int j) {
      const S a = decay(dt[c], A.of[c][j]);
      const S G = plus_scaled(g[c], conj(C.of[c][j]), way.carry.of[c][j]);
      const S x = way.x.of[c][j], previous = before.of[c][j];
      y[c] = plus_real_of_product(C.of[c][j], x, y[c]);
      p[c] = plus_real_of_product(conj(B.of[c][j]), G, p[c]);
      grad_C[j] = plus_scaled(g[c], conj(x), grad_C[j]);
      grad_B[j] = plus_scaled(dtu[c], G, grad_B[j]);
      if (!PER_STEP) {
        sums.C.of[c][j] = plus_scaled(g[c], conj(x), sums.C.of[c][j]);
        sums.B.of[c][j] = plus_scaled(dtu[c], G, sums.B.of[c][j]);
      }
      const S carry = mul(conj(a), G), through = mul(conj(previous), carry);
      q[c] = plus_real_of_product(conj(A.of[c][j]), through, q[c]);
      sums.A.of[c][j] = plus_scaled(dt[c], through, sums.A.of[c][j]);
      way.carry.of[c][j] = carry;
      way.x.of[c][j] = previous;
    });
    float some[kHeld];  // summed over the thread's channels
#pragma unroll
    for (int k = 0; k < kHeld / 2; ++k) {
      some[k] = part(grad_B[k / kParts], k % kParts);
      some[k + kHeld / 2] = part(grad_C[k / kParts], k % kParts);
    }
    if (PER_STEP || in.B.channels || in.C.channels) quad.take(i, some);
    const float both[4] = {y[0], y[1], p[0], p[1]};
    store_floats(shared.held[t % kPiece][0][thread_index()], both);
    memcpy(shared.held[t % kPiece][1][thread_index()], q, sizeof q);
  }
}

// A lane's sum of QuadSums.
template <class S>
KEXUE_DEVICE void store_sum(const BackwardArgs& args, const ChannelTile& tile,
                            const Patch<S, kBackwardPairs>& patch, const Stretch& stretch,
                            int64_t batch, int64_t first, float sum) {
  constexpr int kParts = Kind<S>::kParts;
  const Inputs& in = args.in;
  const int lane = thread_index() % kWarp, number = lane % (kHeld / 2);
  const bool of_C = lane % kHeld >= kHeld / 2;
  const int64_t t = first + lane / kHeld, state = patch.state + number / kParts;
  if (t < stretch.begin || t >= stretch.end || state >= in.states) return;
  if (!(of_C ? in.C : in.B).channels) return;
  const int64_t row = (batch * in.L + t) * args.tiles + tile.index;
  float* to = static_cast<float*>(of_C ? args.C : args.B);
  to[(row * in.states + state) * kParts + number % kParts] =
      of_C ? Kind<S>::kOutput * sum : sum;
}

// The steps of a span from the last to the first.
template <DType T, class S, bool PER_STEP>
KEXUE_DEVICE void span_back(const BackwardBlock<T, S>& block,
                            const Patch<S, kBackwardPairs>& patch, const Stretch& stretch,
                            int64_t step, const Pair<S>& A, Pair<S>& B, Pair<S>& C,
                            const Pair<S>& entering, Way<S>& way, BackwardSums<S>& sums) {
  const Inputs& in = block.in;
  BackwardShared<S>& shared = block.shared;
  const bool idle = patch.warp_is_idle(in);
#pragma unroll 1
  for (int piece = kSpan - kPiece; piece >= 0; piece -= kPiece) {
    const Quads all = quads_of(step, kSpan, stretch);
    const int middle = piece / kQuad, stop = middle + kPiece / kQuad;
    const int low = all.begin > middle ? all.begin : middle;
    const int live = all.end < stop ? all.end : stop, high = idle ? low : live;
    if (low >= live) continue;
    way.x = entering;
#pragma unroll 1
    for (int quad = all.begin; quad < (idle ? 0 : low); ++quad) {
      walk<false, PER_STEP, S>(in, shared, patch, quad * kQuad, A, B, way.x);
    }
#pragma unroll 1
    for (int quad = low; quad < high; ++quad) {
      walk<true, PER_STEP, S>(in, shared, patch, quad * kQuad, A, B, way.x);
    }
#pragma unroll 1
    for (int quad = high - 1; quad >= low; --quad) {
      QuadSums<PER_STEP> of_quad = {};
      go_back<PER_STEP, S>(in, shared, patch, quad * kQuad, A, B, C, way, sums, of_quad);
      if (PER_STEP || in.B.channels || in.C.channels) {
        store_sum<S>(block.args, block.tile, patch, stretch, block.segment.batch,
                     step + quad * kQuad, of_quad.own());
      }
    }
    sync_block();
    block.finish(stretch, step, piece);
    sync_block();
    if (block.args.finish) add_steps(shared, piece, sums);
  }
}

// The state that enters a segment's steps of a chunk.
template <class S>
KEXUE_DEVICE Pair<S> load_entering(const BackwardArgs& args,
                                   const Patch<S, kBackwardPairs>& patch, const Segment& segment,
                                   int64_t chunk, bool from_checkpoint) {
  const Inputs& in = args.in;
  if (!from_checkpoint) {
    return load_pair<S>(matrix_row<S>(in.initial, in, segment.sequence), patch, in.n, 1);
  }
  const int64_t place = segment.batch * ceil_div(in.L, in.chunk) + chunk;
  return load_pair<S>(transposed_row<S>(args.checkpoints, in, place), patch, 1, in.d);
}

template <DType T, class S, bool PER_STEP>
KEXUE_DEVICE void chunk_back(const BackwardBlock<T, S>& block,
                             const Patch<S, kBackwardPairs>& patch, int64_t chunk,
                             const Pair<S>& A, Pair<S>& B, Pair<S>& C, Way<S>& way,
                             BackwardSums<S>& sums) {
  const Inputs& in = block.in;
  const Segment& segment = block.segment;
  const int64_t start = chunk * in.chunk, stop = start + in.chunk;
  const Stretch stretch = {segment.begin > start ? segment.begin : start,
                           segment.end < stop ? segment.end : stop};
  const int64_t from = stretch.begin / kSpan * kSpan, last = (stretch.end - 1) / kSpan * kSpan;
  const bool idle = patch.warp_is_idle(in);
#pragma unroll 1
  for (int64_t step = last; step >= from; step -= kSpan) {
    Pair<S> x = load_entering<S>(block.args, patch, segment, chunk, segment.begin <= start);
#pragma unroll 1
    for (int64_t before = from; before < step; before += kSpan) {
      sync_block();
      block.stage(stretch, before, false);
      sync_block();
      const Quads quads = quads_of(before, kSpan, stretch);
#pragma unroll 1
      for (int quad = quads.begin; quad < (idle ? 0 : quads.end); ++quad) {
        walk<false, PER_STEP, S>(in, block.shared, patch, quad * kQuad, A, B, x);
      }
    }
    sync_block();
    block.stage(stretch, step, true);
    block.fetch(segment, step - kSpan);
    sync_block();
    span_back<T, S, PER_STEP>(block, patch, stretch, step, A, B, C, x, way, sums);
  }
}

template <class S>
KEXUE_DEVICE void store_sums(const BackwardArgs& args, const ChannelTile& tile,
                             const Patch<S, kBackwardPairs>& patch, int64_t row,
                             const BackwardSums<S>& sums) {
  const Inputs& in = args.in;
  const auto place = [&](void* data) {
    return const_cast<S*>(transposed_row<S>(data, in, row));
  };
  store_pair<S>(place(args.A), patch, 1, in.d, sums.A);
  if (!in.B.channels) store_pair<S>(place(args.B), patch, 1, in.d, sums.B);
  if (!in.C.channels) {
    Pair<S> C = sums.C;
    each<S>([&](int c, int j) { C.of[c][j] = scaled(Kind<S>::kOutput, C.of[c][j]); });
    store_pair<S>(place(args.C), patch, 1, in.d, C);
  }
  if (!args.finish) return;
  const int64_t channel = tile.begin + thread_index() % kBackwardChannels;
  float* to = thread_index() < kBackwardChannels ? args.D : args.bias;
  if (channel < tile.end) to[row * in.d + channel] = sums.parameter;
}

template <DType T, class S, bool PER_STEP>
__global__ void __launch_bounds__(kBackwardThreads, 2)
    selective_scan_backward_kernel(const __grid_constant__ BackwardArgs args) {
  const Inputs& in = args.in;
  const int64_t row = block_index() % in.cut.rows, index = block_index() / in.cut.rows;
  const ChannelTile tile = channel_tile(in.cut, index, kBackwardChannels);
  if (tile.begin >= in.d) return;
  const Patch<S, kBackwardPairs> patch(in, tile);
  auto& shared = *reinterpret_cast<BackwardShared<S>*>(launch_shared());
  const Unit unit = unit_of<kPiece, kBackwardChannels>(in, thread_index(), tile);
  stage_parameter<kBackwardChannels>(in.D, tile, shared.D);
  stage_parameter<kBackwardChannels>(in.bias, tile, shared.bias);
  const Pair<S> A = load_decays<S>(in, patch);
  Pair<S> B = load_invariant<S>(in.B, in, patch), C = load_invariant<S>(in.C, in, patch);
  each<S>([&](int c, int j) { C.of[c][j] = scaled(Kind<S>::kOutput, C.of[c][j]); });
  BackwardSums<S> sums = {};

#pragma unroll 1
  for (int64_t slot = row; slot < in.cut.slots; slot += in.cut.rows) {
    const Segment segment = segment_of(in, slot);
    if (!segment.there) continue;
    Way<S> way = {};
    if (args.entering) {
      way.carry = load_pair<S>(transposed_row<S>(args.entering, in, slot), patch, 1, in.d);
    } else {
      const S* grad = matrix_row<S>(args.grad_final, in, segment.sequence);
      way.carry = load_pair<S>(grad, patch, in.n, 1);
    }
    if (segment.begin < segment.end) {
      const BackwardBlock<T, S> block(args, tile, unit, segment, shared);
      const int64_t first = segment.begin / in.chunk;
#pragma unroll 1
      for (int64_t chunk = (segment.end - 1) / in.chunk; chunk >= first; --chunk) {
        chunk_back<T, S, PER_STEP>(block, patch, chunk, A, B, C, way, sums);
      }
    }
    if (segment.first) {
      S* initial = const_cast<S*>(matrix_row<S>(args.initial, in, segment.sequence));
      store_pair<S>(initial, patch, in.n, 1, way.carry);
    }
  }
  store_sums<S>(args, tile, patch, row, sums);
}

}  // namespace kexue::selective
