// Tiles of a few outputs times one or two registers of rows: their sums stay in registers.
#include "monarch/factor_cpu.h"

#include "common/counts.h"
#include "common/lanes.h"
#include "monarch/exchange.h"

namespace kexue::KEXUE_ISA {

using namespace monarch;

namespace {

using V = Vector<float, kWidth>;

constexpr int64_t kDepth = 256;  // terms of a sum that is kept apart: for L1 and for rounding
constexpr int kOutputs = kWidth == 16 ? 8 : 6;  // of two registers each; of one, twice as many

constexpr int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Fetches what comes next into L2, a share at each of so many steps.
class Fetch {
 public:
  Fetch(const Ahead& ahead, int64_t steps)
      : ahead_(ahead),
        share_(ahead.rows > 0 ? ahead.rows * ahead.lines / steps + 1 : 0),
        at_(ahead.data) {}

  KEXUE_INLINE void step() {
    if (share_ > 0) fetch();
  }

 private:
  __attribute__((noinline)) void fetch() {
    for (int64_t i = 0; i < share_ && row_ < ahead_.rows; ++i) {
      __builtin_prefetch(at_, 0, 2);
      at_ += ahead_.line;
      if (++line_ == ahead_.lines) {
        line_ = 0;
        at_ = ahead_.data + ++row_ * ahead_.row;
      }
    }
  }

  const Ahead& ahead_;
  const int64_t share_;
  const char* at_;
  int64_t row_ = 0, line_ = 0;
};

template <int vectors, int outs>
struct Sums {
  V at[outs][vectors];

  // lines [depth] of `line` floats, scalars [outs][depth]
  KEXUE_INLINE void add(const float* lines, int64_t line, const float* scalars, int64_t row,
                        int64_t depth) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < depth; ++i) {
      V x[vectors];
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) x[v] = get<V>(lines + v * kWidth);
      const float* each = scalars + i;
#pragma GCC unroll 16
      for (int j = 0; j < outs; ++j) {
        if (j > 0 && j % 3 == 0) each += 3 * row;  // addresses that an instruction can make
        const float scalar = each[j % 3 * row];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) at[j][v] += x[v] * scalar;
      }
      lines += line;
    }
  }
};

// Calls body(Int<outs>{}, first) for tiles of almost equal sizes.
template <int most, class Body>
KEXUE_INLINE void for_tiles(int64_t outs, const Body& body) {
  const int64_t tiles = (outs + most - 1) / most;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t from = outs * t / tiles, to = outs * (t + 1) / tiles;
    with_int<most>(to - from, [&](auto n) { body(n, from); });
  }
}

template <int vectors>
void product(const Product& call) {
  constexpr int64_t lanes = vectors * kWidth, most = 2 * kOutputs / vectors;
  const int64_t tiles = ceil_div(call.outs, most) * ceil_div(call.rows, lanes);
  Fetch next(call.ahead, tiles * ceil_div(call.depth, kDepth));
  for (int64_t from = 0; from < call.depth; from += kDepth) {
    const int64_t depth = min(kDepth, call.depth - from);
    for_tiles<most>(call.outs, [&](auto n, int64_t first) {
      constexpr int outs = decltype(n)::value;
      const float* scalars = call.scalars + first * call.scalars_row + from;
      for (int64_t panel = 0; panel * lanes < call.rows; ++panel) {
        float* to = call.to + panel * call.to_panel;
        const auto line_of = [&](int64_t j) {
          return to + (call.lines ? call.lines[first + j] : first + j) * lanes;
        };
        next.step();
        if (call.far) {  // on their way until they are written
          for (int j = 0; j < outs; ++j) __builtin_prefetch(line_of(j), 1);
        }
        Sums<vectors, outs> sums{};
        sums.add(call.data + panel * call.panel + from * lanes, lanes, scalars, call.scalars_row,
                 depth);
#pragma GCC unroll 16
        for (int j = 0; j < outs; ++j) {
          float* line = line_of(j);
#pragma GCC unroll 2
          for (int v = 0; v < vectors; ++v) {
            V sum = sums.at[j][v];
            if (from > 0) sum += get<V>(line + v * kWidth);
            put(line + v * kWidth, sum, false);
          }
        }
      }
    });
  }
}

// ---- few rows: dot products, which read weights as fast as memory gives them

constexpr int64_t kFewRows = 8;
constexpr int64_t kLong = 256;  // terms from where on more than a group of rows gains by it
constexpr int64_t kDots = 1024;  // terms at once

// The sums of four vectors.
KEXUE_INLINE Vector<float, 4> sums_of(V a, V b, V c, V d) {
  const V ab = shuffle<Low<kWidth>, kWidth>(a, b) + shuffle<High<kWidth>, kWidth>(a, b);
  const V cd = shuffle<Low<kWidth>, kWidth>(c, d) + shuffle<High<kWidth>, kWidth>(c, d);
  const V parts = shuffle<Even<2>, kWidth>(ab, cd) + shuffle<Odd<2>, kWidth>(ab, cd);
  float each[kWidth];
  put(each, parts, false);
  auto sum = get<Vector<float, 4>>(each);
  for (int i = 4; i < kWidth; i += 4) sum += get<Vector<float, 4>>(each + i);
  return sum;
}

// sums [outs][rows] of x [rows][kDots] times the weights of each output; `next` weights on are
// those that come next.
template <int rows, int outs>
KEXUE_INLINE void dots(const float* x, const float* const (&weights)[outs], int64_t next,
                       int64_t depth, float* sums) {
  V at[outs * rows] = {};
  int64_t i = 0;
  for (; i + kWidth <= depth; i += kWidth) {
    V each[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) each[r] = get<V>(x + r * kDots + i);
#pragma GCC unroll 8
    for (int j = 0; j < outs; ++j) {
      const V w = get<V>(weights[j] + i);
      __builtin_prefetch(weights[j] + next + i);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) at[j * rows + r] += w * each[r];
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < outs * rows; j += 4) {
    put(sums + j, sums_of(at[j], at[j + 1], at[j + 2], at[j + 3]), false);
  }
  for (; i < depth; ++i) {
    for (int j = 0; j < outs * rows; ++j) sums[j] += weights[j / rows][i] * x[j % rows * kDots + i];
  }
}

// Rows in groups of `rows`, all of which meet a few outputs' weights before the next ones.
template <int rows>
void few_products(const Product& call) {
  constexpr int outs = 8 / rows;
  float x[kFewRows * kDots];
  for (int64_t from = 0; from < call.depth; from += kDots) {
    const int64_t depth = min(kDots, call.depth - from);
    for (int64_t i = 0; i < depth; ++i) {
      const float* line = call.data + (from + i) * kWidth;
      for (int64_t r = 0; r < call.rows; ++r) x[r * kDots + i] = line[r];
    }
    for (int64_t first = 0; first < call.outs; first += outs) {
      const float* weights[outs];
      for (int j = 0; j < outs; ++j) {  // the last one again where there are no more
        weights[j] = call.scalars + min(first + j, call.outs - 1) * call.scalars_row + from;
      }
      for (int64_t row = 0; row < call.rows; row += rows) {
        float sums[outs * rows];
        dots<rows, outs>(x + row * kDots, weights, outs * call.scalars_row, depth, sums);
        for (int j = 0; j < min(outs, call.outs - first); ++j) {
          float* line = call.to + (call.lines ? call.lines[first + j] : first + j) * kWidth + row;
          for (int r = 0; r < min(rows, call.rows - row); ++r) {
            line[r] = from > 0 ? line[r] + sums[j * rows + r] : sums[j * rows + r];
          }
        }
      }
    }
  }
}

// ---- weights

template <class Item>
void unpack_row(const Item* from, int64_t stride, int64_t n, float* to) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kWidth <= n; i += kWidth) store<kWidth>(to + i, load<kWidth>(from + i));
  }
  for (; i < n; ++i) to[i] = load<1>(from + i * stride);
}

// A square at a time, as rows of `from` may be columns of `to`.
template <class Item>
void unpack(const Unpack& call, float* to) {
  constexpr int64_t kSquare = 16;
  const Item* from = static_cast<const Item*>(call.data);
  if (call.in == 1) {
    for (int64_t o = 0; o < call.outs; ++o) {
      unpack_row(from + o * call.out, 1, call.ins, to + o * call.ins);
    }
    return;
  }
  for (int64_t i = 0; i < call.ins; i += kSquare) {
    const int64_t n = min(kSquare, call.ins - i);
    for (int64_t o = 0; o < call.outs; ++o) {
      unpack_row(from + o * call.out + i * call.in, call.in, n, to + o * call.ins + i);
    }
  }
}

void unpack_complex(const Unpack& call, float* to) {
  const Complex* from = static_cast<const Complex*>(call.data);
  for (int64_t o = 0; o < call.outs; ++o) {
    float *re = to + 2 * o * 2 * call.ins, *im = re + 2 * call.ins;
    for (int64_t i = 0; i < call.ins; ++i) {
      const Complex w = from[o * call.out + i * call.in];
      const float b = call.conjugate ? -w.im : w.im;
      re[2 * i] = im[2 * i + 1] = w.re;
      re[2 * i + 1] = -b;
      im[2 * i] = b;
    }
  }
}

template <class Item>
void pack(const Pack& call, Item* to) {
  for (int64_t o = 0; o < call.outs; ++o) {
    const float* from = call.from + o * call.row;
    int64_t i = 0;
    for (; i + kWidth <= call.ins; i += kWidth) store<kWidth>(to + i, load<kWidth>(from + i));
    for (; i < call.ins; ++i) store<1>(to + i, from[i]);
    to += call.ins;
  }
}

void pack_complex(const Pack& call, Complex* to) {
  for (int64_t o = 0; o < call.outs; ++o) {
    const float *re = call.from + 2 * o * call.row, *im = re + call.row;
    for (int64_t i = 0; i < call.ins; ++i) {
      *to++ = {re[2 * i] + im[2 * i + 1], im[2 * i] - re[2 * i + 1]};
    }
  }
}

}  // namespace

int64_t monarch_register() { return kWidth; }

void monarch_product(const Product& call) {
  if (call.vectors == 2) return product<2>(call);
  if (call.rows == 1) return few_products<1>(call);
  if (call.rows == 2) return few_products<2>(call);
  if (call.rows <= 4 || (call.rows <= kFewRows && call.depth >= kLong)) {
    return few_products<4>(call);
  }
  product<1>(call);
}

void monarch_outer_sum(const OuterSum& call, const SumsAt& at) {
  constexpr int64_t lanes = 2 * kWidth;
  const int64_t tiles = ceil_div(at.outs, kOutputs) * (at.columns / lanes);
  Fetch next[]{{call.ahead[0], tiles}, {call.ahead[1], tiles}};
  for (int64_t column = 0; column < at.columns; column += lanes) {
    for_tiles<kOutputs>(at.outs, [&](auto n, int64_t first) {
      constexpr int outs = decltype(n)::value;
      float* tile = at.to + first * at.columns + column;
      for (Fetch& each : next) each.step();
      if (call.far) {
        for (int j = 0; j < outs; ++j) __builtin_prefetch(tile + j * at.columns, 1);
      }
      Sums<2, outs> sums{};
      const float* lines = call.lines + first * lanes;
      const float* rows = call.rows + column;
      for (int64_t from = 0; from < call.count; from += lanes) {
        sums.add(rows, call.row, lines, lanes, min(lanes, call.count - from));
        rows += lanes * call.row;
        lines += call.panel;
      }
#pragma GCC unroll 16
      for (int j = 0; j < outs; ++j) {
        float* to = tile + j * at.columns;
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          V sum = sums.at[j][v];
          if (!at.fresh) sum += get<V>(to + v * kWidth);
          put(to + v * kWidth, sum, false);
        }
      }
    });
  }
}

void monarch_unpack_weights(const Unpack& call, float* to) {
  if (call.dtype == DType::c64) return unpack_complex(call, to);
  with_real(call.dtype, [&](auto item) { unpack<decltype(item)>(call, to); });
}

void monarch_pack_gradient(const Pack& call) {
  if (call.dtype == DType::c64) return pack_complex(call, static_cast<Complex*>(call.to));
  with_real(call.dtype,
            [&](auto item) { pack(call, static_cast<decltype(item)*>(call.to)); });
}

}  // namespace kexue::KEXUE_ISA
