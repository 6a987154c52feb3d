// How threads share a scan: sequences laid end to end along one axis of steps, cut into chunks,
// and channels, cut into ranges of whole cache lines.
#pragma once

#include <cstdint>
#include <vector>

namespace kexue {

// Sequences of equal length, or, with bounds [count + 1], packed ones. Steps are counted from 0
// over all of them, in each in the order of the scan.
struct Sequences {
  int64_t count, length;
  const int64_t* bounds;  // or null

  int64_t begin(int64_t n) const { return bounds ? bounds[n] : n * length; }
  int64_t size(int64_t n) const { return begin(n + 1) - begin(n); }
  int64_t steps() const { return begin(count); }
  int64_t longest() const;
  int64_t at(int64_t step) const;  // the sequence that has it
};

struct Shares {
  std::vector<int64_t> cuts;      // chunk i: steps [cuts[i], cuts[i + 1])
  std::vector<int64_t> channels;  // range i: [channels[i], channels[i + 1])
  bool independent;               // every chunk begins a sequence

  int64_t chunks() const { return int64_t(cuts.size()) - 1; }
  int64_t ranges() const { return int64_t(channels.size()) - 1; }
};

// Chunks that begin amid a sequence need what the ones before make of their entering states: a
// summary of each, all but the first's and last's, at `summary_cost` of a step's full cost. Such
// cuts are at multiples of `grain` steps of their sequence. `work`, in multiply-adds a step and
// channel, tells how many threads are worth waking.
Shares share(const Sequences& sequences, int64_t channels, int64_t channel_bytes, int64_t grain,
             double summary_cost, int threads, int64_t work = 1);

// Calls job(i) for each i < count, on as many threads as there are jobs.
template <class Job>
void run_jobs(int64_t count, const Job& job) {
  if (count == 1) return job(0);
#if defined(_OPENMP)
#pragma omp parallel for num_threads(count) schedule(static, 1)
#endif
  for (int64_t i = 0; i < count; ++i) job(i);
}

}  // namespace kexue
