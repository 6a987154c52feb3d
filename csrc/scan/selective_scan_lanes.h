// The arithmetic of selective_scan on a block of channels at a time, for float and complex states.
#pragma once

#include "common/exp.h"
#include "scan/linear_scan.h"

namespace kexue::KEXUE_ISA {

template <class S>
constexpr int kParts = sizeof(S) / sizeof(float);
template <class S>
constexpr int kBlock = kParts<S> == 1 && kWidth < 16 ? 2 * kWidth : kWidth;

template <class S>
struct LanesOf {
  using type = Floats<kBlock<S>>;
};
template <>
struct LanesOf<Complex> {
  using type = ComplexOf<Floats<kBlock<Complex>>>;
};
template <class S>
using Lanes = typename LanesOf<S>::type;  // a block's states of one index
template <class S>
using Reals = Floats<kBlock<S>>;

template <class S>
KEXUE_INLINE Lanes<S> get_lanes(const float* p) {
  constexpr int N = kBlock<S>;
  if constexpr (kParts<S> == 1) {
    return load<N>(p);
  } else {
    return {load<N>(p), load<N>(p + N)};
  }
}
template <class S>
KEXUE_INLINE void put_lanes(float* p, Lanes<S> x) {
  constexpr int N = kBlock<S>;
  if constexpr (kParts<S> == 1) {
    store<N>(p, x);
  } else {
    store<N>(p, x.re);
    store<N>(p + N, x.im);
  }
}

// A few registers that advance side by side; a divisor of any number of whole tiles' elements.
constexpr int kWide = 4 * kWidth;

template <int M, int N>
KEXUE_INLINE Floats<M> repeated(Floats<N> x) {
  if constexpr (M == N) {
    return x;
  } else {
    return {repeated<M / 2, N>(x), repeated<M / 2, N>(x)};
  }
}

template <class F>
KEXUE_INLINE F scale(F s, F x) {
  return s * x;
}
template <class F>
KEXUE_INLINE ComplexOf<F> scale(F s, ComplexOf<F> x) {
  return {s * x.re, s * x.im};
}

// Re(x y)
template <class F>
KEXUE_INLINE F real_mul(F x, F y) {
  return x * y;
}
template <class F>
KEXUE_INLINE F real_mul(ComplexOf<F> x, ComplexOf<F> y) {
  return x.re * y.re - x.im * y.im;
}

// Re(conj(x) y)
template <class F>
KEXUE_INLINE F real_dot(F x, F y) {
  return x * y;
}
template <class F>
KEXUE_INLINE F real_dot(ComplexOf<F> x, ComplexOf<F> y) {
  return x.re * y.re + x.im * y.im;
}

// y is 2 Re(C x) where states are complex
template <class S>
constexpr float kOutputScale = kParts<S> == 1 ? 1.0f : 2.0f;

// A, as exp(dt A) takes it, and itself.
template <class S>
struct Rate {
  static constexpr int kSize = 2 * kBlock<S>;
  Reals<S> log2;
  Lanes<S> A;

  KEXUE_INLINE explicit Rate(const float* p)
      : log2(load<kBlock<S>>(p)), A(load<kBlock<S>>(p + kBlock<S>)) {}

  // exp(dt A) for dt [steps, N], to [steps, N]; rounds steps up to whole wide values.
  KEXUE_INLINE void decays(const float* dt, int64_t steps, float* to) const {
    constexpr int N = kBlock<S>;
    const auto rates = repeated<kWide, N>(log2);
    for (int64_t at = 0; at < steps * N; at += kWide) {
      store<kWide>(to + at, exp2<kWide>(load<kWide>(dt + at) * rates));
    }
  }

  static void prepare(float A, int64_t lane, float* to) {
    to[lane] = float(A * kLog2E);
    to[kBlock<S> + lane] = A;
  }
};

template <>
struct Rate<Complex> {
  static constexpr int N = kBlock<Complex>;
  static constexpr int kSize = 5 * N;
  Floats<N> log2, turns, more_turns;  // turns are quarters, as two terms
  Lanes<Complex> A;

  KEXUE_INLINE explicit Rate(const float* p)
      : log2(load<N>(p)),
        turns(load<N>(p + N)),
        more_turns(load<N>(p + 2 * N)),
        A{load<N>(p + 3 * N), load<N>(p + 4 * N)} {}

  // As above, to [steps, parts, N].
  KEXUE_INLINE void decays(const float* dt, int64_t steps, float* to) const {
    for (int64_t s = 0; s < steps; ++s) {
      put_lanes<Complex>(to + 2 * s * N, decay(load<N>(dt + s * N)));
    }
  }
  KEXUE_INLINE Lanes<Complex> decay(Floats<N> dt) const {
    const Floats<N> t = dt * turns;
    const auto turn = turned<N>(t, product_error<N>(dt, turns, t) + dt * more_turns);
    return scale(exp2<N>(dt * log2), turn);
  }

  static void prepare(Complex A, int64_t lane, float* to) {
    const double turns = A.im * 0.63661977236758134308;
    to[lane] = A.re * kLog2E;
    to[N + lane] = float(turns);
    to[2 * N + lane] = float(turns - float(turns));
    to[3 * N + lane] = A.re;
    to[4 * N + lane] = A.im;
  }
};

// B or C of one state index, for a block: by steps from a tile, or the same at each.
template <class S, bool per_step>
struct Coefficients {
  const float* p;
  int64_t room;
  KEXUE_INLINE Coefficients(const float* tile, int64_t k, int64_t room)
      : p(tile + k * kParts<S> * room), room(room) {}
  KEXUE_INLINE Lanes<S> at(int64_t s) const {
    if constexpr (kParts<S> == 1) {
      return splat<kBlock<S>>(p[s]);
    } else {
      return {splat<kBlock<S>>(p[s]), splat<kBlock<S>>(p[room + s])};
    }
  }
};
template <class S>
struct Coefficients<S, false> {
  Lanes<S> value;
  KEXUE_INLINE Coefficients(const float* block, int64_t k, int64_t)
      : value(get_lanes<S>(block + k * kParts<S> * kBlock<S>)) {}
  KEXUE_INLINE Lanes<S> at(int64_t) const { return value; }
};

}  // namespace kexue::KEXUE_ISA
