#include "vq/nearest_codebook_few.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "common/isa.h"
#include "common/work.h"

namespace kexue {
namespace {

constexpr int64_t kLeastWork = 1 << 18;  // products for a thread to be worth its start

// What one thread finds in its part of the codes.
struct Part {
  std::vector<double> sums, score;
  std::vector<int64_t> index;

  explicit Part(int64_t rows) : sums(rows * kLanesOfSum), score(rows), index(rows, -1) {}
};

}  // namespace

void nearest_codebook_few_on_threads(const NearestCodebook& call, int threads) {
  const auto widen = KEXUE_FOR_THIS_CPU(nearest_codebook_widen);
  const auto look = KEXUE_FOR_THIS_CPU(nearest_codebook_look);
  const int64_t padded = ceil_div(call.d, kLanesOfSum) * kLanesOfSum;
  std::vector<double> rows(call.N * padded);
  bool finite[kFewRows];
  for (int64_t n = 0; n < call.N; ++n) finite[n] = widen(call, n, &rows[n * padded]);

  const int64_t jobs = std::clamp<int64_t>((call.N + 1) * call.K * call.d / kLeastWork, 1,
                                           std::min<int64_t>(threads, call.K));
  std::vector<Part> parts(jobs, Part(call.N));
  run_jobs(jobs, [&](int64_t i) {
    Part& part = parts[i];
    look(call, {rows.data(), part.sums.data(), part.score.data(), part.index.data()},
         call.K * i / jobs, call.K * (i + 1) / jobs);
  });
  for (int64_t n = 0; n < call.N; ++n) {
    const Part* best = nullptr;  // the first of equals
    for (const Part& part : parts) {
      if (part.index[n] >= 0 && (!best || part.score[n] > best->score[n])) best = &part;
    }
    call.indices[n] = finite[n] && best ? best->index[n] : -1;
  }
}

}  // namespace kexue
