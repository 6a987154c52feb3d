// The CPU kernels of mla_attention: a block of queries' part, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "mla/mla_attention.h"

namespace kexue {

constexpr int64_t kMlaQueryBlock = 64;
constexpr int64_t kMlaKeyBlock = 128;

// *_space: floats to work in, on a cache line.
#define KEXUE_MLA_ATTENTION(isa, unused)                                                      \
  namespace isa {                                                                             \
  int64_t mla_attention_space(const MlaAttention&);                                           \
  void mla_attention_block(const MlaAttention&, const MlaQueryBlock&, float* space);          \
  int64_t mla_attention_backward_space(const MlaAttention&);                                  \
  void mla_attention_backward_block(const MlaAttention&, const MlaAttentionGradient&,         \
                                    const MlaQueryBlock&, const MlaTurns&, float* space);     \
  }
KEXUE_ISAS(KEXUE_MLA_ATTENTION, )
#undef KEXUE_MLA_ATTENTION

}  // namespace kexue
