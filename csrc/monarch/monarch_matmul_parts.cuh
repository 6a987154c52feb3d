// What monarch_matmul's kernels on Hopper share: their arguments, and what walkers do after a
// product. A walker is a warp group; its sums [8 blocks, 64 outputs, rows] are a product's, outputs
// first.
#pragma once

#include "common/hopper.cuh"
#include "monarch/monarch_cluster.h"

namespace kexue::monarch {

using hopper::Barrier;

constexpr int kGroup = 128, kGroupWarps = kGroup / 32;  // threads and warps of a warp group
constexpr int kClusterThreads = (kWalkers + 1) * kGroup;
// Registers of a thread: 168 of each when the block starts, all that there are.
constexpr int kLoaderRegisters = 40, kWalkerRegisters = 232;
static_assert(kLoaderRegisters + kWalkers * kWalkerRegisters <= 3 * 168);

template <int kRows>
using Sums = float[kTogether][kRows / 2];  // a thread's part

struct ClusterArgs {
  hopper::TensorMap x;  // [1, N, k p]
  ClusterSizes sizes;
  const void *w1, *w2;
  const void* bias;  // [s l] or null
  void* y;           // [N, s l]
};

template <int kPart>
KEXUE_DEVICE void pin(float (&sums)[kTogether][kPart]) {
#pragma unroll
  for (int j = 0; j < kTogether; ++j) hopper::pin(sums[j]);
}

// ---- numbers

template <DType T>
KEXUE_DEVICE uint32_t halves(float low, float high) {
  return T == DType::bf16 ? bfloats_of_floats(low, high) : halves_of_floats(low, high);
}
template <DType T>
KEXUE_DEVICE void floats(uint32_t x, float& low, float& high) {
  if (T == DType::bf16) {
    low = float_of_bits(x << 16), high = float_of_bits(x & 0xffff0000u);
  } else {
    floats_of_halves(x, low, high);
  }
}

// ---- walkers

// Box i, since the beginning, goes to stage i % kStages, whose barriers are then in phase
// i / kStages.
template <int kStages>
KEXUE_DEVICE int stage_of(int i) {
  return i % kStages;
}
template <int kStages>
KEXUE_DEVICE int parity_of(int i) {
  return i / kStages % 2;
}

// All that this warp's products read of the stage is read.
KEXUE_DEVICE void release(Barrier& empty) {
  if (thread_index() % 32 == 0) hopper::arrive(empty);
}

// All threads of this walker are done: tell every block of the cluster.
KEXUE_DEVICE void tell_cluster(Barrier& barrier, int walker, int blocks) {
  hopper::sync_some(1 + walker, kGroup);
  const int thread = thread_index() % kGroup;
  if (thread < blocks) {
    hopper::arrive_remote(hopper::address_in(hopper::shared_address(&barrier), thread));
  }
}

// Sums of blocks j0 to j0 + 7 of w2, outputs from e0 on, rows from row0 on, to y.
template <DType T, int kRows>
KEXUE_DEVICE void store_rows(const Sums<kRows>& sums, const ClusterArgs& args, int row0, int j0,
                             int e0) {
  const ClusterSizes& sizes = args.sizes;
  const int thread = thread_index() % kGroup;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int e = e0 + hopper::fragment_row(thread, half * 2);
    if (e >= sizes.s) continue;
    const int feature = e * sizes.l + j0;
    Pack bias = {};
    if (args.bias) bias = load_pack(static_cast<const uint16_t*>(args.bias) + feature);
    float plus[kTogether];
#pragma unroll
    for (int word = 0; word < kTogether / 2; ++word) {
      floats<T>(bias.word[word], plus[word * 2], plus[word * 2 + 1]);
    }
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) {
      const int row = row0 + hopper::fragment_column(thread, i);
      if (i / 2 % 2 != half || row >= sizes.N) continue;
      Pack y;
#pragma unroll
      for (int word = 0; word < kTogether / 2; ++word) {
        const int j = word * 2;
        y.word[word] = halves<T>(sums[j][i] + plus[j], sums[j + 1][i] + plus[j + 1]);
      }
      const int64_t at = int64_t(row) * sizes.s * sizes.l + feature;
      store_pack(static_cast<uint16_t*>(args.y) + at, y);
    }
  }
}

}  // namespace kexue::monarch
