// monarch_matmul and block_diag_matmul on CPU, shared among threads: no result depends on how many.
#pragma once

#include "monarch/factor.h"

namespace kexue::monarch {

struct Bias {
  const void* data;  // or null
  int64_t stride;
};

struct BlockDiagMatmul {
  DType dtype;
  int64_t N;
  Factor factor;
  Rows x;
  Weights w;
  bool transposed = false;  // and conjugate: x has the blocks' outputs
};

// x, then the first factor, whose items are read as [second.in, second.blocks], then the second.
struct MonarchMatmul {
  DType dtype;
  int64_t N;
  Factor first, second;
  Rows x;
  Weights w1, w2;
};

// y contiguous, out.
void block_diag_matmul_on_threads(const BlockDiagMatmul&, const Bias&, void* y, int threads);
void monarch_matmul_on_threads(const MonarchMatmul&, const Bias&, void* y, int threads);

// Contiguous gradients, out; null: not wanted.
void block_diag_matmul_backward_on_threads(const BlockDiagMatmul&, const Rows& grad, void* dx,
                                           void* dw, int threads);
void monarch_matmul_backward_on_threads(const MonarchMatmul&, const Rows& grad, void* dx,
                                        void* dw1, void* dw2, int threads);

}  // namespace kexue::monarch
