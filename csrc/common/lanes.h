// Several neighbouring elements as one value: loads, stores and conversions for CPU kernels.
//
// load<N> and store<N> move N elements (a power of two) of float, Bf16, F16 or Complex between
// memory, of any alignment, and Floats<N> or ComplexOf<Floats<N>>, on which the maths of
// types.h works. For *_cpu.cpp files only: all of it depends on the instruction set.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/types.h"

namespace kexue::KEXUE_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;  // floats in a register
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

template <class E, int N>
struct VectorOf {
  typedef E type __attribute__((vector_size(N * sizeof(E))));
};
template <class E>
struct VectorOf<E, 1> {
  using type = E;
};
template <class E, int N>
using Vector = typename VectorOf<E, N>::type;

// Values wider than a register. Not an array: these fall apart into registers.
template <class F>
struct Pair {
  F lo, hi;
};
template <class F>
KEXUE_INLINE Pair<F> operator+(Pair<F> x, Pair<F> y) {
  return {x.lo + y.lo, x.hi + y.hi};
}
template <class F>
KEXUE_INLINE Pair<F> operator-(Pair<F> x, Pair<F> y) {
  return {x.lo - y.lo, x.hi - y.hi};
}
template <class F>
KEXUE_INLINE Pair<F> operator*(Pair<F> x, Pair<F> y) {
  return {x.lo * y.lo, x.hi * y.hi};
}
template <class F>
KEXUE_INLINE Pair<F> operator-(Pair<F> x) {
  return {-x.lo, -x.hi};
}

template <int N, bool wide = (N > kWidth)>
struct FloatsOf {
  using type = Vector<float, N>;
};
template <int N>
struct FloatsOf<N, true> {
  using type = Pair<typename FloatsOf<N / 2>::type>;
};
template <int N>
using Floats = typename FloatsOf<N>::type;

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using Indices = kexue::KEXUE_ISA::Indices<I...>;
};

template <class To, class From>
KEXUE_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

template <class V>
KEXUE_INLINE V get(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// `stream` goes past the caches; p is then aligned to the size of v.
template <class V>
KEXUE_INLINE void put(void* p, V v, [[maybe_unused]] bool stream) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) {
    if (stream) return _mm512_stream_si512(static_cast<__m512i*>(p), bits_as<__m512i>(v));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) {
    if (stream) return _mm256_stream_si256(static_cast<__m256i*>(p), bits_as<__m256i>(v));
  }
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) {
    if (stream) return _mm_stream_si128(static_cast<__m128i*>(p), bits_as<__m128i>(v));
  }
#endif
  __builtin_memcpy(p, &v, sizeof v);
}

// Streamed stores are seen by other threads only after this.
KEXUE_INLINE void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- halves: bits in the low 16 of each 32

template <int N>
using Words = Vector<uint32_t, N>;
template <int N>
using Shorts = Vector<uint16_t, N>;

// Intrinsics where gcc would take four instructions for one.
template <int N>
KEXUE_INLINE Words<N> widen(Shorts<N> x) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    return bits_as<Words<N>>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_as<__m256i>(x)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return bits_as<Words<N>>(_mm256_cvtepu16_epi32(bits_as<__m128i>(x)));
#endif
  if constexpr (N == 1) {
    return x;
  } else {
    return __builtin_convertvector(x, Words<N>);
  }
}
template <int N>
KEXUE_INLINE Shorts<N> narrow(Words<N> x) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    return bits_as<Shorts<N>>(_mm512_maskz_cvtepi32_epi16(0xffff, bits_as<__m512i>(x)));
  }
#endif
  if constexpr (N == 1) {
    return static_cast<uint16_t>(x);
  } else {
    return __builtin_convertvector(x, Shorts<N>);
  }
}

template <int N>
KEXUE_INLINE Floats<N> decode(Shorts<N> x, Bf16) {
  return bits_as<Floats<N>>(widen<N>(x) << 16);
}

// To nearest, ties to even; a NaN stays one.
template <int N>
KEXUE_INLINE Shorts<N> encode(Floats<N> x, Bf16) {
  const Words<N> bits = bits_as<Words<N>>(x);
  const Words<N> rounded = (bits + (bits >> 16 & 1u) + 0x7fffu) >> 16;
  const Words<N> quiet = bits >> 16 | 0x40u;
  return narrow<N>(x == x ? rounded : quiet);
}

template <int N>
KEXUE_INLINE Floats<N> decode(Shorts<N> x, F16) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {  // masked, by all: gcc warns of the plain intrinsic's own header
    return bits_as<Floats<N>>(_mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(x)));
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return bits_as<Floats<N>>(_mm256_cvtph_ps(bits_as<__m128i>(x)));
  if constexpr (N == 4) {
    const Vector<int64_t, 2> half = {bits_as<int64_t>(x), 0};
    return bits_as<Floats<N>>(_mm_cvtph_ps(bits_as<__m128i>(half)));
  }
#endif
  // The exponent's bias by a product, which also normalises; then infinity and NaN, and the sign.
  const Words<N> bits = widen<N>(x);
  const Floats<N> scaled = bits_as<Floats<N>>((bits & 0x7fffu) << 13) * 0x1p112f;
  const Words<N> whole = bits_as<Words<N>>(scaled);
  const Words<N> magnitude = scaled >= 65536.0f ? whole | 0x7f800000u : whole;
  return bits_as<Floats<N>>(magnitude | (bits & 0x8000u) << 16);
}

template <int N>
KEXUE_INLINE Shorts<N> encode(Floats<N> x, F16) {
#if defined(__AVX512F__)
  if constexpr (N == 16) {
    return bits_as<Shorts<N>>(
        _mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    return bits_as<Shorts<N>>(_mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
  }
  if constexpr (N == 4) {
    const auto half = _mm_cvtps_ph(bits_as<__m128>(x), _MM_FROUND_TO_NEAREST_INT);
    return bits_as<Shorts<N>>(bits_as<Vector<int64_t, 2>>(half)[0]);
  }
#endif
  const Words<N> bits = bits_as<Words<N>>(x);
  const Words<N> magnitude = bits & 0x7fffffffu;
  const Floats<N> size = bits_as<Floats<N>>(magnitude);
  // at 0.5 a float's last bit is the last bit of a subnormal half: the sum rounds to it
  const Words<N> small = bits_as<Words<N>>(size + 0.5f) - 0x3f000000u;
  const Words<N> normal = (magnitude + (magnitude >> 13 & 1u) + 0xc8000fffu) >> 13;
  const Words<N> infinite = Words<N>{} + 0x7c00u, quiet = Words<N>{} + 0x7e00u;
  const Words<N> finite = size < 0x1p-14f ? small : normal;
  const Words<N> ordered = size < 65536.0f ? finite : infinite;
  return narrow<N>((x == x ? ordered : quiet) | (bits >> 16 & 0x8000u));
}

// call(Item{}), Item being what a real dtype is in memory.
template <class Call>
KEXUE_INLINE void with_real(DType dtype, Call call) {
  if (dtype == DType::bf16) return call(Bf16{});
  if (dtype == DType::f16) return call(F16{});
  call(float{});
}

// ---- load and store

template <int N>
KEXUE_INLINE Floats<N> load(const float* p) {
  if constexpr (N > kWidth) {
    return {load<N / 2>(p), load<N / 2>(p + N / 2)};
  } else {
    return get<Floats<N>>(p);
  }
}
template <int N>
KEXUE_INLINE void store(float* p, Floats<N> x, bool stream = false) {
  if constexpr (N > kWidth) {
    store<N / 2>(p, x.lo, stream);
    store<N / 2>(p + N / 2, x.hi, stream);
  } else {
    put(p, x, stream);
  }
}

template <int N, class Half, class = decltype(Half::bits)>
KEXUE_INLINE Floats<N> load(const Half* p) {
  if constexpr (N > kWidth) {
    return {load<N / 2>(p), load<N / 2>(p + N / 2)};
  } else {
    return decode<N>(get<Shorts<N>>(p), Half{});
  }
}
template <int N, class Half, class = decltype(Half::bits)>
KEXUE_INLINE void store(Half* p, Floats<N> x, bool stream = false) {
  if constexpr (N > kWidth) {
    store<N / 2>(p, x.lo, stream);
    store<N / 2>(p + N / 2, x.hi, stream);
  } else {
    put(p, encode<N>(x, Half{}), stream);
  }
}

// ---- complex: (re, im) pairs in memory, apart as values. Within a value the elements have an
// order of their own (it keeps to 128-bit parts), the same for everything loaded.

// Lane i of a shuffle takes lane at(i) of two vectors side by side.
template <int N>
struct Real {  // first, third of each part of one vector, then of the other
  static constexpr int at(int i) { return i / 4 * 4 + (i % 4 < 2 ? 2 * i % 4 : N + 2 * i % 4); }
};
template <int N>
struct Imaginary {
  static constexpr int at(int i) { return Real<N>::at(i) + 1; }
};
template <int N>
struct Low {  // the lower halves of each part, alternating
  static constexpr int at(int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * N; }
};
template <int N>
struct High {
  static constexpr int at(int i) { return Low<N>::at(i) + 2; }
};

template <class Order, int N, int... I>
KEXUE_INLINE Vector<float, N> shuffle(Vector<float, N> x, Vector<float, N> y, Indices<I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, Order::at(I)...);
#else
  return __builtin_shuffle(x, y, Vector<int32_t, N>{Order::at(I)...});
#endif
}
template <class Order, int N>
KEXUE_INLINE Vector<float, N> shuffle(Vector<float, N> x, Vector<float, N> y) {
  return shuffle<Order, N>(x, y, typename Count<N>::Indices{});
}

template <int N>
KEXUE_INLINE ComplexOf<Floats<N>> load(const Complex* p) {
  if constexpr (N > kWidth) {
    const auto lo = load<N / 2>(p), hi = load<N / 2>(p + N / 2);
    return {{lo.re, hi.re}, {lo.im, hi.im}};
  } else if constexpr (N == 1) {
    return *p;
  } else {
    const auto x = get<Floats<N>>(p), y = get<Floats<N>>(p + N / 2);
    return {shuffle<Real<N>, N>(x, y), shuffle<Imaginary<N>, N>(x, y)};
  }
}
template <int N>
KEXUE_INLINE void store(Complex* p, ComplexOf<Floats<N>> x, bool stream = false) {
  if constexpr (N > kWidth) {
    store<N / 2>(p, {x.re.lo, x.im.lo}, stream);
    store<N / 2>(p + N / 2, {x.re.hi, x.im.hi}, stream);
  } else if constexpr (N == 1) {
    *p = x;
  } else {
    put(p, shuffle<Low<N>, N>(x.re, x.im), stream);
    put(p + N / 2, shuffle<High<N>, N>(x.re, x.im), stream);
  }
}

}  // namespace kexue::KEXUE_ISA
