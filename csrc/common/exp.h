// Exponentials and what is made of them, of several elements at a time, for CPU kernels.
//
// Errors are a few units in the last place; NaN stays NaN, and what is too small is 0.
#pragma once

#include "common/lanes.h"

namespace kexue::KEXUE_ISA {

template <int N, int... I>
KEXUE_INLINE Vector<float, N> splat_of(float x, Indices<I...>) {
  return Vector<float, N>{(void(I), x)...};
}
template <int N>
KEXUE_INLINE Floats<N> splat(float x) {
  if constexpr (N > kWidth) {
    return {splat<N / 2>(x), splat<N / 2>(x)};
  } else if constexpr (N == 1) {
    return x;
  } else {
    return splat_of<N>(x, typename Count<N>::Indices{});
  }
}

// What follows is written so that the registers of a wide value advance side by side: each has a
// long chain of dependent operations, of which a processor sees few at a time.
template <class F>
KEXUE_INLINE Pair<F> operator+(Pair<F> x, float y) {
  return {x.lo + y, x.hi + y};
}
template <class F>
KEXUE_INLINE Pair<F> operator-(Pair<F> x, float y) {
  return {x.lo - y, x.hi - y};
}
template <class F>
KEXUE_INLINE Pair<F> operator*(Pair<F> x, float y) {
  return {x.lo * y, x.hi * y};
}
template <class F>
KEXUE_INLINE Pair<F> operator/(Pair<F> x, Pair<F> y) {
  return {x.lo / y.lo, x.hi / y.hi};
}

// x, raised to lo or lowered to hi; a NaN is kept.
template <int N>
KEXUE_INLINE Floats<N> clamp(Floats<N> x, float lo, float hi) {
  if constexpr (N > kWidth) {
    return {clamp<N / 2>(x.lo, lo, hi), clamp<N / 2>(x.hi, lo, hi)};
  } else {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
      // masked, by all: gcc warns of the plain intrinsics' own header
      const auto raised = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(lo), bits_as<__m512>(x));
      return bits_as<Floats<N>>(_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(hi), raised));
    }
#endif
#if defined(__AVX2__)
    if constexpr (N == 8) {
      const auto raised = _mm256_max_ps(_mm256_set1_ps(lo), bits_as<__m256>(x));
      return bits_as<Floats<N>>(_mm256_min_ps(_mm256_set1_ps(hi), raised));
    }
#endif
#if defined(__SSE2__)
    if constexpr (N == 4) {
      const auto raised = _mm_max_ps(_mm_set1_ps(lo), bits_as<__m128>(x));
      return bits_as<Floats<N>>(_mm_min_ps(_mm_set1_ps(hi), raised));
    }
#endif
    const Floats<N> least = splat<N>(lo), most = splat<N>(hi);
    x = x < least ? least : x;
    return x > most ? most : x;
  }
}

// Where |x| < 2^22, x + kShift has the nearest integer in its low bits: from 2^23 on a float has
// no fraction.
constexpr float kShift = 0x1.8p23f;

// p * 2^(n - 1), n the integer in the low bits of `shifted`, plus 126.
constexpr float kScaleShift = kShift + 126;
template <int N>
KEXUE_INLINE Floats<N> scale_by(Floats<N> p, Floats<N> shifted) {
  if constexpr (N > kWidth) {
    return {scale_by<N / 2>(p.lo, shifted.lo), scale_by<N / 2>(p.hi, shifted.hi)};
  } else {
    return p * bits_as<Floats<N>>(bits_as<Words<N>>(shifted) << 23);
  }
}

// 2 * 2^r, |r| <= 1/2: times 2^(n - 1), so that 2^128 is infinite and not before. The first
// coefficients are exact, and the degree is such that powers of powers near 1 stay accurate.
template <int N>
KEXUE_INLINE Floats<N> twice_exp2(Floats<N> r) {
  Floats<N> p = r * 3.06423091e-4f + 2.67803230e-3f;
  p = p * r + 1.92370526e-2f;
  p = p * r + 1.11007245e-1f;
  p = p * r + 4.80452951e-1f;
  p = p * r + 1.38629436f;
  return p * r + 2.0f;
}

template <int N>
KEXUE_INLINE Floats<N> exp2(Floats<N> x) {
  x = clamp<N>(x, -126.0f, 128.0f);
  const Floats<N> shifted = x + kScaleShift;
  return scale_by<N>(twice_exp2<N>(x - (shifted - kScaleShift)), shifted);
}

constexpr float kLog2E = 1.44269504f;

template <int N>
KEXUE_INLINE Floats<N> exp(Floats<N> x) {
  x = clamp<N>(x, -87.33f, 89.0f);
  const Floats<N> shifted = x * kLog2E + kScaleShift, n = shifted - kScaleShift;
  const Floats<N> r = x - n * 0x1.62e4p-1f - n * 0x1.7f7d1cp-20f;
  return scale_by<N>(twice_exp2<N>(r * kLog2E), shifted);
}

// log(1 + e), e in [0, 1]: 2 atanh(e / (2 + e))
template <int N>
KEXUE_INLINE Floats<N> log1p(Floats<N> e) {
  const Floats<N> s = e / (e + 2.0f), v = s * s;
  Floats<N> p = v * 2.80119869e-1f + 2.80018053e-1f;
  p = p * v + 4.00215272e-1f;
  p = p * v + 6.66664163e-1f;
  return s * (p * v) + (s + s);
}

template <int N>
KEXUE_INLINE Floats<N> positive_part(Floats<N> x) {
  if constexpr (N > kWidth) {
    return {positive_part<N / 2>(x.lo), positive_part<N / 2>(x.hi)};
  } else {
    return x < 0.0f ? splat<N>(0.0f) : x;
  }
}

template <int N>
KEXUE_INLINE Floats<N> softplus(Floats<N> x) {
  const Floats<N> positive = positive_part<N>(x), size = positive + positive_part<N>(-x);
  return positive + log1p<N>(exp<N>(-size));
}

template <int N>
KEXUE_INLINE Floats<N> sigmoid(Floats<N> x) {
  return splat<N>(1.0f) / (exp<N>(-x) + 1.0f);
}

// What rounding took from x y, which is t.
template <int N>
KEXUE_INLINE Floats<N> product_error(Floats<N> x, Floats<N> y, Floats<N> t) {
  if constexpr (N > kWidth) {
    return {product_error<N / 2>(x.lo, y.lo, t.lo), product_error<N / 2>(x.hi, y.hi, t.hi)};
  } else {
#if defined(__AVX512F__)
    if constexpr (N == 16) {
      return bits_as<Floats<N>>(
          _mm512_fmsub_ps(bits_as<__m512>(x), bits_as<__m512>(y), bits_as<__m512>(t)));
    }
#endif
#if defined(__FMA__)
    if constexpr (N == 8) {
      return bits_as<Floats<N>>(
          _mm256_fmsub_ps(bits_as<__m256>(x), bits_as<__m256>(y), bits_as<__m256>(t)));
    }
#endif
    const auto upper = [](Floats<N> v) {
      return bits_as<Floats<N>>(bits_as<Words<N>>(v) & 0xfffff000u);
    };
    const Floats<N> x_up = upper(x), x_low = x - x_up, y_up = upper(y), y_low = y - y_up;
    return x_up * y_up - t + x_up * y_low + x_low * y_up + x_low * y_low;
  }
}

// (cos, sin) of t + small quarter turns.
template <int N>
KEXUE_INLINE ComplexOf<Floats<N>> turned(Floats<N> t, Floats<N> small) {
  if constexpr (N > kWidth) {
    const auto lo = turned<N / 2>(t.lo, small.lo), hi = turned<N / 2>(t.hi, small.hi);
    return {{lo.re, hi.re}, {lo.im, hi.im}};
  } else {
    t = clamp<N>(t, -0x1p21f, 0x1p21f);  // past it, a float's fraction says nothing
    const Floats<N> shifted = t + kShift;
    const Words<N> n = bits_as<Words<N>>(shifted);
    const Floats<N> r = t - (shifted - kShift) + small, v = r * r;
    Floats<N> sine = -4.60165789e-3f * v + 7.96800328e-2f;
    sine = sine * v - 6.45963460e-1f;
    sine = (sine * v + 1.57079632f) * r;
    Floats<N> cosine = 9.03766540e-4f * v - 2.08601651e-2f;
    cosine = cosine * v + 2.53669226e-1f;
    cosine = cosine * v - 1.23370054f;
    cosine = cosine * v + 1.0f;
    const auto odd = (n & 1u) == 1u;
    const Words<N> re = bits_as<Words<N>>(odd ? sine : cosine) ^ ((n + 1u) & 2u) << 30;
    const Words<N> im = bits_as<Words<N>>(odd ? cosine : sine) ^ (n & 2u) << 30;
    return {bits_as<Floats<N>>(re), bits_as<Floats<N>>(im)};
  }
}

}  // namespace kexue::KEXUE_ISA
