#include "scan/selective_state_update_threads.h"

#include <algorithm>

#include "common/isa.h"
#include "common/sequences.h"

namespace kexue {
namespace {

constexpr int64_t kLeastWork = 32 * 1024;  // states for a thread to be worth its start

}  // namespace

void state_update_on_threads(const StateUpdate& call, int threads) {
  const int64_t rows = call.batch * call.H * call.P;
  const int64_t jobs =
      std::clamp<int64_t>(rows * call.n / kLeastWork, 1, std::min<int64_t>(threads, rows));
  const auto kernel = KEXUE_FOR_THIS_CPU(selective_state_update);
  run_jobs(jobs, [&](int64_t i) { kernel(call, rows * i / jobs, rows * (i + 1) / jobs); });
}

}  // namespace kexue
