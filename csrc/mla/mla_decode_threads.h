// mla_decode on CPU: its pieces, shared among threads. No result depends on their number.
#pragma once

#include "mla/mla_decode.h"

namespace kexue {

// Whether every length is within the table's reach, and every id that a length reaches a block's.
bool mla_decode_in_reach(const MlaDecode& call, int64_t num_blocks);

// num_splits: the most parts that a sequence is cut into; 0: as many as are worth it.
void mla_decode_on_threads(const MlaDecode& call, int64_t num_splits, int threads);

}  // namespace kexue
