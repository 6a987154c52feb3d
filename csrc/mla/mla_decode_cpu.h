// The CPU kernels of mla_decode: one thread's part, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "mla/mla_decode.h"

namespace kexue {

constexpr int64_t kMlaQueries = 32;  // at most, in a piece
constexpr int64_t kMlaRows = 48;     // that all queries of a piece meet at once

// mla_decode_space: floats that a piece needs to work in, on a cache line.
// mla_decode_piece: into `part`, whose arrays begin at the piece's part; or, where they are null,
//   into the call's out and lse. `packed`: the last piece in `space` had the same queries.
// mla_decode_merge: of query `query` of sequence b, which has several parts.
#define KEXUE_MLA_DECODE(isa, unused)                                                     \
  namespace isa {                                                                         \
  int64_t mla_decode_space(const MlaDecode&);                                             \
  void mla_decode_piece(const MlaDecode&, const MlaPiece&, float* space, bool packed,     \
                        MlaParts part);                                                   \
  void mla_decode_merge(const MlaDecode&, int64_t b, int64_t query, MlaParts, int64_t n); \
  }
KEXUE_ISAS(KEXUE_MLA_DECODE, )
#undef KEXUE_MLA_DECODE

}  // namespace kexue
