// The CPU kernel of mla_cache_append: one token, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "mla/mla_cache_append.h"

namespace kexue {

#define KEXUE_MLA_CACHE_APPEND(isa, unused)                     \
  namespace isa {                                               \
  void mla_cache_append_token(const MlaCacheAppend&, int64_t t); \
  }
KEXUE_ISAS(KEXUE_MLA_CACHE_APPEND, )
#undef KEXUE_MLA_CACHE_APPEND

}  // namespace kexue
