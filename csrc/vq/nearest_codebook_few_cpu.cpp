// Every row and code by the definition, in the order of sums that Sum has: what the recheck of
// nearest_codebook_cpu.cpp computes for the codes it can't tell apart.
#include "vq/nearest_codebook_few_cpu.h"

#include "common/reading.h"

namespace kexue::KEXUE_ISA {
namespace {

static_assert(Sum::kLanes == kLanesOfSum && kPiece % kLanesOfSum == 0);

constexpr int kDoubles = kWidth / 2;               // in a register
constexpr int kParts = kLanesOfSum / kDoubles;     // registers of a sum
constexpr int kAtOnce = kParts > 2 ? 2 : 4;        // rows whose sums stay in registers
using V = Vector<double, kDoubles>;
using Singles = Vector<float, kDoubles>;

int64_t padded(int64_t size) { return (size + kLanesOfSum - 1) / kLanesOfSum * kLanesOfSum; }

// Elements [from, from + n) as floats, with zeros up to a multiple of kLanesOfSum.
template <class Item>
KEXUE_INLINE const float* read_padded(const Row<Item>& row, int64_t from, int64_t n,
                                      float* buffer) {
  const float* p = row.read(from, n, buffer);
  if (n % kLanesOfSum == 0) return p;
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  for (int64_t i = n; i < padded(n); ++i) buffer[i] = 0;
  return buffer;
}

// Adds (x - c)^2, or x c, over a piece to the sums of so many rows.
template <bool kSquares, int kRows>
KEXUE_INLINE void add_piece(const double* rows, int64_t stride, const float* code, int64_t n,
                            double* sums) {
  V sum[kRows][kParts];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kParts; ++j) sum[r][j] = get<V>(sums + r * kLanesOfSum + j * kDoubles);
  }
  for (int64_t i = 0; i < n; i += kLanesOfSum) {
#pragma GCC unroll 4
    for (int j = 0; j < kParts; ++j) {
      const V c = __builtin_convertvector(get<Singles>(code + i + j * kDoubles), V);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const V x = get<V>(rows + r * stride + i + j * kDoubles);
        const V difference = x - c;
        sum[r][j] += kSquares ? difference * difference : x * c;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kParts; ++j) {
      put(sums + r * kLanesOfSum + j * kDoubles, sum[r][j], false);
    }
  }
}

// The same for any number of rows: so many at once, then the rest of them.
template <bool kSquares, int kRows = kAtOnce>
KEXUE_INLINE void add_pieces(const double* rows, int64_t count, int64_t stride, const float* code,
                             int64_t n, double* sums) {
  int64_t r = 0;
  for (; r + kRows <= count; r += kRows) {
    add_piece<kSquares, kRows>(rows + r * stride, stride, code, n, sums + r * kLanesOfSum);
  }
  if constexpr (kRows > 1) {
    if (r == count) return;
    add_pieces<kSquares, kRows - 1>(rows + r * stride, count - r, stride, code, n,
                                    sums + r * kLanesOfSum);
  }
}

double total(const double* lanes) {
  double sum = 0;
  for (int64_t i = 0; i < kLanesOfSum; ++i) sum += lanes[i];
  return sum;
}

// Sums over finite rows and codes are finite: a float's square is far from the largest double.
template <class Item, Metric kMetric>
void look(const NearestCodebook& call, const FewRows& out, int64_t from_code, int64_t to_code) {
  const int64_t stride = padded(call.d);
  float buffer[kPiece];
  for (int64_t k = from_code; k < to_code; ++k) {
    const Row<Item> row = row_of<Item>(call.codebook, k);
    Sum squares;
    for (int64_t i = 0; i < call.N * kLanesOfSum; ++i) out.sums[i] = 0;
    for_pieces(call.d, [&](int64_t from, int64_t n) {
      const float* c = read_padded(row, from, n, buffer);
      add_pieces<kMetric == Metric::l2>(out.rows + from, call.N, stride, c, n, out.sums);
      if (kMetric == Metric::cosine) {
        squares.add(n, [&](int64_t i) { return double(c[i]) * double(c[i]); });
      }
    });
    if (!__builtin_isfinite(total(out.sums))) continue;
    const double norm = kMetric == Metric::cosine ? __builtin_sqrt(squares.total()) : 1;
    for (int64_t i = 0; i < call.N; ++i) {
      const double sum = total(out.sums + i * kLanesOfSum);
      const double score = kMetric == Metric::l2 ? -sum : norm > 0 ? sum / norm : 0.0;
      if (out.index[i] >= 0 && !(score > out.score[i])) continue;
      out.score[i] = score;
      out.index[i] = k;
    }
  }
}

}  // namespace

bool nearest_codebook_widen(const NearestCodebook& call, int64_t n, double* to) {
  const int64_t size = padded(call.d);
  uint32_t largest = 0;
  with_items(call.dtype, [&](auto item) {
    const auto row = row_of<decltype(item)>(call.x, n);
    float buffer[kPiece];
    for_pieces(call.d, [&](int64_t from, int64_t count) {
      const float* p = read_padded(row, from, count, buffer);
      for (int64_t i = 0; i < padded(count); ++i) to[from + i] = p[i];
      const uint32_t found = largest_magnitude(p, count);
      largest = found > largest ? found : largest;
    });
  });
  if (largest < kInfinite) return true;
  for (int64_t i = 0; i < size; ++i) to[i] = 0;
  return false;
}

void nearest_codebook_look(const NearestCodebook& call, const FewRows& out, int64_t from,
                           int64_t to) {
  with_items(call.dtype, [&](auto item) {
    using Item = decltype(item);
    if (call.metric == Metric::l2) return look<Item, Metric::l2>(call, out, from, to);
    if (call.metric == Metric::dot) return look<Item, Metric::dot>(call, out, from, to);
    return look<Item, Metric::cosine>(call, out, from, to);
  });
}

}  // namespace kexue::KEXUE_ISA
