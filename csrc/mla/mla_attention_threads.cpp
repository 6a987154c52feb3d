#include "mla/mla_attention_threads.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "common/isa.h"
#include "common/work.h"
#include "mla/mla_attention_cpu.h"
#include "mla/mla_attention_spaces.h"

namespace kexue {
namespace {

constexpr int64_t kLeastWork = 1 << 18;  // multiply-adds for a thread to be worth its start

int64_t key_blocks(int64_t tokens) { return ceil_div(tokens, kMlaKeyBlock); }
int64_t query_blocks(int64_t tokens) { return ceil_div(tokens, kMlaQueryBlock); }

struct Plan {
  std::vector<MlaQueryBlock> blocks;  // a sequence's last one first, which takes longest
  int64_t jobs;

  Plan(const MlaAttention& call, int threads) {
    int64_t scores = 0;
    for (int64_t h = 0; h < call.H; ++h) {
      for (int64_t n = 0; n < call.sequences; ++n) {
        const int64_t first = call.bounds[n], last = call.bounds[n + 1], tokens = last - first;
        for (int64_t i = query_blocks(tokens) - 1; i >= 0; --i) {
          const int64_t start = first + i * kMlaQueryBlock;
          blocks.push_back({h, first, last, start, std::min(kMlaQueryBlock, last - start)});
        }
        scores += tokens * tokens;
      }
    }
    const int64_t work = scores * (call.dk + call.dr + call.dv);
    jobs = std::clamp<int64_t>(work / kLeastWork, 1, threads);
  }
};

}  // namespace

// Blocks are taken in the order in which they have their turns, so the one that is waited for is
// under way.
void MlaTurns::wait(int64_t key_block, int64_t query_block) const {
  const std::atomic_ref<int64_t> now(now_[key_block]);
  for (int tries = 0; now.load(std::memory_order_acquire) != query_block; ++tries) {
    if (tries > 1000) std::this_thread::yield();
  }
}

void MlaTurns::pass(int64_t key_block, int64_t query_block) const {
  std::atomic_ref<int64_t>(now_[key_block]).store(query_block - 1, std::memory_order_release);
}

void mla_attention_on_threads(const MlaAttention& call, int threads) {
  const Plan plan(call, threads);
  const MlaSpaces spaces(plan.jobs, KEXUE_FOR_THIS_CPU(mla_attention_space)(call));
  const auto attend = KEXUE_FOR_THIS_CPU(mla_attention_block);
  share_work(plan.jobs, plan.blocks.size(), [&](int64_t job, int64_t i) {
    attend(call, plan.blocks[i], spaces.at(job));
  });
}

void mla_attention_backward_on_threads(const MlaAttention& call,
                                       const MlaAttentionGradient& gradient, int threads) {
  const Plan plan(call, threads);
  const MlaSpaces spaces(plan.jobs, KEXUE_FOR_THIS_CPU(mla_attention_backward_space)(call));
  const auto differentiate = KEXUE_FOR_THIS_CPU(mla_attention_backward_block);

  std::vector<int64_t> turns;                      // by head, sequence and key block
  std::vector<int64_t> begin(plan.blocks.size());  // of the block's
  for (size_t i = 0; i < plan.blocks.size(); ++i) {
    const MlaQueryBlock& block = plan.blocks[i];
    const int64_t tokens = block.last - block.first;
    if (block.start + block.count == block.last) {
      turns.resize(turns.size() + key_blocks(tokens), query_blocks(tokens) - 1);
    }
    begin[i] = int64_t(turns.size()) - key_blocks(tokens);
  }
  share_work(plan.jobs, plan.blocks.size(), [&](int64_t job, int64_t i) {
    differentiate(call, gradient, plan.blocks[i], MlaTurns(turns.data() + begin[i]),
                  spaces.at(job));
  });
}

}  // namespace kexue
