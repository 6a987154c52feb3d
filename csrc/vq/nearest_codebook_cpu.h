// The CPU kernels of nearest_codebook: one thread's part, one copy per instruction set.
//
// Rows and codes are multiplied in panels: tile.rows rows [d][tile.rows], and tile.codes codes
// [d + 1][tile.codes], their biases last. The panels' missing codes have a NaN for bias, which
// makes every score one, and no comparison with a NaN holds.
#pragma once

#include "build_config.h"
#include "vq/nearest_codebook.h"

namespace kexue {

struct SearchTile {
  int64_t rows, codes;
};

// What is found out of the codes first.
struct CodeFacts {
  const float* centre;  // [d], zeros unless l2
  float* bias;          // [K]; -infinity: longer than kLongest; NaN: not finite
  float* length;        // [K] of what is multiplied, rounded up
  double* norm;         // [K] for cosine, or null
};

// Codes [first, first + ...) of the codebook.
struct CodePanels {
  float* data;
  int64_t count, first;
};

// Rows in panels: the i-th is row list[from + i], or from + i without a list. Of each, `length`
// is |x - centre| rounded up, 0 for zeros alone, infinity beyond kLongest, NaN if not finite;
// the last two are multiplied as zeros.
struct RowPanels {
  float* data;
  int64_t count;
  const int64_t* list;
  int64_t from, rows;
  float* length;  // [rows]
};

// The best and second best scores so far, and the best's place among the panels' codes, kept
// where no code is better. [count * tile.rows], index [tile.rows * count].
struct BestScores {
  float *best, *second;
  int32_t* index;
};

// The codes whose float32 score is at least `bar` are compared in float64.
struct BestExactly {
  const float* bar;  // [count * tile.rows]
  double* score;     // [rows]
  int64_t* index;    // [rows], -1: none yet
};

// nearest_codebook_centre: [d] what is taken away from rows and codes for l2, which leaves every
// distance as it is and vectors shorter, whose scores are rounded less. It is the mean of every
// step-th finite code, or zeros where that makes most of them longer. `sums` [d]: to work in.
#define KEXUE_NEAREST_CODEBOOK(isa, unused)                                                        \
  namespace isa {                                                                                  \
  SearchTile nearest_codebook_tile();                                                              \
  void nearest_codebook_centre(const NearestCodebook&, int64_t step, double* sums, float* centre); \
  void nearest_codebook_describe(const NearestCodebook&, const CodeFacts&, int64_t from,           \
                                 int64_t to);                                                      \
  void nearest_codebook_pack_codes(const NearestCodebook&, const CodeFacts&, const CodePanels&);   \
  void nearest_codebook_pack_rows(const NearestCodebook&, const CodeFacts&, const RowPanels&);     \
  void nearest_codebook_search(int64_t d, const RowPanels&, const CodePanels&, const BestScores&); \
  void nearest_codebook_recheck(const NearestCodebook&, const CodeFacts&, const RowPanels&,        \
                                const CodePanels&, const BestExactly&);                            \
  }
KEXUE_ISAS(KEXUE_NEAREST_CODEBOOK, )
#undef KEXUE_NEAREST_CODEBOOK

}  // namespace kexue
