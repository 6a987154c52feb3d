// nearest_codebook for few rows: one thread's part, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "vq/nearest_codebook.h"

namespace kexue {

constexpr int64_t kFewRows = 8;     // with more, packing the codes pays for itself
constexpr int64_t kLanesOfSum = 8;  // to a multiple of which the rows are padded with zeros

// All in float64. Codes come in ascending order, so the first of equals stays.
struct FewRows {
  const double* rows;  // [N, padded d]
  double* sums;        // [N, kLanesOfSum] to work in
  double* score;       // [N], largest for the nearest code
  int64_t* index;      // [N], -1: none yet
};

// nearest_codebook_widen: [padded d] of the n-th row, zeros if it is not finite; whether it is.
// nearest_codebook_look: takes codes [from, to) into account, each of which is read once.
#define KEXUE_NEAREST_CODEBOOK_FEW(isa, unused)                                               \
  namespace isa {                                                                             \
  bool nearest_codebook_widen(const NearestCodebook&, int64_t n, double* row);                \
  void nearest_codebook_look(const NearestCodebook&, const FewRows&, int64_t from, int64_t to); \
  }
KEXUE_ISAS(KEXUE_NEAREST_CODEBOOK_FEW, )
#undef KEXUE_NEAREST_CODEBOOK_FEW

}  // namespace kexue
