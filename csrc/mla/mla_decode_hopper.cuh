// mla_decode for 64 and more queries of a sequence, on Hopper: softmax(q k^T) v over a paged cache
// whose rows of 576 are the keys and, by their first 512 columns, the values.
//
// A thread block holds 64 queries and walks over its keys in blocks of 64, of which shared memory
// has room for two: while one is multiplied the next is loaded. Three parties:
//
//   loader    (one warp)        brings a block in as 9 tiles of 64 channels, by the copy engine
//   weigher   (one warp group)  scores S = Q K^T, weights P = exp2(S - max), output columns 0..255
//   follower  (one warp group)  output columns 256..511
//
// The [64, 512] float32 output fills the registers of two warp groups (128 of each thread). The
// weigher multiplies the weights out of its own registers, 16 keys as soon as they are ready, and
// leaves them for the follower in shared memory: where tile 8 was, the keys' last 64 channels,
// which no value has and which are done with once S is there. What goes round:
//
//   full[stage][tile]   loader -> weigher, follower: the tile has arrived
//   weighed[stage]      weigher -> follower: weights and rescaling factors lie in shared memory
//   empty[stage][half]  weigher (tiles 0 to 3), follower (4 to 8) -> loader: may be overwritten
#pragma once

#include "mla/mla_decode_parts.cuh"

namespace kexue::mla {

// ---- the weigher

// S = Q K^T, tile by tile as they arrive.
template <DType T>
KEXUE_DEVICE void multiply_keys(float (&scores)[kScores], DecodeShared& shared, int i) {
  const int stage = stage_of(i);
  const uint32_t q = hopper::shared_address(shared.q);
  const uint32_t k = hopper::shared_address(shared.kv[stage]);
  hopper::pin(scores);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    hopper::await(shared.full[stage][tile], parity_of(i));
    hopper::begin_products();
#pragma unroll
    for (int step = 0; step < hopper::kSteps; ++step) {
      hopper::Products<T>::scores(scores, hopper::across_channels(q + tile * kTileBytes, step),
                                  hopper::across_channels(k + tile * kTileBytes, step),
                                  tile + step > 0);
    }
  }
  hopper::commit_products();
  hopper::await_products();
  hopper::pin(scores);
}

// The softmax of a thread's two rows as it goes; in powers of 2. `total` has the thread's columns.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
};

KEXUE_DEVICE float over_row(float x, bool largest) {  // four neighbours share a row
#pragma unroll
  for (int lane = 1; lane < 4; lane *= 2) {
    const float other = shuffle_xor(x, lane);
    x = largest ? fmaxf(x, other) : x + other;
  }
  return x;
}

// Scores, scaled, -inf where they are of keys that the row may not see; then the rows' new tops.
// Returns in `kept` what the old output is worth beside the new.
KEXUE_DEVICE void raise_top(float (&scores)[kScores], Softmax& softmax, float (&kept)[2],
                            float scale, bool masked, const int (&visible)[2]) {
  float top[2] = {softmax.top[0], softmax.top[1]};
#pragma unroll
  for (int k = 0; k < kScores; ++k) {
    const int column = hopper::fragment_column(thread_index(), k), row = k / 2 % 2;
    scores[k] = masked && column >= visible[row] ? -INFINITY : scores[k] * scale;
    top[row] = fmaxf(top[row], scores[k]);
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float raised = over_row(top[row], true);
    const float base = raised == -INFINITY ? 0.0f : raised;
    kept[row] = exp2_approx(softmax.top[row] - base);
    softmax.top[row] = raised;
    softmax.total[row] *= kept[row];
  }
}

// P, 16 keys at a time: each step's weights go to shared memory and to the tensor cores. `done` is
// called before the last product starts, when all weights are in shared memory.
template <DType T, class Done>
KEXUE_DEVICE void multiply_weights(float (&out)[kColumns], const float (&scores)[kScores],
                                   Softmax& softmax, uint8_t (*kv)[kTileBytes], Done done) {
  const int thread = thread_index();
  const uint32_t values = hopper::shared_address(kv);
  const float base[2] = {softmax.top[0] == -INFINITY ? 0.0f : softmax.top[0],
                         softmax.top[1] == -INFINITY ? 0.0f : softmax.top[1]};
  hopper::pin(out);
#pragma unroll
  for (int step = 0; step < hopper::kSteps; ++step) {
    uint32_t weights[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      const int k = step * 8 + pair * 2, row = pair % 2;
      const float low = exp2_approx(scores[k] - base[row]);
      const float high = exp2_approx(scores[k + 1] - base[row]);
      softmax.total[row] += low + high;
      weights[pair] = halves<T>(low, high);
      const uint32_t at =
          hopper::tile_offset(hopper::fragment_row(thread, k), hopper::fragment_column(thread, k));
      hopper::store_word(kv[kWeights] + at, weights[pair]);
    }
    if (step == hopper::kSteps - 1) done();
    hopper::begin_products();
    hopper::Products<T>::values(out, weights, hopper::across_rows(values, step));
  }
  hopper::commit_products();
  hopper::await_products();
  hopper::pin(out);
}

// The sums over whole rows, and their logarithms with the tops.
KEXUE_DEVICE void close_rows(const DecodeArgs& args, const Work& work, const Softmax& softmax,
                             DecodeShared& shared, float (&inverse)[2]) {
  constexpr float kLn2 = 0.6931471805599453f;
  const DecodeSizes& sizes = args.sizes;
  const int thread = thread_index();
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float total = over_row(softmax.total[row], false);
    inverse[row] = total == 0.0f ? 0.0f : 1.0f / total;
    const int r = hopper::fragment_row(thread, row * 2), m = work.query + r;
    if (thread % 4 != 0) continue;
    shared.inverse[r] = inverse[row];
    if (m >= sizes.Tq * sizes.H) continue;
    const int64_t at = (int64_t(work.split) * sizes.B + work.b) * sizes.H + m % sizes.H;
    args.lse[at * sizes.Tq + m / sizes.H] =
        total == 0.0f ? -INFINITY : (softmax.top[row] + log2f(total)) * kLn2;
  }
}

template <DType T>
KEXUE_DEVICE void weigh(const DecodeArgs& args, const Work& work, DecodeShared& shared) {
  const int thread = thread_index();
  int ends[2];  // of the keys that this thread's rows see
  for (int row = 0; row < 2; ++row) {
    const int m = work.query + hopper::fragment_row(thread, row * 2);
    ends[row] = visible_end(args.sizes, work, m);
  }
  const int all_see = visible_end(args.sizes, work, work.query);
  float out[kColumns] = {}, inverse[2];
  Softmax softmax;
  for (int i = 0; i < key_blocks(work); ++i) {
    const int stage = stage_of(i), first = work.begin + i * kKeys;
    uint8_t(*kv)[kTileBytes] = shared.kv[stage];
    float scores[kScores], kept[2];
    multiply_keys<T>(scores, shared, i);
    hopper::sync_some(kOfWeigher, kGroup);  // every warp has S: tile 8 may go
    if (work.end - first < kKeys) clear_values(kv, work.end - first, kOfWeigher);
    const int visible[2] = {ends[0] - first, ends[1] - first};
    raise_top(scores, softmax, kept, args.scale, all_see - first < kKeys, visible);
    if (thread % 4 == 0) {
      for (int row = 0; row < 2; ++row) {
        shared.kept[stage][hopper::fragment_row(thread, row * 2)] = kept[row];
      }
    }
    rescale(out, kept);
    multiply_weights<T>(out, scores, softmax, kv, [&] {
      hopper::fence_proxy();
      hopper::arrive(shared.weighed[stage]);
    });
    release(shared.empty[stage][0]);
  }
  close_rows(args, work, softmax, shared, inverse);
  hopper::sync_some(kBoth, 2 * kGroup);  // the follower reads shared.inverse
  store_output<T>(args, work, out, inverse, 0);
}

// ---- the follower

template <DType T>
KEXUE_DEVICE void follow(const DecodeArgs& args, const Work& work, DecodeShared& shared) {
  const int thread = thread_index() % kGroup;
  const int rows[2] = {hopper::fragment_row(thread, 0), hopper::fragment_row(thread, 2)};
  float out[kColumns] = {};
  for (int i = 0; i < key_blocks(work); ++i) {
    const int stage = stage_of(i), first = work.begin + i * kKeys;
    uint8_t(*values)[kTileBytes] = shared.kv[stage] + kHalfTiles;
    for (int tile = kHalfTiles; tile < 2 * kHalfTiles; ++tile) {
      hopper::await(shared.full[stage][tile], parity_of(i));
    }
    hopper::await(shared.weighed[stage], parity_of(i));
    if (work.end - first < kKeys) clear_values(values, work.end - first, kOfFollower);
    const float kept[2] = {shared.kept[stage][rows[0]], shared.kept[stage][rows[1]]};
    rescale(out, kept);
    const uint32_t b = hopper::shared_address(values);
    const uint32_t a = hopper::shared_address(shared.kv[stage][kWeights]);
    hopper::pin(out);
    hopper::begin_products();
#pragma unroll
    for (int step = 0; step < hopper::kSteps; ++step) {
      hopper::Products<T>::values(out, hopper::across_channels(a, step),
                                  hopper::across_rows(b, step));
    }
    hopper::commit_products();
    hopper::await_products();
    hopper::pin(out);
    release(shared.empty[stage][1]);
  }
  hopper::sync_some(kBoth, 2 * kGroup);
  const float inverse[2] = {shared.inverse[rows[0]], shared.inverse[rows[1]]};
  store_output<T>(args, work, out, inverse, 1);
}

template <DType T>
__global__ void __launch_bounds__(kDecodeThreads, 1)
    mla_decode_hopper_kernel(const __grid_constant__ DecodeArgs args) {
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  DecodeShared& shared = hopper::aligned_shared<DecodeShared>();
  const Work work = work_of(args.sizes, block_index(), args.seqlens);
  if (thread_index() == 0) init_barriers(shared);
  sync_block();
  const int warp = hopper::warp_index(), group = warp / kGroupWarps;
  if (group == 2) {
    hopper::give_registers<kLoaderRegisters>();
    if (warp == 2 * kGroupWarps) load_keys(args, work, shared);
  } else {
    hopper::take_registers<kGroupRegisters>();
    load_queries(args, work, shared);
    hopper::sync_some(kBoth, 2 * kGroup);
    if (group == 0) {
      weigh<T>(args, work, shared);
    } else {
      follow<T>(args, work, shared);
    }
  }
#elif defined(__CUDA_ARCH__)
  __trap();  // of other architectures: never launched
#endif
}

}  // namespace kexue::mla
