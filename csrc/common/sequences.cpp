#include "common/sequences.h"

#include <algorithm>

namespace kexue {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kLeastWork = 16 * 1024;  // elements for a thread to be worth its start

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

struct Chunking {
  int64_t count;
  double first, other;  // lengths, as shares of all steps
  double time;          // as a share of one thread's
};

// With T = 1 the time of one thread for all steps: the first chunk runs while the others up to
// the last but one are summarised; then they all run.
Chunking chunking(const Sequences& sequences, double summary_cost, int64_t threads) {
  if (threads == 1) return {1, 1, 0, 1};
  if (!sequences.bounds && sequences.count % threads == 0) {
    const double each = 1.0 / threads;
    return {threads, each, each, each};
  }
  const double longest = double(sequences.longest()) / sequences.steps();
  const double other =
      std::max(1 / (threads + summary_cost), (1 - summary_cost * longest) / threads);
  const double first = summary_cost * std::min(other, longest);
  return {threads + 1, first, other, first + other};
}

int64_t snap(const Sequences& sequences, int64_t step, int64_t grain) {
  if (step >= sequences.steps()) return sequences.steps();
  const int64_t begin = sequences.begin(sequences.at(step));
  return begin + (step - begin) / grain * grain;
}

}  // namespace

int64_t Sequences::longest() const {
  if (!bounds) return length;
  int64_t most = 0;
  for (int64_t n = 0; n < count; ++n) most = std::max(most, size(n));
  return most;
}

int64_t Sequences::at(int64_t step) const {
  if (!bounds) return step / length;
  return std::upper_bound(bounds, bounds + count + 1, step) - bounds - 1;
}

Shares share(const Sequences& sequences, int64_t channels, int64_t channel_bytes, int64_t grain,
             double summary_cost, int threads, int64_t work) {
  const int64_t steps = sequences.steps();
  const int64_t lines = ceil_div(channels * channel_bytes, kLineBytes);
  const int64_t most = std::clamp<int64_t>(steps * channels * work / kLeastWork, 1, threads);
  int64_t ranges = 1;
  Chunking best{1, 1, 0, 2};
  for (int64_t r = 1; r <= std::min(most, lines); ++r) {
    const int64_t chunks = std::min(most / r, std::max<int64_t>(1, steps / (4 * grain)));
    const Chunking found = chunking(sequences, summary_cost, chunks);
    const double width = double(ceil_div(lines, r)) / lines;
    const double time = found.time * width;
    if (time < best.time) {
      best = found;
      best.time = time;
      ranges = r;
    }
  }

  Shares shares{{0}, {0}, true};
  for (int64_t i = 1; i <= best.count; ++i) {
    const double until = i == best.count ? 1 : best.first + (i - 1) * best.other;
    const int64_t cut = snap(sequences, int64_t(until * steps + 0.5), grain);
    if (cut <= shares.cuts.back()) continue;
    shares.cuts.push_back(cut);
    if (cut < steps && cut != sequences.begin(sequences.at(cut))) shares.independent = false;
  }
  const int64_t line = std::max<int64_t>(1, kLineBytes / channel_bytes);
  for (int64_t i = 1; i <= ranges; ++i) {
    shares.channels.push_back(std::min(channels, lines * i / ranges * line));
  }
  return shares;
}

}  // namespace kexue
