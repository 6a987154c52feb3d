// The CPU kernels of vector_quantize: some of the rows, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "common/matrix.h"

namespace kexue {

// Indices outside [0, K) say that a row has no code.
struct VectorQuantize {
  DType dtype;
  int64_t N, K, d;
  MatrixView x, codebook;  // codebook contiguous
  const int64_t* indices;
};

enum class Gradient : int { ste = 0, rotation = 1 };

struct VectorQuantizeBackward {
  VectorQuantize forward;
  MatrixView grad;  // of quantized
  Gradient gradient;
  double commitment;  // times x - q is the gradient of the commitment loss
  void* grad_x;       // [N, d] contiguous, out
};

// quantized [N, d]: the rows' codes, NaN without one. Returns the sum of (x - q)^2.
// grad_x of a row without a code is zero.
#define KEXUE_VECTOR_QUANTIZE(isa, unused)                                                \
  namespace isa {                                                                         \
  double vector_quantize_forward(const VectorQuantize&, int64_t from, int64_t to,         \
                                 void* quantized);                                        \
  void vector_quantize_backward(const VectorQuantizeBackward&, int64_t from, int64_t to); \
  }
KEXUE_ISAS(KEXUE_VECTOR_QUANTIZE, )
#undef KEXUE_VECTOR_QUANTIZE

}  // namespace kexue
