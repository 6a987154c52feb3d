#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "common/work.h"
#include "mla/mla_attention_matmul_cpu.h"
#include "mla/mla_attention_spaces.h"

namespace kexue {
namespace {

constexpr int64_t kLeastWork = 1 << 18;  // multiply-adds for a thread to be worth its start
constexpr int64_t kParts = 4;            // for each thread, so that they end together

// Tall parts, as the columns are made ready for each.
std::vector<MlaMatmulPart> parts_of(const MlaMatmul& call, int64_t jobs) {
  const int64_t across = ceil_div(call.columns, kMlaMatmulColumns);
  const int64_t down = ceil_div(kParts * jobs, across * call.count);
  const int64_t rows = ceil_div(ceil_div(call.rows, down), kMlaMatmulRows) * kMlaMatmulRows;
  std::vector<MlaMatmulPart> parts;
  for (int64_t n = 0; n < call.count; ++n) {
    for (int64_t j = 0; j < call.columns; j += kMlaMatmulColumns) {
      for (int64_t r = 0; r < call.rows; r += rows) {
        parts.push_back({n, r, std::min(rows, call.rows - r), j,
                         std::min(kMlaMatmulColumns, call.columns - j)});
      }
    }
  }
  return parts;
}

}  // namespace

void mla_matmul_on_threads(const MlaMatmul& call, int threads) {
  const int64_t work = call.count * call.rows * call.columns * call.depth;
  const int64_t jobs = std::clamp<int64_t>(work / kLeastWork, 1, threads);
  const auto parts = parts_of(call, jobs);
  const MlaSpaces spaces(jobs, KEXUE_FOR_THIS_CPU(mla_matmul_space)());
  const auto compute = KEXUE_FOR_THIS_CPU(mla_matmul_part);
  share_work(jobs, parts.size(),
             [&](int64_t job, int64_t i) { compute(call, parts[i], spaces.at(job)); });
}

}  // namespace kexue
