// h_t = a_t h_{t-1} + b_t: the parameters of one call and the per-element maths, for CPU and CUDA.
#pragma once

#include "common/types.h"

namespace kexue {

// Sizes and options of one call. States are contiguous [sequences, D] in float (or complex).
struct LinearScanShape {
  int64_t B, L, D;
  int64_t sequences;          // B, or the number of packed sequences
  const int64_t* cu_seqlens;  // [sequences + 1], or null: every batch row is one sequence
  bool reverse;
};

struct LinearScanForward {
  LinearScanShape shape;
  Strided a, b;
  void* h;              // [B, L, D] contiguous, out
  const void* initial;  // [sequences, D] or null
  void* final;          // [sequences, D] or null, out
};

// grad_b is the scan of grad_h the other way, with a shifted by one step (a past the last step
// is 1, where grad_final enters). grad_a is full [B, L, D] in the data's dtype, or, where a is
// time-invariant, one float (or complex) row of sums per sequence or chunk.
struct LinearScanBackward {
  LinearScanShape shape;
  Strided a, h, grad_h;    // h.data null: grad_a is not wanted
  const void* initial;     // [sequences, D] or null
  const void* grad_final;  // [sequences, D] or null
  void* grad_b;            // [B, L, D] contiguous, out
  void* grad_a;            // out, or null
  void* grad_initial;      // [sequences, D] or null, out
};

// a * h + b: one step
template <class F>
KEXUE_INLINE F step(F a, F h, F b) {
  return a * h + b;
}
template <class F>
KEXUE_INLINE ComplexOf<F> step(ComplexOf<F> a, ComplexOf<F> h, ComplexOf<F> b) {
  return {a.re * h.re - a.im * h.im + b.re, a.re * h.im + a.im * h.re + b.im};
}

// What a run of steps does to the state that enters it: h -> a h + b.
template <class S>
struct Affine {
  S a, b;
};

// The state after a run. A zero state leaves b alone: a product that overflowed is not inf * 0.
template <class S>
KEXUE_INLINE S apply(Affine<S> run, S state) {
  return is_zero(state) ? run.b : step(run.a, state, run.b);
}

template <class S>
KEXUE_INLINE Affine<S> then(Affine<S> first, Affine<S> second) {
  return {mul(second.a, first.a), apply(second, first.b)};
}

}  // namespace kexue
