// Types and per-element maths that CPU and CUDA code share.
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

// F is float, or, where the CPU code takes many elements at once, a vector of floats.
template <class F>
struct ComplexOf {
  F re, im;
};
using Complex = ComplexOf<float>;

template <class F>
KEXUE_INLINE F conj(F x) {
  return x;
}
template <class F>
KEXUE_INLINE ComplexOf<F> conj(ComplexOf<F> x) {
  return {x.re, -x.im};
}

template <class F>
KEXUE_INLINE F add(F x, F y) {
  return x + y;
}
template <class F>
KEXUE_INLINE ComplexOf<F> add(ComplexOf<F> x, ComplexOf<F> y) {
  return {x.re + y.re, x.im + y.im};
}

template <class F>
KEXUE_INLINE F mul(F x, F y) {
  return x * y;
}
template <class F>
KEXUE_INLINE ComplexOf<F> mul(ComplexOf<F> x, ComplexOf<F> y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}

KEXUE_INLINE float one(float) { return 1.0f; }
KEXUE_INLINE Complex one(Complex) { return {1.0f, 0.0f}; }

KEXUE_INLINE bool is_zero(float x) { return x == 0.0f; }
KEXUE_INLINE bool is_zero(Complex x) { return x.re == 0.0f && x.im == 0.0f; }

}  // namespace kexue
