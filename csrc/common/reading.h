// Rows of a matrix, a piece at a time, and sums over them. For *_cpu.cpp files only.
#pragma once

#include "common/lanes.h"
#include "common/matrix.h"

namespace kexue::KEXUE_ISA {

constexpr int64_t kPiece = 256;  // elements that are read at once

template <class Item>
struct Row {
  const Item* data;
  int64_t stride;

  // Elements [from, from + n), n <= kPiece, as floats: where they lie, or in `buffer`.
  KEXUE_INLINE const float* read(int64_t from, int64_t n, float* buffer) const {
    const Item* p = data + from * stride;
    if (stride != 1) {
      for (int64_t i = 0; i < n; ++i) buffer[i] = load<1>(p + i * stride);
      return buffer;
    }
    if constexpr (sizeof(Item) == sizeof(float)) {
      return p;
    } else {
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) store<kWidth>(buffer + i, load<kWidth>(p + i));
      for (; i < n; ++i) buffer[i] = load<1>(p + i);
      return buffer;
    }
  }
};

template <class Item>
KEXUE_INLINE Row<Item> row_of(const MatrixView& matrix, int64_t row) {
  return {static_cast<const Item*>(matrix.data) + row * matrix.row, matrix.column};
}

// Calls body(from, n) for the pieces of [0, size).
template <class Body>
KEXUE_INLINE void for_pieces(int64_t size, const Body& body) {
  for (int64_t from = 0; from < size; from += kPiece) {
    body(from, size - from < kPiece ? size - from : kPiece);
  }
}

// A sum in an order of its own, the same for every instruction set.
struct Sum {
  static constexpr int kLanes = 8;
  double lanes[kLanes] = {};

  // adds term(i) for i < n
  template <class Term>
  KEXUE_INLINE void add(int64_t n, const Term& term) {
    double sums[kLanes];
    for (int j = 0; j < kLanes; ++j) sums[j] = lanes[j];
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      for (int j = 0; j < kLanes; ++j) sums[j] += term(i + j);
    }
    for (int j = 0; i < n; ++i, ++j) sums[j] += term(i);
    for (int j = 0; j < kLanes; ++j) lanes[j] = sums[j];
  }

  KEXUE_INLINE double total() const {
    double sum = 0;
    for (const double lane : lanes) sum += lane;
    return sum;
  }
};

KEXUE_INLINE uint32_t magnitude(float x) { return bits_as<uint32_t>(x) & 0x7fffffffu; }
constexpr uint32_t kInfinite = 0x7f800000u;  // magnitudes from here on are infinite or NaN

KEXUE_INLINE uint32_t largest_magnitude(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = magnitude(x[i]) > largest ? magnitude(x[i]) : largest;
  return largest;
}

// Calls body(Item{}) with the type of the elements.
template <class Body>
KEXUE_INLINE void with_items(DType dtype, const Body& body) {
  if (dtype == DType::bf16) return body(Bf16{});
  if (dtype == DType::f16) return body(F16{});
  body(float{});
}

}  // namespace kexue::KEXUE_ISA
