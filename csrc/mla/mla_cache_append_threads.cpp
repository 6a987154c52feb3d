#include "mla/mla_cache_append_threads.h"

#include <algorithm>

#include "common/isa.h"
#include "common/sequences.h"
#include "mla/mla_cache_append_cpu.h"

namespace kexue {
namespace {

constexpr int64_t kLeastWork = 32 * 1024;  // elements for a thread to be worth its start

// A slot is one thread's, whatever the pattern of those in use.
int64_t owner(int64_t slot, int64_t jobs) {
  return int64_t((uint64_t(slot) * 0x9e3779b97f4a7c15u >> 32) % uint64_t(jobs));
}

}  // namespace

bool mla_cache_append_in_reach(const MlaCacheAppend& call) {
  const int64_t slots = call.num_blocks * call.pages.size;
  return std::all_of(call.slots, call.slots + call.T,
                     [&](int64_t slot) { return slot >= -1 && slot < slots; });
}

void mla_cache_append_on_threads(const MlaCacheAppend& call, int threads) {
  const auto append = KEXUE_FOR_THIS_CPU(mla_cache_append_token);
  const int64_t work = call.T * (call.dc + call.dr);
  const int64_t jobs = std::clamp<int64_t>(work / kLeastWork, 1, threads);
  run_jobs(jobs, [&](int64_t job) {
    for (int64_t t = 0; t < call.T; ++t) {
      if (call.slots[t] >= 0 && owner(call.slots[t], jobs) == job) append(call, t);
    }
  });
}

}  // namespace kexue
