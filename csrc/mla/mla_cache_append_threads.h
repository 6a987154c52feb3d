// mla_cache_append on CPU, its tokens shared among threads.
#pragma once

#include "mla/mla_cache_append.h"

namespace kexue {

// Whether every slot is in the cache, or -1.
bool mla_cache_append_in_reach(const MlaCacheAppend& call);

// Of tokens with the same slot the last one stays; those at -1 are skipped.
void mla_cache_append_on_threads(const MlaCacheAppend& call, int threads);

}  // namespace kexue
