// The CPU kernel of matrix products: a part of one, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "mla/mla_attention_matmul.h"

namespace kexue {

constexpr int64_t kMlaMatmulColumns = 128;  // of a part, at most
constexpr int64_t kMlaMatmulRows = 96;      // that meet them at once

// mla_matmul_space: floats that a part needs to work in, on a cache line.
#define KEXUE_MLA_MATMUL(isa, unused)                                            \
  namespace isa {                                                                \
  int64_t mla_matmul_space();                                                    \
  void mla_matmul_part(const MlaMatmul&, const MlaMatmulPart&, float* space);    \
  }
KEXUE_ISAS(KEXUE_MLA_MATMUL, )
#undef KEXUE_MLA_MATMUL

}  // namespace kexue
