// monarch_matmul on Hopper GPUs, as the bindings see it. Every pointer is of the current device and
// a multiple of 16 bytes; nothing waits for the device. Errors of CUDA are std::runtime_error.
#pragma once

#include "monarch/monarch_cluster.h"

namespace kexue::monarch {

struct ClusterCall {
  ClusterSizes sizes;
  DType dtype;     // bf16 or f16
  const void* x;   // [N, k p]: rows contiguous
  int64_t stride;  // of x's rows, in elements, a multiple of 8
  const void* w1;  // [k, q, p]
  const void* w2;  // [l, s, r]
  const void* bias;  // [s l] or null
  void* y;           // [N, s l]
};

// z is rounded to the dtype, sums are float32. The factors stay in shared memory if they can, else
// are streamed; sizes that can't either (monarch_cluster.h) are std::invalid_argument.
void monarch_matmul_cuda(const ClusterCall&, void* stream);

}  // namespace kexue::monarch
