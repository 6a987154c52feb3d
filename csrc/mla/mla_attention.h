// Attention of T tokens with the keys and values of H heads: the parameters of one call.
#pragma once

#include "common/types.h"

namespace kexue {

// [T, H, channels] in the call's dtype. Strides in elements.
struct MlaHeads {
  void* data;
  int64_t token, head, channel;
};

// [T, H, channels], channels side by side.
struct MlaFloats {
  float* data;
  int64_t token, head;

  float* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

struct MlaAttention {
  DType dtype;
  int64_t T, H, dk, dr, dv;
  bool causal;
  const int64_t* bounds;  // [sequences + 1], of sequences that see themselves alone
  int64_t sequences;
  MlaHeads q_nope, q_rope;  // [T, H, dk], [T, H, dr]
  // Of nope and rope queries, such that scores come in base 2; `key` is all heads'.
  MlaFloats k, key, v;  // [T, H, dk], [T, 1, dr], [T, H, dv]
  MlaHeads out;         // [T, H, dv], channels side by side
  float* lse;           // [H, T], natural
};

// dk and d_key are those of keys that give natural scores of softmax_scale 1.
struct MlaAttentionGradient {
  MlaHeads grad;            // [T, H, dv]
  MlaHeads d_nope, d_rope;  // channels side by side
  MlaFloats dk, d_key, dv;  // [T, H, dk], [T, H, dr], [T, H, dv]
};

// Queries [start, start + count) of head `head`, in the sequence of tokens [first, last).
struct MlaQueryBlock {
  int64_t head, first, last, start, count;
};

// Whose turn it is to add to a block of keys' gradient: query blocks of a sequence, the last one
// first, whichever threads they are on.
class MlaTurns {
 public:
  MlaTurns(int64_t* now) : now_(now) {}  // by key block: the query block's number
  void wait(int64_t key_block, int64_t query_block) const;
  void pass(int64_t key_block, int64_t query_block) const;

 private:
  int64_t* now_;
};

}  // namespace kexue
