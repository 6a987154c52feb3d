// h_t = a_t h_{t-1} + b_t: the parameters of one call and the per-element maths, for CPU and CUDA.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KEXUE_INLINE __host__ __device__ __forceinline__
#else
#define KEXUE_INLINE inline __attribute__((always_inline))
#endif

namespace kexue {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, c64 = 3 };

// A [B, L, D] array by strides in elements (complex: in complex elements). A stride of 0
// broadcasts.
struct Strided {
  void* data;
  int64_t batch, step, channel;
};

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

struct Complex {
  float re, im;
};

KEXUE_INLINE float conj(float x) { return x; }
KEXUE_INLINE Complex conj(Complex x) { return {x.re, -x.im}; }

KEXUE_INLINE float mul(float x, float y) { return x * y; }
KEXUE_INLINE Complex mul(Complex x, Complex y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}

// a * h + b: one step
KEXUE_INLINE float step(float a, float h, float b) { return a * h + b; }
KEXUE_INLINE Complex step(Complex a, Complex h, Complex b) {
  return {a.re * h.re - a.im * h.im + b.re, a.re * h.im + a.im * h.re + b.im};
}

KEXUE_INLINE bool is_zero(float x) { return x == 0.0f; }
KEXUE_INLINE bool is_zero(Complex x) { return x.re == 0.0f && x.im == 0.0f; }

// What a run of steps does to the state that enters it: h -> a h + b.
template <class S>
struct Affine {
  S a, b;
};

template <class S>
KEXUE_INLINE Affine<S> then(Affine<S> first, Affine<S> second) {
  return {mul(second.a, first.a), step(second.a, first.b, second.b)};
}

// The state after a run. A zero state leaves b alone: a product that overflowed is not inf * 0.
template <class S>
KEXUE_INLINE S apply(Affine<S> run, S state) {
  return is_zero(state) ? run.b : step(run.a, state, run.b);
}

}  // namespace kexue
