// selective_state_update's CPU kernel: some rows of states, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "common/types.h"

namespace kexue {

struct StateUpdateArray {
  void* data;          // null: none
  int64_t strides[4];  // in elements, one per axis
};

// state [S, H, P, n] of state_dtype; x, dt, z [batch, H, P] and B, C [batch, G, n] of dtype;
// A [H, P, n], D and dt_bias [H, P] of float; out [batch, H, P] contiguous.
struct StateUpdate {
  int64_t batch, H, P, n, G;
  DType state_dtype, dtype;
  bool softplus;
  StateUpdateArray state, x, dt, A, B, C, D, z, dt_bias;
  const int64_t* indices;  // [batch] or null; negative: zeros, and no state is touched
  void* out;
};

// Rows [begin, end) of batch * H * P.
#define KEXUE_STATE_UPDATE(isa, unused)                                               \
  namespace isa {                                                                     \
  void selective_state_update(const StateUpdate& call, int64_t begin, int64_t end);   \
  }
KEXUE_ISAS(KEXUE_STATE_UPDATE, )
#undef KEXUE_STATE_UPDATE

}  // namespace kexue
