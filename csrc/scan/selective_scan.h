// Mamba's selective scan: the parameters of one call, for CPU and CUDA.
//
//   x_t = exp(dt_t A) x_{t-1} + dt_t B_t u_t,  y_t = C_t x_t (2 Re of it where A is complex),
//   out_t = (y_t + D u_t) silu(z_t),  dt = softplus(delta + delta_bias), softplus if asked.
//
// States, and what is said to have their type, are float (or complex).
#pragma once

#include "common/types.h"

namespace kexue {

struct SelectiveShape {
  int64_t batch, L, d, n;
  int64_t sequences;          // batch, or the number of packed sequences
  const int64_t* cu_seqlens;  // [sequences + 1], or null: every batch row is one sequence
  int64_t chunk;              // steps between two checkpoints
};

// B or C by strides in elements: per step [batch, L, groups, n] of the data's type (complex
// where states are); or time-invariant [d, n] of the states' type, contiguous.
struct Projection {
  void* data;
  bool per_step;
  int64_t groups;  // divides d; 1 where time-invariant
  int64_t batch, step, group, state;
};

struct SelectiveInputs {
  SelectiveShape shape;
  DType dtype;  // of u, delta, z
  bool complex, softplus;
  Strided u, delta, z;  // z.data null: none
  const void* A;        // [d, n]
  Projection B, C;
  const float *D, *delta_bias;  // [d] or null
  const void* initial;          // [sequences, d, n] or null
};

struct SelectiveForward {
  SelectiveInputs in;
  void* out;          // [batch, L, d] contiguous
  void* final;        // [sequences, d, n] or null
  void* checkpoints;  // [batch, ceil(L / chunk), n, d] or null: what enters each chunk's first step
};

// Outputs are contiguous, of their inputs' shapes; B's and C's of the states' type where
// time-invariant. Those of inputs that are null are null.
struct SelectiveBackward {
  SelectiveInputs in;
  Strided grad_out;
  const void* grad_final;  // [sequences, d, n] or null
  const void* checkpoints;
  void *u, *delta, *z, *A, *B, *C;
  float *D, *delta_bias;
  void* initial;
};

}  // namespace kexue
