// What the launchers of selective_scan's kernels share.
#pragma once

#include <stdexcept>

#include "scan/selective_scan_split.cuh"

namespace kexue::selective {

template <class F>
void dispatch_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<DType::f32>();
    case DType::bf16: return f.template operator()<DType::bf16>();
    case DType::f16: return f.template operator()<DType::f16>();
    default: throw std::invalid_argument("selective_scan: unknown dtype");
  }
}

template <DType T>
bool is_wide(const Inputs& in, const Strided& x) {
  const auto fits = [](int64_t stride) { return stride % kChannels<T> == 0; };
  return !x.data || (x.channel == 1 && reinterpret_cast<uintptr_t>(x.data) % sizeof(Pack) == 0 &&
                     fits(x.batch) && fits(x.step) && fits(in.cut.run));
}

template <DType T, class S>
bool is_wide(const Inputs& in, const Matrix& m) {
  constexpr int kOfPack = sizeof(S) == sizeof(Complex) ? 2 : kChannels<T>;
  const auto fits = [](int64_t count) { return count % kOfPack == 0; };
  return m.channels && m.state == 1 && reinterpret_cast<uintptr_t>(m.data) % sizeof(Pack) == 0 &&
         fits(m.batch) && fits(m.step) && fits(m.group) && fits(in.n);
}

template <DType T, class S>
void set_wide(Inputs& in, const Strided& grad_out, const void* out) {
  const Strided written = {const_cast<void*>(out), 0, in.d, 1};
  in.wide = is_wide<T>(in, in.u) && is_wide<T>(in, in.delta) && is_wide<T>(in, in.z) &&
            is_wide<T>(in, grad_out);
  in.wide_out = is_wide<T>(in, written);
  in.B.wide = is_wide<T, S>(in, in.B), in.C.wide = is_wide<T, S>(in, in.C);
}

// Cuts the channels into tiles; returns how many.
inline int64_t cut_channels(Inputs& in, int channels) {
  in.cut.run_tiles = ceil_div(in.cut.run, channels);
  return in.d / in.cut.run * in.cut.run_tiles;
}

// The states of a launch, from in.first_state on. Returns whether they are the last.
template <class S>
bool take_states(Inputs& in) {
  const int64_t rest = in.n - in.first_state;
  in.states = rest < kPadded<S> ? rest : kPadded<S>;
  return in.states == rest;
}

// Calls launch for some states after the other, with whether they are the last.
template <class S, class F>
void each_states(Inputs& in, F launch) {
  for (in.first_state = 0; in.first_state < in.n; in.first_state += kPadded<S>) {
    const bool last = take_states<S>(in);
    launch(last);
  }
}

}  // namespace kexue::selective
