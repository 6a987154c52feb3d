// Sums of rows, and what is made of them: one thread's part, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "common/matrix.h"

namespace kexue {

// out[i] = scale * sum[i] + shift * code[i], i < d, in the dtype of out and code.
struct FinishedSum {
  DType dtype;
  double scale;
  double shift;
  const void* code;  // or null: without it
  void* out;
};

#define KEXUE_CODE_SUMS(isa, unused)                                                        \
  namespace isa {                                                                           \
  void code_sums_add(DType, const MatrixView& x, const int64_t* rows, int64_t n, int64_t d, \
                     double* sum); /* sum [d] += rows of x, in their order */               \
  void code_sums_finish(const FinishedSum&, const double* sum, int64_t d);                  \
  }
KEXUE_ISAS(KEXUE_CODE_SUMS, )
#undef KEXUE_CODE_SUMS

}  // namespace kexue
