// The short causal convolution of a Mamba mixer on CPU, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "common/types.h"

namespace kexue {

// y_t = bias + sum_k taps_k x_{t - K + 1 + k} for each channel, then silu if asked. What lies
// before the first step is in the window [B, K - 1, d], or is zero.
struct CausalConv {
  int64_t B, L, d, K;
  DType dtype;        // of x, window and y
  bool silu;
  Strided x, window;  // neighbouring channels; window.data null: zeros
  const float* taps;  // [K, d]
  const float* bias;  // [d] or null
  void* y;            // [B, L, d] contiguous
};

// Steps [begin, end) of B * L.
#define KEXUE_CAUSAL_CONV(isa, unused)                                    \
  namespace isa {                                                         \
  void causal_conv(const CausalConv& call, int64_t begin, int64_t end);   \
  }
KEXUE_ISAS(KEXUE_CAUSAL_CONV, )
#undef KEXUE_CAUSAL_CONV

}  // namespace kexue
