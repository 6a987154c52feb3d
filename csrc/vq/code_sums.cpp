#include "vq/code_sums.h"

#include <algorithm>

#include "common/isa.h"
#include "common/work.h"

namespace kexue {
namespace {

// Rows, in the order of their codes, are cut into blocks: by their number alone.
constexpr int64_t kLeastBlock = 256;
constexpr int64_t kMostBlocks = 64;

// The sums of a block's codes that other blocks share.
struct Edges {
  std::vector<double> sums;  // [blocks, 2, d]: of the code at its start, of one that starts later
  int64_t d;

  double* at(int64_t block, bool later) { return &sums[(2 * block + later) * d]; }
};

class SumByCode {
 public:
  SumByCode(DType dtype, const MatrixView& x, int64_t d, const RowsByCode& by_code)
      : dtype_(dtype),
        x_(x),
        by_code_(by_code),
        total_(by_code.rows.size()),
        block_(std::max(kLeastBlock, ceil_div(total_, kMostBlocks))),
        edges_{std::vector<double>(2 * blocks() * d), d} {}

  int64_t blocks() const { return ceil_div(total_, block_); }

  template <class Finish>
  void sum_block(int64_t block, double* sum, const Finish& finish) {
    const int64_t from = block * block_, to = std::min(total_, from + block_);
    int64_t k = by_code_.code_at(from);
    for (int64_t place = from; place < to;) {
      while (by_code_.begin[k + 1] <= place) ++k;
      const int64_t begin = by_code_.begin[k], end = by_code_.begin[k + 1];
      const bool whole = begin >= from && end <= to;
      double* out = whole ? sum : edges_.at(block, place > from);
      const int64_t next = std::min(to, end);
      std::fill(out, out + edges_.d, 0.0);
      add_(dtype_, x_, &by_code_.rows[place], next - place, edges_.d, out);
      if (whole) finish(k, sum);
      place = next;
    }
  }

  // The code that goes on from one block to the next, if it began in the former.
  template <class Finish>
  void join_blocks(int64_t former, const Finish& finish) {
    const int64_t from = former * block_, cut = from + block_;
    const int64_t k = by_code_.code_at(cut), begin = by_code_.begin[k];
    if (begin < from || begin >= cut) return;
    double* sum = edges_.at(former, begin > from);
    const int64_t last = (by_code_.begin[k + 1] - 1) / block_;
    for (int64_t block = former + 1; block <= last; ++block) {
      const double* more = edges_.at(block, false);
      for (int64_t i = 0; i < edges_.d; ++i) sum[i] += more[i];
    }
    finish(k, sum);
  }

 private:
  const DType dtype_;
  const MatrixView& x_;
  const RowsByCode& by_code_;
  const int64_t total_, block_;
  Edges edges_;
  decltype(&baseline::code_sums_add) add_ = KEXUE_FOR_THIS_CPU(code_sums_add);
};

}  // namespace

RowsByCode::RowsByCode(const int64_t* indices, int64_t N, int64_t K) : begin(K + 1, 0) {
  const auto kept = [&](int64_t i) { return indices[i] >= 0 && indices[i] < K; };
  for (int64_t i = 0; i < N; ++i) {
    if (kept(i)) ++begin[indices[i] + 1];
  }
  for (int64_t k = 0; k < K; ++k) begin[k + 1] += begin[k];
  rows.resize(begin[K]);
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < N; ++i) {
    if (kept(i)) rows[next[indices[i]]++] = i;
  }
}

int64_t RowsByCode::code_at(int64_t place) const {
  return std::upper_bound(begin.begin(), begin.end(), place) - begin.begin() - 1;
}

void sum_by_code(DType dtype, const MatrixView& x, int64_t d, const RowsByCode& by_code,
                 int threads, const std::function<void(int64_t, const double*)>& finish) {
  SumByCode sums(dtype, x, d, by_code);
  const int64_t blocks = sums.blocks(), jobs = std::min<int64_t>(threads, blocks);
  if (blocks == 0) return;
  std::vector<double> own(jobs * d);
  share_work(jobs, blocks,
             [&](int64_t job, int64_t block) { sums.sum_block(block, &own[job * d], finish); });
  for (int64_t block = 0; block + 1 < blocks; ++block) sums.join_blocks(block, finish);
}

void codebook_statistics_on_threads(DType dtype, const MatrixView& x, const int64_t* indices,
                                    int64_t N, int64_t K, int64_t d, int64_t* counts, float* sums,
                                    int threads) {
  const RowsByCode by_code(indices, N, K);
  for (int64_t k = 0; k < K; ++k) counts[k] = by_code.count(k);
  const auto finish = KEXUE_FOR_THIS_CPU(code_sums_finish);
  sum_by_code(dtype, x, d, by_code, threads, [&](int64_t k, const double* sum) {
    finish({DType::f32, 1.0, 0.0, nullptr, sums + k * d}, sum, d);
  });
}

}  // namespace kexue
