// Pieces of work that threads take as they get to them: who does which must not matter.
#pragma once

#include <atomic>

#include "common/sequences.h"

namespace kexue {

inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Calls body(job, i) for each i < count, with job < jobs one at a time.
template <class Body>
void share_work(int64_t jobs, int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  run_jobs(jobs, [&](int64_t job) {
    for (int64_t i = next++; i < count; i = next++) body(job, i);
  });
}

}  // namespace kexue
