// What gradients of both ops are made of: chunks of rows, and sums over them.
#pragma once

#include <algorithm>

#include "monarch/workspace.h"

namespace kexue::monarch {

constexpr int64_t kRows = 64;            // of a chunk, whose products are summed first
constexpr int64_t kChunks = 16;          // whose sums are summed then

// The gradient of a factor: floats [blocks, out, row], rows padded.
class WeightSums {
 public:
  WeightSums(const Kernels& kernels, DType dtype, const Factor& factor, int64_t N)
      : kernels_(kernels),
        dtype_(dtype),
        factor_(factor),
        unit_(floats_of(dtype)),
        row_(ceil_div(factor.in * unit_, 2 * kernels.lanes_of_register) * 2 *
             kernels.lanes_of_register),
        chunks_(ceil_div(N, kRows)) {}

  int64_t row() const { return row_; }

  void ask(Workspace& space) {
    const int64_t size = factor_.blocks * block();
    space.ask(&sum_, size);
    if (chunks_ > kChunks) space.ask(&total_, size);
  }

  // The c-th chunk's share of items of a block.
  void add(int64_t c, const Part& part, const OuterSum& share) const {
    const int64_t first = part.block * block() + part.from * unit_ * row_;
    const int64_t outs = (part.to - part.from) * unit_;
    kernels_.outer_sum(share, {outs, row_, sum_ + first, c % kChunks == 0});
    if (total_ && ((c + 1) % kChunks == 0 || c + 1 == chunks_)) move(c, first, outs * row_);
  }

  void finish(void* gradient, int64_t jobs) const {
    share_work(jobs, factor_.blocks, [&](int64_t, int64_t b) {
      const float* found = (total_ ? total_ : sum_) + b * block();
      char* to = static_cast<char*>(gradient) + b * factor_.out * factor_.in * item_bytes(dtype_);
      kernels_.pack({dtype_, factor_.out, factor_.in, found, row_, to});
    });
  }

 private:
  int64_t block() const { return factor_.out * unit_ * row_; }

  void move(int64_t c, int64_t first, int64_t size) const {
    const float* sum = sum_ + first;
    float* total = total_ + first;
    if (c < kChunks) {
      std::copy_n(sum, size, total);
    } else {
      for (int64_t i = 0; i < size; ++i) total[i] += sum[i];
    }
  }

  const Kernels& kernels_;
  const DType dtype_;
  const Factor factor_;
  const int64_t unit_, row_, chunks_;
  float *sum_ = nullptr, *total_ = nullptr;
};

// One thread's.
struct Own {
  float *lines, *made, *rows;
};

// What both ops' gradients have in common: chunks of rows in panels of two registers.
struct Chunks {
  const Kernels kernels;
  DType dtype;
  int64_t unit, lanes, panels;  // panels of a chunk

  explicit Chunks(DType dtype)
      : dtype(dtype),
        unit(floats_of(dtype)),
        lanes(2 * kernels.lanes_of_register),
        panels(kRows / lanes) {}

  // Lines [panel][items] of a chunk, one after another.
  int64_t size(int64_t items) const { return kRows * items * unit; }

  Transfer transfer(const Rows& memory, const Span& rows, int64_t first, int64_t items,
                    float* data) const {
    const int64_t floats = items * unit;
    return {dtype, 2,      at_row(dtype, memory, rows.from), rows.count, first, 1, 0,
            floats, data, floats * lanes, 0, nullptr, nullptr};
  }

  void ask(Workspace& space, Own& own, int64_t ins, int64_t outs, int64_t row) const {
    space.ask(&own.lines, size(ins));
    space.ask(&own.made, size(outs));
    space.ask(&own.rows, kRows * row);
  }

  // Columns [first, first + items) as floats [rows, row] in a thread's own, and the length of a
  // row.
  Scalars rows_of(const Rows& memory, const Span& rows, int64_t first, int64_t items, int64_t row,
                  const Own& own) const {
    const Rows at = at_row(dtype, memory, rows.from);
    const bool floats = dtype == DType::f32 || dtype == DType::c64;
    if (floats && memory.column == 1) {  // copied, as rows may be far apart and meet in caches
      const float* from = static_cast<const float*>(at.data) + first * unit;
      for (int64_t i = 0; i < rows.count; ++i) {
        std::copy_n(from + i * memory.row * unit, items * unit, own.rows + i * row);
      }
      return {own.rows, row};
    }
    kernels.rows_to_lines(transfer(memory, rows, first, items, own.lines));
    return rows_of(own.lines, items * unit * lanes, rows, items, row, own);
  }

  // The same of lines.
  Scalars rows_of(float* lines, int64_t panel, const Span& rows, int64_t items, int64_t row,
                  const Own& own) const {
    kernels.lines_to_rows({DType::f32, 2, {own.rows, row, 1}, rows.count, 0, 1, 0,
                           items * unit, lines, panel, 0, nullptr, nullptr});
    return {own.rows, row};
  }
};

}  // namespace kexue::monarch
