// Products of matrices that lie in the caches. For *_cpu.cpp files only.
#pragma once

#include "common/counts.h"
#include "common/lanes.h"

namespace kexue::KEXUE_ISA {

constexpr int64_t kColumns = 2 * kWidth;        // of a tile
constexpr int kTile = kWidth == 16 ? 12 : 6;    // its rows, at most
constexpr int64_t kChain = 128;  // terms of a sum that is kept apart: for rounding

// c [rows, columns] = a [rows, depth] b [depth, columns]. Strides in floats; neighbours in a row
// of b or c lie side by side. b can be read up to whole tiles of columns.
struct SmallProduct {
  const float* a;
  int64_t a_row, a_term;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  int64_t rows, columns, depth;
};

// A tile's sums: `rows` times kColumns.
template <int rows>
struct Tile {
  using V = Vector<float, kWidth>;
  V at[rows][2] = {};

  KEXUE_INLINE void add(const float* a, int64_t a_row, int64_t a_term, const float* b,
                        int64_t b_row, int64_t depth) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < depth; ++i) {
      const V x = get<V>(b), y = get<V>(b + kWidth);
      const float* each = a;
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        if (r > 0 && r % 3 == 0) each += 3 * a_row;  // addresses that an instruction can make
        const float scalar = each[r % 3 * a_row];
        at[r][0] += x * scalar;
        at[r][1] += y * scalar;
      }
      a += a_term;
      b += b_row;
    }
  }

  KEXUE_INLINE void write(float* c, int64_t c_row, bool add) const {
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r, c += c_row) {
      put(c, add ? get<V>(c) + at[r][0] : at[r][0], false);
      put(c + kWidth, add ? get<V>(c + kWidth) + at[r][1] : at[r][1], false);
    }
  }

  // the first `columns` alone
  void write_part(float* c, int64_t c_row, bool add, int64_t columns) const {
    float sums[rows * kColumns];
    write(sums, kColumns, false);
    for (int r = 0; r < rows; ++r, c += c_row) {
      for (int64_t j = 0; j < columns; ++j) c[j] = sums[r * kColumns + j] + (add ? c[j] : 0);
    }
  }
};

// `add`: to what c has.
inline void multiply(const SmallProduct& p, bool add) {
  const int64_t tiles = (p.rows + kTile - 1) / kTile;
  for (int64_t column = 0; column < p.columns; column += kColumns) {
    const int64_t columns = p.columns - column;
    for (int64_t from = 0; from < p.depth; from += kChain) {
      const int64_t depth = p.depth - from < kChain ? p.depth - from : kChain;
      const bool more = add || from > 0;
      for (int64_t t = 0; t < tiles; ++t) {  // of almost equal sizes
        const int64_t first = p.rows * t / tiles, end = p.rows * (t + 1) / tiles;
        const float* a = p.a + first * p.a_row + from * p.a_term;
        float* c = p.c + first * p.c_row + column;
        with_int<kTile>(end - first, [&](auto n) {
          constexpr int rows = decltype(n)::value;
          if (more) {
#pragma GCC unroll 12
            for (int r = 0; r < rows; ++r) __builtin_prefetch(c + r * p.c_row, 1);
          }
          Tile<rows> tile;
          tile.add(a, p.a_row, p.a_term, p.b + from * p.b_row + column, p.b_row, depth);
          if (columns >= kColumns) {
            tile.write(c, p.c_row, more);
          } else {
            tile.write_part(c, p.c_row, more, columns);
          }
        });
      }
    }
  }
}

}  // namespace kexue::KEXUE_ISA
