// The forward: softmax over keys as they come, a block at a time.
#include "common/exp.h"
#include "mla/mla_attention_tiles.h"

namespace kexue::KEXUE_ISA {
namespace {

using V = Vector<float, kWidth>;
using Columns = Floats<kColumns>;

template <class Item>
class Forward {
 public:
  Forward(const MlaAttention& call, float* space) : call_(call) {
    Space memory(space);
    queries_ = memory.take((call.dk + call.dr) * kQueryRow);
    weights_ = memory.take(kMlaKeyBlock * kQueryRow);
    sums_ = memory.take(call.dv * kQueryRow);
    top_ = memory.take(kMlaQueryBlock);
    total_ = memory.take(kMlaQueryBlock);
    taken_ = memory.taken();
  }

  int64_t taken() const { return taken_; }

  void run(const MlaQueryBlock& block) {
    const auto [head, first, last, start, count] = block;
    pack_columns<Item>({call_.q_nope, head, start}, count, call_.dk, queries_);
    pack_columns<Item>({call_.q_rope, head, start}, count, call_.dr,
                       queries_ + call_.dk * kQueryRow);
    for (int64_t i = 0; i < kMlaQueryBlock; ++i) {
      top_[i] = -kInfinity;
      total_[i] = 0;
    }
    for (int64_t i = 0; i < call_.dv * kQueryRow; ++i) sums_[i] = 0;
    for_key_blocks(call_, block, [&](const KeyBlock& keys) {
      for (int64_t lane = 0; lane < block.count; lane += kColumns) meet(block.head, keys, lane);
    });
    for (int64_t i = 0; i < count; ++i) {
      call_.lse[head * call_.T + start + i] = float(kLn2 * top_[i] + __builtin_log(total_[i]));
      total_[i] = 1 / total_[i];
    }
    unpack_columns<Item>(sums_, total_, count, call_.dv, {call_.out, head, start});
  }

 private:
  void meet(int64_t head, const KeyBlock& keys, int64_t lane) {
    const int64_t seen = keys.seen(lane);
    if (seen == 0) return;
    score(call_, head, keys.start, seen, queries_ + lane, weights_ + lane);
    keys.mask(weights_ + lane, lane, -kInfinity);
    weigh(seen, lane);
    multiply({call_.v.at(keys.start, head), 1, call_.v.token, weights_ + lane, kQueryRow,
              sums_ + lane, kQueryRow, call_.dv, kColumns, seen},
             true);
  }

  // Scores become weights; what was summed so far is what it would have been below the new top.
  void weigh(int64_t seen, int64_t lane) {
    const V before[2] = {get<V>(top_ + lane), get<V>(top_ + lane + kWidth)};
    V top[2] = {before[0], before[1]}, base[2];
    for (int64_t j = 0; j < seen; ++j) {
      const float* scores = weights_ + j * kQueryRow + lane;
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const V score = get<V>(scores + v * kWidth);
        top[v] = score > top[v] ? score : top[v];
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      put(top_ + lane + v * kWidth, top[v], false);
      base[v] = top[v] == -kInfinity ? V{} : top[v];
    }
    const Columns below{base[0], base[1]};
    Columns total{};
    for (int64_t j = 0; j < seen; ++j) {
      float* at = weights_ + j * kQueryRow + lane;
      const Columns weight = exp2<kColumns>(load<kColumns>(at) - below);
      total = total + weight;
      store<kColumns>(at, weight);
    }
    const Columns kept = exp2<kColumns>(Columns{before[0], before[1]} - below);
    store<kColumns>(total_ + lane, load<kColumns>(total_ + lane) * kept + total);
    for (int64_t c = 0; c < call_.dv; ++c) {
      float* at = sums_ + c * kQueryRow + lane;
      store<kColumns>(at, load<kColumns>(at) * kept);
    }
  }

  const MlaAttention& call_;
  float *queries_, *weights_, *sums_, *top_, *total_;
  int64_t taken_;
};

}  // namespace

int64_t mla_attention_space(const MlaAttention& call) {
  return Forward<float>(call, nullptr).taken();
}

void mla_attention_block(const MlaAttention& call, const MlaQueryBlock& block, float* space) {
  with_items(call.dtype, [&](auto item) { Forward<decltype(item)>(call, space).run(block); });
}

}  // namespace kexue::KEXUE_ISA
