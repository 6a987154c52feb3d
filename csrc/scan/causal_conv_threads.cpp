#include "scan/causal_conv_threads.h"

#include <algorithm>

#include "common/isa.h"
#include "common/sequences.h"

namespace kexue {
namespace {

constexpr int64_t kLeastWork = 16 * 1024;  // elements for a thread to be worth its start

}  // namespace

void causal_conv_on_threads(const CausalConv& call, int threads) {
  const int64_t steps = call.B * call.L;
  const int64_t jobs =
      std::clamp<int64_t>(steps * call.d / kLeastWork, 1, std::min<int64_t>(threads, steps));
  const auto kernel = KEXUE_FOR_THIS_CPU(causal_conv);
  run_jobs(jobs, [&](int64_t i) { kernel(call, steps * i / jobs, steps * (i + 1) / jobs); });
}

}  // namespace kexue
