// The nearest code of each row: the parameters of one search and the bound on its rounding.
//
// Scores are largest for the nearest code. In float32, with a row a and a code b (l2: both after
// `centre` was taken away; cosine: b divided by its length), the score is a.b + bias, where bias
// is -|b|^2 / 2 for l2 and 0 otherwise.
#pragma once

#include <limits>

#include "common/matrix.h"

namespace kexue {

enum class Metric : int { l2 = 0, cosine = 1, dot = 2 };

struct NearestCodebook {
  DType dtype;
  Metric metric;
  bool exact;
  int64_t N, K, d;
  MatrixView x, codebook;
  int64_t* indices;  // [N], out
};

// Longer rows and codes are left out of float32: the products and squares of others are finite.
constexpr float kLongest = 0x1p60f;

// How far a float32 score may be from the true one, for a row and a code at most so long.
//
// With u = 2^-24 the roundings are: of the operands, when they are centred or normalised, 2u of
// |a||b|; of the d steps of the product, gamma = d u / (1 - d u) of |a||b|; of bias, u of |b|^2
// / 2; of their sum, u of |a||b| + |b|^2 / 2. The first factor pays for the bounds' being in
// terms of rounded values, the last line for what is too small to be a normal number. `tie` is
// what double precision, which decides, makes of a squared distance: closer codes may tie in it.
inline double score_error(Metric metric, int64_t d, double row, double code) {
  constexpr double u = 0x1p-24;
  const double steps = double(d) * u;
  if (steps > 0.25) return std::numeric_limits<double>::infinity();
  const double gamma = steps / (1 - steps);
  const double square = metric == Metric::l2 ? u * code * code : 0;
  const double both = (row + code) * (row + code);
  const double tie = metric == Metric::l2 ? double(d + 4) * 0x1p-53 * both : 0;
  return (1 + 4 * gamma + 8 * u) * ((gamma + 3 * u) * row * code + square) + tie +
         double(d + 4) * 0x1p-125 * (1 + row + code);
}

}  // namespace kexue
