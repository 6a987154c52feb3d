// What threads that multiply by block-diagonal factors share: kernels, buffers, weights as floats.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "common/isa.h"
#include "common/pages.h"
#include "monarch/factor_cpu.h"
#include "common/work.h"

namespace kexue::monarch {

// Floats on cache lines, not initialised.
class Buffer {
 public:
  explicit Buffer(int64_t size = 0)
      : data_(size > 0 ? static_cast<float*>(::operator new(size * sizeof(float), kLine))
                       : nullptr) {}
  float* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Delete {
    void operator()(float* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<float, Delete> data_;
};

// What a call works in, as one piece of memory: each part is asked for before any is made.
class Workspace {
 public:
  // `to` will point to as many floats, on cache lines and not initialised.
  void ask(float** to, int64_t size) {
    asked_.push_back({to, size_});
    size_ += ceil_div(size, kLine) * kLine;
  }

  void make() {
    const int64_t bytes = size_ * int64_t(sizeof(float));
    const int64_t align = bytes < kHugePage ? kLine * sizeof(float) : kHugePage;
    data_.reset(static_cast<float*>(std::aligned_alloc(align, ceil_div(bytes, align) * align)));
    if (!data_ && bytes > 0) throw std::bad_alloc();
    if (bytes >= kHugePage) prefer_huge_pages(data_.get(), bytes);
    for (const auto& [to, at] : asked_) *to = data_.get() + at;
  }

 private:
  static constexpr int64_t kLine = 16, kHugePage = 2 << 20;  // floats, bytes
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::vector<std::pair<float**, int64_t>> asked_;
  int64_t size_ = 0;
  std::unique_ptr<float, Free> data_;
};

struct Kernels {
  int64_t lanes_of_register = KEXUE_FOR_THIS_CPU(monarch_register)();
  decltype(&baseline::monarch_rows_to_lines) rows_to_lines =
      KEXUE_FOR_THIS_CPU(monarch_rows_to_lines);
  decltype(&baseline::monarch_lines_to_rows) lines_to_rows =
      KEXUE_FOR_THIS_CPU(monarch_lines_to_rows);
  decltype(&baseline::monarch_product) product = KEXUE_FOR_THIS_CPU(monarch_product);
  decltype(&baseline::monarch_outer_sum) outer_sum = KEXUE_FOR_THIS_CPU(monarch_outer_sum);
  decltype(&baseline::monarch_unpack_weights) unpack = KEXUE_FOR_THIS_CPU(monarch_unpack_weights);
  decltype(&baseline::monarch_pack_gradient) pack = KEXUE_FOR_THIS_CPU(monarch_pack_gradient);
};

// Rows [from, from + count) of a batch, in panels.
struct Span {
  int64_t from, count;
};

inline Rows at_row(DType dtype, const Rows& rows, int64_t row) {
  return {static_cast<char*>(rows.data) + row * rows.row * item_bytes(dtype), rows.row,
          rows.column};
}

// Rows [i * size, (i + 1) * size) of N.
inline Span span_of(int64_t N, int64_t size, int64_t i) {
  return {i * size, std::min(size, N - i * size)};
}

// The threads worth waking for N rows times so many weights.
inline int64_t jobs_for(int64_t N, int64_t weights, int threads) {
  constexpr int64_t kLeastWork = 1 << 18;
  return std::clamp<int64_t>(N * weights / kLeastWork, 1, threads);
}

// In floats.
inline int64_t weights_of(const Factor& factor, int64_t unit) {
  return factor.blocks * factor.out * factor.in * unit * unit;
}

inline Factor transposed(const Factor& factor) { return {factor.blocks, factor.in, factor.out}; }

// A part of a block of weights: [outs][ins] floats.
struct Scalars {
  const float* data;
  int64_t row;
};

// The blocks of a factor, or of its conjugate transpose, as floats: where they lie if they do,
// and otherwise unpacked, all at once or as they are asked for.
class FloatWeights {
 public:
  FloatWeights(const Kernels& kernels, DType dtype, const Factor& factor, Weights weights,
               bool transpose)
      : kernels_(kernels),
        dtype_(dtype),
        conjugate_(transpose),
        factor_(transpose ? transposed(factor) : factor),
        weights_(weights) {
    if (transpose) std::swap(weights_.out, weights_.in);
    unpacked_ = dtype != DType::f32 || weights_.in != 1;
  }

  void ask_for_all(Workspace& space) {
    if (unpacked_) space.ask(&all_, factor_.blocks * block_size());
  }

  void unpack_all(int64_t jobs) const {
    if (!all_) return;
    share_work(jobs, factor_.blocks, [&](int64_t, int64_t b) {
      unpack(b, 0, factor_.out, all_ + b * block_size());
    });
  }

  // What `part` needs of a buffer of one's own.
  int64_t own_size(int64_t outs) const { return unpacked_ ? outs * row_size() * unit() : 0; }

  Scalars part(int64_t b, int64_t from, int64_t outs, float* own) const {
    if (!unpacked_) {
      const auto* data = static_cast<const float*>(weights_.data);
      return {data + b * weights_.block + from * weights_.out, weights_.out};
    }
    if (all_) {
      return {all_ + b * block_size() + from * unit() * row_size(), row_size()};
    }
    unpack(b, from, outs, own);
    return {own, row_size()};
  }

 private:
  int64_t unit() const { return floats_of(dtype_); }
  int64_t row_size() const { return factor_.in * unit(); }
  int64_t block_size() const { return factor_.out * unit() * row_size(); }

  void unpack(int64_t b, int64_t from, int64_t outs, float* to) const {
    const int64_t first = b * weights_.block + from * weights_.out;
    const auto* data = static_cast<const char*>(weights_.data) + first * item_bytes(dtype_);
    kernels_.unpack({dtype_, data, outs, factor_.in, weights_.out, weights_.in, conjugate_}, to);
  }

  const Kernels& kernels_;
  DType dtype_;
  bool conjugate_, unpacked_;
  Factor factor_;
  Weights weights_;
  float* all_ = nullptr;
};

// Lines of blocks of `items` items. Blocks are an odd number of lines apart, so that lines that
// are alike in each of them do not all meet in one set of a cache.
struct Lines {
  int64_t items, unit;

  int64_t block() const { return items * unit | 1; }
  int64_t at(int64_t item) const { return item / items * block() + item % items * unit; }
};

// A matrix [rows, columns] of items, transposed: the line of item (i, j) in [columns, rows], for
// every float of the items in their order.
inline std::vector<int32_t> transposed_lines(int64_t rows, int64_t columns, const Lines& to) {
  std::vector<int32_t> lines(rows * columns * to.unit);
  int64_t line = 0, left = to.items;  // of a block
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      int32_t* item = &lines[(i * columns + j) * to.unit];
      for (int64_t part = 0; part < to.unit; ++part) item[part] = int32_t(line++);
      if (--left == 0) {
        line += to.block() - to.items * to.unit;
        left = to.items;
      }
    }
  }
  return lines;
}

// Items [from, to) of a block.
struct Part {
  int64_t block, from, to;
};

// Parts of blocks' outputs, no smaller than `least`, for threads to share.
struct Parts {
  int64_t blocks, size, parts;

  Parts(int64_t blocks, int64_t size, int64_t least, int64_t jobs) : blocks(blocks), size(size) {
    parts = std::clamp<int64_t>(ceil_div(4 * jobs, blocks), 1, ceil_div(size, least));
  }
  int64_t count() const { return blocks * parts; }
  Part at(int64_t i) const { return at(i, size); }
  // As many parts of blocks of another size.
  Part at(int64_t i, int64_t size) const {
    return {i / parts, size * (i % parts) / parts, size * (i % parts + 1) / parts};
  }
};

// Before new memory is written: its first touch costs more than what is written.
inline void prepare_output(void* data, int64_t bytes) {
  constexpr int64_t kLargeBytes = 8 << 20;
  if (bytes >= kLargeBytes) prefer_huge_pages(data, bytes);
}

}  // namespace kexue::monarch
