// New tokens' rows for a paged cache of latents: the parameters of one call.
#pragma once

#include "mla/mla_decode.h"

namespace kexue {

// [T, columns] by strides in elements.
struct TokenRows {
  DType dtype;
  const void* data;  // or null: none
  int64_t token, channel;
};

struct MlaCacheAppend {
  DType dtype;  // of latents, keys and pages
  int64_t T, dc, dr;
  TokenRows latent, key;
  TokenRows weight;    // one row for all tokens, or none
  TokenRows cos, sin;  // [T, dr / 2], or none
  float eps;
  bool interleaved;
  LatentPages pages;  // written to
  int64_t num_blocks;
  const int64_t* slots;  // [T], -1: left out
};

}  // namespace kexue
