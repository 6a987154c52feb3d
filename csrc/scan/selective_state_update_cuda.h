// selective_state_update on CUDA devices, as the bindings see it: one step, the state in place.
#pragma once

#include "common/types.h"

namespace kexue::selective {

// An array by strides in elements; data null: there is none. A stride of 0 broadcasts.
template <int N>
struct Array {
  void* data;
  int64_t stride[N];
};

struct UpdateArgs {
  int64_t batch, heads, P, n, groups;
  int64_t states;             // rows of state
  DType dtype, state_dtype;   // of x, dt, B, C, z, out; of state. The rest is float
  bool softplus;
  Array<4> state;             // [states, heads, P, n]
  Array<3> x, dt, z;          // [batch, heads, P]
  Array<3> A;                 // [heads, P, n]
  Array<3> B, C;              // [batch, groups, n]
  Array<2> D, bias;           // [heads, P]
  const int64_t* indices;     // [batch], of rows of state, or null: row i has state i
  void* out;                  // [batch, heads, P] contiguous
};

void update_cuda(const UpdateArgs&, void* stream);

}  // namespace kexue::selective
