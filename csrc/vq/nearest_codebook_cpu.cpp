// A tile is a panel of rows, one per lane, times a panel of codes: its products stay in registers.
#include "vq/nearest_codebook_cpu.h"

#include "common/reading.h"

namespace kexue::KEXUE_ISA {
namespace {

using V = Vector<float, kWidth>;
using Mask = Vector<int32_t, kWidth>;

constexpr int kVectors = 2;                    // of rows in a panel
constexpr int kCodes = kWidth == 16 ? 12 : 6;  // 12 or 24 registers of products
constexpr int64_t kRows = kVectors * kWidth;

constexpr int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }

bool is_wild(float bias) { return bias == -__builtin_inff(); }
bool is_valid(float bias) { return bias == bias; }

bool any(Mask mask) {
#if defined(__AVX512F__)
  if constexpr (kWidth == 16) {
    const auto bits = bits_as<__m512i>(mask);
    return _mm512_test_epi32_mask(bits, bits) != 0;
  }
#endif
#if defined(__AVX2__)
  if constexpr (kWidth == 8) return _mm256_movemask_ps(bits_as<__m256>(mask)) != 0;
#endif
#if defined(__SSE2__)
  if constexpr (kWidth == 4) return _mm_movemask_ps(bits_as<__m128>(mask)) != 0;
#endif
  int32_t either = 0;
  for (int i = 0; i < kWidth; ++i) either |= mask[i];
  return either != 0;
}

// ---- what is known of the codes

template <class Item>
void find_centre(const NearestCodebook& call, int64_t step, double* sums, float* centre) {
  float buffer[kPiece];
  // body(c, from, n) for the pieces of the codes that are finite
  const auto for_codes = [&](const auto& body, const auto& after) {
    for (int64_t k = 0; k < call.K; k += step) {
      const Row<Item> code = row_of<Item>(call.codebook, k);
      bool finite = true;
      for_pieces(call.d, [&](int64_t from, int64_t n) {
        finite = finite && largest_magnitude(code.read(from, n, buffer), n) < kInfinite;
      });
      if (!finite) continue;
      for_pieces(call.d,
                 [&](int64_t from, int64_t n) { body(code.read(from, n, buffer), from, n); });
      after();
    }
  };
  int64_t count = 0, shorter = 0;
  for (int64_t i = 0; i < call.d; ++i) sums[i] = 0;
  for_codes(
      [&](const float* c, int64_t from, int64_t n) {
        for (int64_t i = 0; i < n; ++i) sums[from + i] += c[i];
      },
      [&] { ++count; });
  for (int64_t i = 0; i < call.d; ++i) centre[i] = count > 0 ? float(sums[i] / count) : 0.0f;
  Sum gain;
  for_codes(
      [&](const float* c, int64_t from, int64_t n) {
        gain.add(n, [&](int64_t i) { return centre[from + i] * (2.0 * c[i] - centre[from + i]); });
      },
      [&] {
        shorter += gain.total() > 0;
        gain = Sum{};
      });
  if (2 * shorter > count) return;
  for (int64_t i = 0; i < call.d; ++i) centre[i] = 0.0f;
}

template <class Item>
void describe(const NearestCodebook& call, const CodeFacts& facts, int64_t k) {
  const Row<Item> code = row_of<Item>(call.codebook, k);
  float buffer[kPiece];
  uint32_t largest = 0;
  Sum squares;
  for_pieces(call.d, [&](int64_t from, int64_t n) {
    const float* c = code.read(from, n, buffer);
    const uint32_t found = largest_magnitude(c, n);
    largest = found > largest ? found : largest;
    const float* centre = facts.centre + from;
    squares.add(n, [&](int64_t i) {
      const double difference = double(c[i]) - double(centre[i]);
      return difference * difference;
    });
  });
  const double square = squares.total(), norm = __builtin_sqrt(square);
  const bool cosine = call.metric == Metric::cosine;
  if (cosine) facts.norm[k] = norm;
  facts.length[k] = cosine ? 1.0f : float(norm * (1 + 0x1p-20) + 0x1p-100);
  if (largest >= kInfinite) {
    facts.bias[k] = __builtin_nanf("");
  } else if (facts.length[k] > kLongest) {
    facts.bias[k] = -__builtin_inff();
  } else {
    facts.bias[k] = call.metric == Metric::l2 ? -float(square / 2) : 0.0f;
  }
}

// ---- packing

template <class Item>
void pack_code(const NearestCodebook& call, const CodeFacts& facts, int64_t k, float* to) {
  const bool cosine = call.metric == Metric::cosine;
  if (k >= call.K || !is_valid(facts.bias[k]) || is_wild(facts.bias[k])) {
    for (int64_t i = 0; i < call.d; ++i) to[i * kCodes] = 0.0f;
    to[call.d * kCodes] = k < call.K ? facts.bias[k] : __builtin_nanf("");
    return;
  }
  const double scale = cosine && facts.norm[k] > 0 ? 1 / facts.norm[k] : 0;
  const Row<Item> code = row_of<Item>(call.codebook, k);
  float buffer[kPiece];
  for_pieces(call.d, [&](int64_t from, int64_t n) {
    const float* c = code.read(from, n, buffer);
    const float* centre = facts.centre + from;
    float* out = to + from * kCodes;
    if (cosine) {
      for (int64_t i = 0; i < n; ++i) out[i * kCodes] = float(c[i] * scale);
    } else {
      for (int64_t i = 0; i < n; ++i) out[i * kCodes] = c[i] - centre[i];
    }
  });
  to[call.d * kCodes] = facts.bias[k];
}

// A piece of a row, centred, into its lane; the sum of its squares.
KEXUE_INLINE double pack_piece(const float* x, const float* centre, int64_t n, float* to) {
  V squares{};
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const V centred = load<kWidth>(x + i) - load<kWidth>(centre + i);
    squares += centred * centred;
    for (int j = 0; j < kWidth; ++j) to[(i + j) * kRows] = centred[j];
  }
  double sum = 0;
  for (int j = 0; j < kWidth; ++j) sum += squares[j];
  for (; i < n; ++i) {
    const float centred = x[i] - centre[i];
    to[i * kRows] = centred;
    sum += double(centred) * centred;
  }
  return sum;
}

float row_length(int64_t d, uint32_t largest, double square) {
  if (largest >= kInfinite) return __builtin_nanf("");
  if (largest == 0 && square == 0) return 0.0f;
  const double length = __builtin_sqrt(square) * (1 + 0x1p-15) + __builtin_sqrt(d) * 0x1p-62;
  return length <= kLongest ? float(length) : __builtin_inff();
}

template <class Item>
void pack_panel(const NearestCodebook& call, const float* centre, const RowPanels& rows,
                int64_t first, float* panel) {
  double squares[kRows] = {};
  uint32_t largest[kRows] = {};
  const int64_t count = min(kRows, rows.rows - first);
  float buffer[kPiece];
  for_pieces(call.d, [&](int64_t from, int64_t n) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = rows.from + first + r;
      const Row<Item> row = row_of<Item>(call.x, rows.list ? rows.list[at] : at);
      const float* x = row.read(from, n, buffer);
      const uint32_t found = largest_magnitude(x, n);
      largest[r] = found > largest[r] ? found : largest[r];
      squares[r] += pack_piece(x, centre + from, n, panel + from * kRows + r);
    }
  });
  for (int64_t r = 0; r < kRows; ++r) {
    const float length = r < count ? row_length(call.d, largest[r], squares[r]) : 0.0f;
    if (r < count) rows.length[first + r] = length;
    if (r < count && length <= kLongest) continue;
    for (int64_t i = 0; i < call.d; ++i) panel[i * kRows + r] = 0.0f;
  }
}

// ---- products

struct Products {
  V at[kCodes][kVectors];
};

KEXUE_INLINE Products multiply(const float* rows, const float* codes, int64_t d) {
  Products sum{};
#pragma GCC unroll 4
  for (int64_t i = 0; i < d; ++i) {
    const V x0 = get<V>(rows), x1 = get<V>(rows + kWidth);
#pragma GCC unroll 12
    for (int j = 0; j < kCodes; ++j) {
      sum.at[j][0] += x0 * codes[j];
      sum.at[j][1] += x1 * codes[j];
    }
    rows += kRows;
    codes += kCodes;
  }
#pragma GCC unroll 12
  for (int j = 0; j < kCodes; ++j) {
    sum.at[j][0] += codes[j];
    sum.at[j][1] += codes[j];
  }
  return sum;
}

// Calls visit(scores, row panel, code panel) for all tiles, a panel of codes at a time.
template <class Visit>
KEXUE_INLINE void for_tiles(int64_t d, const RowPanels& rows, const CodePanels& codes,
                            const Visit& visit) {
  for (int64_t c = 0; c < codes.count; ++c) {
    for (int64_t r = 0; r < rows.count; ++r) {
      visit(multiply(rows.data + r * d * kRows, codes.data + c * (d + 1) * kCodes, d), r, c);
    }
  }
}

// ---- the best two

KEXUE_INLINE void keep_best(const Products& scores, int vector, int32_t first, float* best,
                            float* second, int32_t* index) {
  V most = get<V>(best), next = get<V>(second);
  Mask at = get<Mask>(index);
#pragma GCC unroll 12
  for (int j = 0; j < kCodes; ++j) {
    const V score = scores.at[j][vector];
    const Mask better = score > most;
    next = better ? most : (score > next ? score : next);
    most = better ? score : most;
    at = better ? Mask{} + (first + j) : at;
  }
  put(best, most, false);
  put(second, next, false);
  put(index, at, false);
}

// ---- float64

// Whether a score reaches its row's bar.
KEXUE_INLINE bool any_reaches(const Products& scores, const float* bars) {
  const V bar0 = get<V>(bars), bar1 = get<V>(bars + kWidth);
  Mask found{};
#pragma GCC unroll 12
  for (int j = 0; j < kCodes; ++j) found |= (scores.at[j][0] >= bar0) | (scores.at[j][1] >= bar1);
  return any(found);
}

constexpr int64_t kLook = 64;  // elements that are compared without asking

template <class Item>
bool same_code(const NearestCodebook& call, int64_t k, int64_t other) {
  const Row<Item> a = row_of<Item>(call.codebook, k), b = row_of<Item>(call.codebook, other);
  float a_buffer[kPiece], b_buffer[kPiece];
  for (int64_t from = 0; from < call.d; from += kPiece) {
    const int64_t n = min(kPiece, call.d - from);
    const float *p = a.read(from, n, a_buffer), *q = b.read(from, n, b_buffer);
    for (int64_t i = 0; i < n;) {
      if (p[i] != q[i]) return false;  // most often at once
      const int64_t end = min(n, i + kLook);
      int32_t differ = 0;
      for (; i < end; ++i) differ |= p[i] != q[i];
      if (differ) return false;
    }
  }
  return true;
}

template <class Item>
double exact_score(const NearestCodebook& call, const CodeFacts& facts, int64_t row, int64_t k) {
  const Row<Item> x = row_of<Item>(call.x, row), code = row_of<Item>(call.codebook, k);
  float x_buffer[kPiece], c_buffer[kPiece];
  Sum sum;
  for_pieces(call.d, [&](int64_t from, int64_t n) {
    const float *p = x.read(from, n, x_buffer), *q = code.read(from, n, c_buffer);
    if (call.metric == Metric::l2) {
      sum.add(n, [&](int64_t i) {
        const double difference = double(p[i]) - double(q[i]);
        return difference * difference;
      });
    } else {
      sum.add(n, [&](int64_t i) { return double(p[i]) * double(q[i]); });
    }
  });
  const double total = sum.total();
  if (call.metric == Metric::l2) return -total;
  if (call.metric == Metric::dot) return total;
  return facts.norm[k] > 0 ? total / facts.norm[k] : 0.0;
}

// Codes come in ascending order, so the first of equals stays.
template <class Item>
void consider(const NearestCodebook& call, const CodeFacts& facts, int64_t row, int64_t k,
              double& best, int64_t& index) {
  if (index >= 0 && same_code<Item>(call, k, index)) return;
  const double score = exact_score<Item>(call, facts, row, k);
  if (index >= 0 && !(score > best)) return;
  best = score;
  index = k;
}

template <class Item>
void recheck(const NearestCodebook& call, const CodeFacts& facts, const RowPanels& rows,
             const CodePanels& codes, const BestExactly& out) {
  for_tiles(call.d, rows, codes, [&](const Products& scores, int64_t r, int64_t c) {
    const float* bar = out.bar + r * kRows;
    if (!any_reaches(scores, bar)) return;
    for (int j = 0; j < kCodes; ++j) {
      float score[kRows];
      put(score, scores.at[j][0], false);
      put(score + kWidth, scores.at[j][1], false);
      for (int64_t i = 0; i < min(kRows, rows.rows - r * kRows); ++i) {
        if (!(score[i] >= bar[i])) continue;
        const int64_t at = r * kRows + i, place = rows.from + at;
        consider<Item>(call, facts, rows.list ? rows.list[place] : place,
                       codes.first + c * kCodes + j, out.score[at], out.index[at]);
      }
    }
  });
}

}  // namespace

SearchTile nearest_codebook_tile() { return {kRows, kCodes}; }

void nearest_codebook_centre(const NearestCodebook& call, int64_t step, double* sums,
                             float* centre) {
  with_items(call.dtype, [&](auto item) { find_centre<decltype(item)>(call, step, sums, centre); });
}

void nearest_codebook_describe(const NearestCodebook& call, const CodeFacts& facts, int64_t from,
                               int64_t to) {
  with_items(call.dtype, [&](auto item) {
    for (int64_t k = from; k < to; ++k) describe<decltype(item)>(call, facts, k);
  });
}

void nearest_codebook_pack_codes(const NearestCodebook& call, const CodeFacts& facts,
                                 const CodePanels& codes) {
  with_items(call.dtype, [&](auto item) {
    for (int64_t i = 0; i < codes.count * kCodes; ++i) {
      float* panel = codes.data + i / kCodes * (call.d + 1) * kCodes;
      pack_code<decltype(item)>(call, facts, codes.first + i, panel + i % kCodes);
    }
  });
}

void nearest_codebook_pack_rows(const NearestCodebook& call, const CodeFacts& facts,
                                const RowPanels& rows) {
  with_items(call.dtype, [&](auto item) {
    for (int64_t i = 0; i < rows.count; ++i) {
      pack_panel<decltype(item)>(call, facts.centre, rows, i * kRows,
                                 rows.data + i * call.d * kRows);
    }
  });
}

void nearest_codebook_search(int64_t d, const RowPanels& rows, const CodePanels& codes,
                             const BestScores& out) {
  for_tiles(d, rows, codes, [&](const Products& scores, int64_t r, int64_t c) {
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = r * kRows + i * kWidth;
      keep_best(scores, i, int32_t(c * kCodes), out.best + at, out.second + at, out.index + at);
    }
  });
}

void nearest_codebook_recheck(const NearestCodebook& call, const CodeFacts& facts,
                              const RowPanels& rows, const CodePanels& codes,
                              const BestExactly& out) {
  with_items(call.dtype,
             [&](auto item) { recheck<decltype(item)>(call, facts, rows, codes, out); });
}

}  // namespace kexue::KEXUE_ISA
