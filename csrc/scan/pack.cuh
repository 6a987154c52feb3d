// 16 bytes of one row: 4 float, 8 half or bfloat16, 2 complex64, and their states in float.
#pragma once

#include "scan/gpu.cuh"
#include "scan/linear_scan.h"

namespace kexue {

template <DType>
struct Element;

template <>
struct Element<DType::f32> {
  using Stored = uint32_t;
  using State = float;
  static constexpr uint32_t kOnes[2] = {0x3f800000, 0x3f800000};  // alternating words of 1
  static KEXUE_DEVICE void unpack(Pack p, State (&x)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = float_of_bits(p.word[k]);
  }
  static KEXUE_DEVICE Pack pack(const State (&x)[4]) {
    return {{bits_of_float(x[0]), bits_of_float(x[1]), bits_of_float(x[2]), bits_of_float(x[3])}};
  }
};

template <>
struct Element<DType::bf16> {
  using Stored = uint16_t;
  using State = float;
  static constexpr uint32_t kOnes[2] = {0x3f803f80, 0x3f803f80};
  static KEXUE_DEVICE void unpack(Pack p, State (&x)[8]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      x[2 * k] = float_of_bits(p.word[k] << 16);
      x[2 * k + 1] = float_of_bits(p.word[k] & 0xffff0000);
    }
  }
  static KEXUE_DEVICE Pack pack(const State (&x)[8]) {
    return {{bfloats_of_floats(x[0], x[1]), bfloats_of_floats(x[2], x[3]),
             bfloats_of_floats(x[4], x[5]), bfloats_of_floats(x[6], x[7])}};
  }
};

template <>
struct Element<DType::f16> {
  using Stored = uint16_t;
  using State = float;
  static constexpr uint32_t kOnes[2] = {0x3c003c00, 0x3c003c00};
  static KEXUE_DEVICE void unpack(Pack p, State (&x)[8]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) floats_of_halves(p.word[k], x[2 * k], x[2 * k + 1]);
  }
  static KEXUE_DEVICE Pack pack(const State (&x)[8]) {
    return {{halves_of_floats(x[0], x[1]), halves_of_floats(x[2], x[3]),
             halves_of_floats(x[4], x[5]), halves_of_floats(x[6], x[7])}};
  }
};

template <>
struct Element<DType::c64> {
  using Stored = uint64_t;
  using State = Complex;
  static constexpr uint32_t kOnes[2] = {0x3f800000, 0};
  static KEXUE_DEVICE void unpack(Pack p, State (&x)[2]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      x[k] = {float_of_bits(p.word[2 * k]), float_of_bits(p.word[2 * k + 1])};
    }
  }
  static KEXUE_DEVICE Pack pack(const State (&x)[2]) {
    return {{bits_of_float(x[0].re), bits_of_float(x[0].im), bits_of_float(x[1].re),
             bits_of_float(x[1].im)}};
  }
};

template <DType T>
using StoredOf = typename Element<T>::Stored;
template <DType T>
using StateOf = typename Element<T>::State;
template <DType T>
constexpr int kChannels = sizeof(Pack) / sizeof(StoredOf<T>);  // of one Pack

template <DType T>
KEXUE_DEVICE Pack ones() {
  constexpr uint32_t even = Element<T>::kOnes[0], odd = Element<T>::kOnes[1];
  return {{even, odd, even, odd}};
}

// A thread's channels: neighbours where rows are read by vectors, else kVectors apart, so that
// neighbouring threads read neighbouring elements.
constexpr int kVectors = 8;  // Packs of a tile's row: 128 bytes

template <bool VECTOR>
constexpr int kGap = VECTOR ? 1 : kVectors;

// An element, in every channel.
template <DType T>
KEXUE_DEVICE Pack splat(StoredOf<T> element) {
  StoredOf<T> x[kChannels<T>];
#pragma unroll
  for (auto& copy : x) copy = element;
  Pack row;
  memcpy(&row, x, sizeof row);
  return row;
}

// The row at p; `fill` where there is no channel (the first `live` of the Pack exist).
template <DType T, bool VECTOR>
KEXUE_DEVICE Pack load_row(const StoredOf<T>* p, int64_t stride, int live, Pack fill) {
  if (VECTOR) return live ? load_stream(p) : fill;
  StoredOf<T> x[kChannels<T>];
  memcpy(x, &fill, sizeof fill);
#pragma unroll
  for (int k = 0; k < kChannels<T>; ++k, p += kGap<VECTOR> * stride) {
    if (k < live) x[k] = *p;
  }
  memcpy(&fill, x, sizeof fill);
  forget(fill);  // else it is kept in more registers, unpacked
  return fill;
}

template <DType T, bool VECTOR>
KEXUE_DEVICE void store_row(StoredOf<T>* p, int live, Pack row) {
  if (VECTOR) {
    if (live) store_stream(p, row);
    return;
  }
  StoredOf<T> x[kChannels<T>];
  memcpy(x, &row, sizeof row);
#pragma unroll
  for (int k = 0; k < kChannels<T>; ++k) {
    if (k < live) p[k * kGap<VECTOR>] = x[k];
  }
}

template <DType T>
struct States {
  StateOf<T> channel[kChannels<T>];
};

// A row of [sequences, D] states; zeros if there are none.
template <DType T, bool VECTOR>
KEXUE_DEVICE States<T> load_states(const void* data, int64_t offset, int live) {
  const StateOf<T>* p = static_cast<const StateOf<T>*>(data) + offset;
  States<T> state = {};
#pragma unroll
  for (int k = 0; k < kChannels<T>; ++k) {
    if (data && k < live) state.channel[k] = p[k * kGap<VECTOR>];
  }
  return state;
}

template <DType T, bool VECTOR>
KEXUE_DEVICE void store_states(void* data, int64_t offset, int live, const States<T>& state) {
  StateOf<T>* p = static_cast<StateOf<T>*>(data) + offset;
#pragma unroll
  for (int k = 0; k < kChannels<T>; ++k) {
    if (k < live) p[k * kGap<VECTOR>] = state.channel[k];
  }
}

}  // namespace kexue
