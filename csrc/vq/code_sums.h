// Rows by their codes, and sums over each code's rows, shared among threads.
#pragma once

#include <functional>
#include <vector>

#include "vq/code_sums_cpu.h"

namespace kexue {

// A stable counting sort: code k has rows[begin[k]], ..., rows[begin[k + 1] - 1], ascending.
// Indices outside [0, K) are left out.
struct RowsByCode {
  std::vector<int64_t> begin, rows;

  RowsByCode(const int64_t* indices, int64_t N, int64_t K);

  int64_t count(int64_t k) const { return begin[k + 1] - begin[k]; }
  int64_t code_at(int64_t place) const;  // of rows[place]
};

// Calls finish(k, sum) for each code that has rows, sum [d] in float64. The order in which rows
// are added does not depend on the number of threads; the calls' does.
void sum_by_code(DType dtype, const MatrixView& x, int64_t d, const RowsByCode& by_code,
                 int threads, const std::function<void(int64_t, const double*)>& finish);

// counts [K], and sums [K, d] where a code has rows.
void codebook_statistics_on_threads(DType dtype, const MatrixView& x, const int64_t* indices,
                                    int64_t N, int64_t K, int64_t d, int64_t* counts, float* sums,
                                    int threads);

}  // namespace kexue
