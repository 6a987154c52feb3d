// Joins the results of splits: out = sum_s exp(lse_s - lse) out_s, where lse is the logarithm of
// the sum of their exponentials. In the order of the splits, so that it is always the same.
#pragma once

#include "mla/mla_decode_cut.h"
#include "scan/selective_scan_gpu.cuh"

namespace kexue::mla {

struct JoinArgs {
  const float* parts;     // [splits, B, Tq, H, 512]
  const float* part_lse;  // [splits, B, H, Tq]
  void* out;              // [B, Tq, H, 512]
  float* lse;             // [B, H, Tq]
  DecodeSizes sizes;
};

constexpr int kJoinColumns = 4;  // of a thread: 16 bytes of a part
constexpr int kJoinThreads = kValues / kJoinColumns;

template <DType T>
__global__ void __launch_bounds__(kJoinThreads)
    mla_decode_join_kernel(const __grid_constant__ JoinArgs args) {
  constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
  const DecodeSizes& sizes = args.sizes;
  const int64_t queries = int64_t(sizes.Tq) * sizes.H, rows = sizes.B * queries;
  const int64_t row = block_index();  // b, t, h
  if (row >= rows) return;
  const int64_t b = row / queries, t = row / sizes.H % sizes.Tq, h = row % sizes.H;
  const int64_t at = (b * sizes.H + h) * sizes.Tq + t;
  float top = -INFINITY, total = 0.0f;
  for (int s = 0; s < sizes.splits; ++s) top = fmaxf(top, args.part_lse[s * rows + at]);
  if (top == -INFINITY) top = 0.0f;
  for (int s = 0; s < sizes.splits; ++s) {
    total += exp2_approx((args.part_lse[s * rows + at] - top) * kLog2e);
  }
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  const int column = thread_index() * kJoinColumns;
  float sum[kJoinColumns] = {};
  for (int s = 0; s < sizes.splits; ++s) {
    const float weight = exp2_approx((args.part_lse[s * rows + at] - top) * kLog2e) * inverse;
    const Pack part = load_stream(args.parts + (s * rows + row) * kValues + column);
#pragma unroll
    for (int k = 0; k < kJoinColumns; ++k) sum[k] += weight * float_of_bits(part.word[k]);
  }
  uint16_t* to = static_cast<uint16_t*>(args.out) + row * kValues + column;
  uint32_t* out = reinterpret_cast<uint32_t*>(to);
#pragma unroll
  for (int k = 0; k < kJoinColumns / 2; ++k) {
    out[k] = T == DType::bf16 ? bfloats_of_floats(sum[2 * k], sum[2 * k + 1])
                              : halves_of_floats(sum[2 * k], sum[2 * k + 1]);
  }
  if (thread_index() == 0) {
    args.lse[at] = total == 0.0f ? -INFINITY : top + log2f(total) * kLn2;
  }
}

}  // namespace kexue::mla
