// Latent attention over a paged cache: the parameters of one call, and how its work is cut.
//
// A sequence has Tq * H queries, heads fastest. Each of its cached rows is the key of all of them,
// and the row's first head_dim_v channels are the value.
#pragma once

#include "common/types.h"

namespace kexue {

// Strides in elements.
struct MlaQueries {
  const void* data;
  int64_t batch, token, head, channel;
};

struct LatentPages {
  const void* data;
  int64_t size;  // tokens in a block
  int64_t block, place, channel;
};

struct MlaDecode {
  DType dtype;
  int64_t B, Tq, H, width, head_dim_v;
  float scale;
  bool causal;
  MlaQueries q;
  LatentPages pages;
  const int32_t* table;  // [B, blocks]
  int64_t blocks;
  const int32_t* lengths;  // [B]
  void* out;               // [B, Tq, H, head_dim_v]
  float* lse;              // [B, H, Tq]

  int64_t queries() const { return Tq * H; }

  // How many rows, from the first on, a query sees.
  int64_t seen(int64_t b, int64_t query) const {
    const int64_t length = lengths[b];
    if (!causal) return length;
    const int64_t rows = length - Tq + query / H + 1;
    return rows > 0 ? rows : 0;
  }
};

// Queries [query, query + queries) of sequence b against its rows [from, to).
struct MlaPiece {
  int64_t b, query, queries, from, to;
};

// Where the results of a sequence's queries lie, if several pieces make them:
// [parts, Tq * H, head_dim_v] and [parts, Tq * H]. A part is a softmax of its own.
struct MlaParts {
  float *out, *lse;
};

}  // namespace kexue
