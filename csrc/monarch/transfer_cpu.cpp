// Rows of memory to lines and back: squares of one register by as many rows, transposed.
#include "monarch/exchange.h"
#include "monarch/factor_cpu.h"

namespace kexue::KEXUE_ISA {

using namespace monarch;

namespace {

using V = Vector<float, kWidth>;

struct Square {
  V at[kWidth];
};

template <int part>
KEXUE_INLINE void exchange(Square& x) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if (i & part) continue;
    const V a = x.at[i], b = x.at[i + part];
    x.at[i] = shuffle<Even<part>, kWidth>(a, b);
    x.at[i + part] = shuffle<Odd<part>, kWidth>(a, b);
  }
}

KEXUE_INLINE void transpose(Square& x) {
  // within parts of four: pairs of neighbours, then pairs of pairs
#pragma GCC unroll 4
  for (int i = 0; i < kWidth; i += 4) {
    const V a = x.at[i], b = x.at[i + 1], c = x.at[i + 2], d = x.at[i + 3];
    const V ab = shuffle<Low<kWidth>, kWidth>(a, b), ab2 = shuffle<High<kWidth>, kWidth>(a, b);
    const V cd = shuffle<Low<kWidth>, kWidth>(c, d), cd2 = shuffle<High<kWidth>, kWidth>(c, d);
    x.at[i] = shuffle<Even<2>, kWidth>(ab, cd);
    x.at[i + 1] = shuffle<Odd<2>, kWidth>(ab, cd);
    x.at[i + 2] = shuffle<Even<2>, kWidth>(ab2, cd2);
    x.at[i + 3] = shuffle<Odd<2>, kWidth>(ab2, cd2);
  }
  if constexpr (kWidth >= 8) exchange<4>(x);
  if constexpr (kWidth >= 16) exchange<8>(x);
}

// One run of a register of rows, of which `rows` are there.
template <class Item>
struct Run {
  const Transfer& call;
  int64_t unit;
  int64_t next;  // from one run to the one after
  Item* first;   // at the first row
  float* lines;
  int64_t line, rows;

  Run(const Transfer& call, int64_t row, int64_t i)
      : call(call), unit(floats_of(call.dtype)), line(call.vectors * kWidth) {
    next = call.runs > 1 ? call.run_columns * unit : call.length;
    const int64_t column = call.first + i * call.run_columns;
    first = static_cast<Item*>(call.rows.data) + row * call.rows.row * unit +
            column * call.rows.column * unit;
    lines = call.data + row / line * call.panel + row % line + i * call.run_lines * line;
    rows = call.count - row < kWidth ? call.count - row : kWidth;
  }

  KEXUE_INLINE Item* at(int64_t row, int64_t t) const {
    return first + row * call.rows.row * unit + t / unit * call.rows.column * unit + t % unit;
  }
  KEXUE_INLINE float* line_of(int64_t t) const {
    return lines + (call.lines ? call.lines[t] : t) * line;
  }

  // body(t) for squares of neighbours, rest(t) for what is left
  template <class Body, class Rest>
  KEXUE_INLINE void for_squares(const Body& body, const Rest& rest) const {
    int64_t t = 0;
    if (call.rows.column == 1) {
      for (; t + kWidth <= call.length; t += kWidth) body(t);
    }
    for (; t < call.length; ++t) rest(t);
  }

  void to_lines() const {
    for_squares(
        [&](int64_t t) {
          const Item* from = first + t;
          Square x;
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) {
            const Item* row = from + i * call.rows.row * unit;
            x.at[i] = i < rows ? load<kWidth>(row) : V{};
            if (i < rows) __builtin_prefetch(row + next);
          }
          transpose(x);
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) put(line_of(t + i), x.at[i], false);
        },
        [&](int64_t t) {
          float* to = line_of(t);
          for (int i = 0; i < kWidth; ++i) to[i] = i < rows ? load<1>(at(i, t)) : 0.0f;
        });
  }

  void to_rows(const float* bias) const {
    for_squares(
        [&](int64_t t) {
          Square x;
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) x.at[i] = get<V>(line_of(t + i));
          transpose(x);
          const V shift = bias ? get<V>(bias + t) : V{};
#pragma GCC unroll 16
          for (int i = 0; i < kWidth; ++i) {
            if (i >= rows) break;
            store<kWidth>(first + t + i * call.rows.row * unit, bias ? x.at[i] + shift : x.at[i]);
          }
        },
        [&](int64_t t) {
          const float* from = line_of(t);
          for (int64_t i = 0; i < rows; ++i) {
            store<1>(at(i, t), bias ? from[i] + bias[t] : from[i]);
          }
        });
  }
};

// body(run, i) for each register of rows and run i; `whole` panels: those without rows too.
template <class Item, class Body>
KEXUE_INLINE void for_runs(const Transfer& call, bool whole, const Body& body) {
  const int64_t line = call.vectors * kWidth;
  const int64_t rows = whole ? (call.count + line - 1) / line * line : call.count;
  for (int64_t row = 0; row < rows; row += kWidth) {
    for (int64_t i = 0; i < call.runs; ++i) body(Run<Item>(call, row, i), i);
  }
}

}  // namespace

void monarch_rows_to_lines(const Transfer& call) {
  with_real(call.dtype, [&](auto item) {
    for_runs<decltype(item)>(call, true, [](const auto& run, int64_t) { run.to_lines(); });
  });
}

void monarch_lines_to_rows(const Transfer& call) {
  const int64_t unit = floats_of(call.dtype);
  with_real(call.dtype, [&](auto item) {
    for_runs<decltype(item)>(call, false, [&](const auto& run, int64_t i) {
      const int64_t column = call.first + i * call.run_columns;
      run.to_rows(call.bias ? call.bias + column * unit : nullptr);
    });
  });
}

}  // namespace kexue::KEXUE_ISA
