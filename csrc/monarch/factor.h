// A block-diagonal factor on CPU, as it lies in memory and as it is computed.
//
// It is computed on floats: a complex item is two of them and a complex weight the real matrix
// [[re, -im], [im, re]], whose transpose is that of the conjugate. Rows of a batch go side by
// side into the lanes of registers. A line is one column of a panel of `vectors` registers of
// rows; lines [panel][line][lanes] may come in any order, so that no permutation costs a pass.
#pragma once

#include "common/types.h"

namespace kexue::monarch {

// [rows, columns] of items by strides in items.
struct Rows {
  void* data;
  int64_t row, column;
};

// [blocks, out, in] of items by strides in items.
struct Weights {
  const void* data;
  int64_t block, out, in;
};

// Sizes in items.
struct Factor {
  int64_t blocks, out, in;
};

inline int64_t floats_of(DType dtype) { return dtype == DType::c64 ? 2 : 1; }
inline int64_t item_bytes(DType dtype) {
  return dtype == DType::c64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Columns of rows to lines or back. Run i is `length` floats from column first + i * run_columns
// on (columns in items); its float t is line i * run_lines + lines[t], or t where `lines` is null.
// Lines of rows from `count` on become zero; rows have none.
struct Transfer {
  DType dtype;
  int vectors;
  Rows rows;
  int64_t count;
  int64_t first, runs, run_columns, length;
  float* data;  // of the lines
  int64_t panel, run_lines;
  const int32_t* lines;
  const float* bias;  // by column in floats, added to rows; or null
};

// Cache lines that come next: fetched while something else is computed. In bytes.
struct Ahead {
  const char* data = nullptr;
  int64_t rows = 0, row = 0;    // how many, and from one to the next
  int64_t lines = 0, line = 0;  // of a row, likewise
};

// Line lines[j] of each panel of `to` becomes the sum over i < depth of scalars[j][i] times line i
// of the panel, for j < outs. Lanes without a row may become anything.
struct Product {
  int vectors;
  int64_t rows, outs, depth;
  const float* data;
  int64_t panel;
  const float* scalars;
  int64_t scalars_row;
  float* to;
  int64_t to_panel;
  const int32_t* lines;  // or null: j
  bool far = false;      // `to` is not in a cache of this core's own
  Ahead ahead = {};
};

// The sums over rows i < count of line j at row i times rows[i][c].
struct OuterSum {
  int64_t count;
  const float* lines;  // of two registers
  int64_t panel;
  const float* rows;
  int64_t row;
  bool far = false;  // the sums are not in a cache of this core's own
  Ahead ahead[2] = {};
};

// Where they are added, for j < outs and c < columns, which are a multiple of two registers.
struct SumsAt {
  int64_t outs, columns;
  float* to;   // [outs][columns]
  bool fresh;  // nothing is there yet
};

}  // namespace kexue::monarch
