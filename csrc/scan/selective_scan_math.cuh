// The arithmetic of selective_scan's kernels: steps, decays and gates, for real and complex states.
#pragma once

#include "scan/gpu.cuh"
#include "scan/pack.cuh"
#include "scan/selective_scan_gpu.cuh"

namespace kexue::selective {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// x[0] + x[1] e + ...
template <int N>
KEXUE_DEVICE float polynomial(const float (&x)[N], float e) {
  float sum = x[N - 1];
#pragma unroll
  for (int i = N - 2; i >= 0; --i) sum = fused(sum, e, x[i]);
  return sum;
}

// log(1 + e) for e in [0, 1]: relative error 1.2e-7
KEXUE_DEVICE float log1p_unit(float e) {
  const float c[] = {1.000000000e+00f,  -4.999989271e-01f, 3.332971036e-01f,  -2.495161593e-01f,
                     1.966327429e-01f,  -1.526966691e-01f, 1.054362357e-01f,  -5.637361482e-02f,
                     1.954252832e-02f,  -3.176057013e-03f};
  return e * polynomial(c, e);
}

KEXUE_DEVICE float softplus(float x) {
  const float tail = log1p_unit(exp2_approx(-kLog2e * absolute(x)));
  return (x > 0 ? x : 0.0f) + tail;
}

KEXUE_DEVICE float sigmoid(float x) { return reciprocal(1.0f + exp2_approx(-kLog2e * x)); }

KEXUE_DEVICE float silu(float z) { return z * sigmoid(z); }
KEXUE_DEVICE float silu_slope(float z) {
  const float s = sigmoid(z);
  return s * fused(z, 1.0f - s, 1.0f);
}

// sin and cos of x, good to some 1e-7 for |x| up to 1e5.
KEXUE_DEVICE Complex unit_circle(float x) {
  const float turns = nearest(x * 0.636619772f);  // quarters of the circle
  float r = fused(turns, -1.57079601e+00f, x);
  r = fused(turns, -3.13916473e-07f, r);
  r = fused(turns, -5.39030253e-15f, r);
  const float sines[] = {-1.66666666e-01f, 8.33332940e-03f, -1.98400874e-04f, 2.71811960e-06f};
  const float cosines[] = {-0.5f, 4.16666642e-02f, -1.38888353e-03f, 2.47573108e-05f};
  const float square = r * r;
  const float sine = fused(r * square, polynomial(sines, square), r);
  const float cosine = fused(square, polynomial(cosines, square), 1.0f);
  const int quarter = int(turns);
  const float re = quarter & 1 ? sine : cosine, im = quarter & 1 ? cosine : sine;
  return {(quarter + 1) & 2 ? -re : re, quarter & 2 ? -im : im};
}

// ---- what differs between real and complex states

// A as the kernels hold it: exp(dt A) of a real one is a power of two.
KEXUE_DEVICE float held(float A) { return A * kLog2e; }
KEXUE_DEVICE Complex held(Complex A) { return A; }

// Real: exp(dt A) from A as held.
KEXUE_DEVICE float decay(float dt, float A) { return exp2_approx(dt * A); }
KEXUE_DEVICE Complex decay(float dt, Complex A) {
  const float size = exp2_approx(dt * A.re * kLog2e);
  const Complex phase = unit_circle(dt * A.im);
  return {size * phase.re, size * phase.im};
}

template <class S>
struct Kind;  // kStates: of a thread and channel; kOfHeld: A from A as held
template <>
struct Kind<float> {
  static constexpr int kStates = 4, kParts = 1;
  static constexpr float kOfHeld = kLn2, kOutput = 1.0f;  // y = kOutput Re(C x)
};
template <>
struct Kind<Complex> {
  static constexpr int kStates = 2, kParts = 2;
  static constexpr float kOfHeld = 1.0f, kOutput = 2.0f;
};

KEXUE_DEVICE float scaled(float k, float x) { return k * x; }
KEXUE_DEVICE Complex scaled(float k, Complex x) { return {k * x.re, k * x.im}; }

// k x + y
KEXUE_DEVICE float plus_scaled(float k, float x, float y) { return fused(k, x, y); }
KEXUE_DEVICE Complex plus_scaled(float k, Complex x, Complex y) {
  return {fused(k, x.re, y.re), fused(k, x.im, y.im)};
}

// Re(x y) + sum
KEXUE_DEVICE float plus_real_of_product(float x, float y, float sum) { return fused(x, y, sum); }
KEXUE_DEVICE float plus_real_of_product(Complex x, Complex y, float sum) {
  return fused(x.re, y.re, fused(-x.im, y.im, sum));
}

// x y + z
KEXUE_DEVICE float product_plus(float x, float y, float z) { return fused(x, y, z); }
KEXUE_DEVICE Complex product_plus(Complex x, Complex y, Complex z) {
  return {fused(x.re, y.re, fused(-x.im, y.im, z.re)),
          fused(x.re, y.im, fused(x.im, y.re, z.im))};
}

KEXUE_DEVICE float part(float x, int) { return x; }
KEXUE_DEVICE float part(Complex x, int k) { return k == 0 ? x.re : x.im; }

// ---- elements

template <DType T>
KEXUE_DEVICE float float_of(StoredOf<T> x) {
  if constexpr (T == DType::f32) {
    return float_of_bits(x);
  } else if constexpr (T == DType::bf16) {
    return float_of_bits(uint32_t(x) << 16);
  } else {
    float low, high;
    floats_of_halves(x, low, high);
    return low;
  }
}

template <DType T>
KEXUE_DEVICE StoredOf<T> stored(float x) {
  if constexpr (T == DType::f32) return bits_of_float(x);
  if constexpr (T == DType::bf16) return StoredOf<T>(bfloats_of_floats(x, 0.0f));
  return StoredOf<T>(halves_of_floats(x, 0.0f));
}

}  // namespace kexue::selective
