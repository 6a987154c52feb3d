// The backward: weights again from the log-sum-exps; a block of queries adds to the gradients of
// keys and values in its turn.
#include "common/exp.h"
#include "mla/mla_attention_tiles.h"

namespace kexue::KEXUE_ISA {
namespace {

using Columns = Floats<kColumns>;

template <class Item>
class Backward {
 public:
  Backward(const MlaAttention& call, const MlaAttentionGradient& gradient, float* space)
      : call_(call), gradient_(gradient) {
    Space memory(space);
    const auto queries = [&](int64_t width) { return memory.take(width * kQueryRow); };
    const auto rows = [&](int64_t width) {
      return memory.take(kMlaQueryBlock * channel_row(width));
    };
    queries_ = queries(call.dk + call.dr);
    grads_ = queries(call.dv);
    outs_ = queries(call.dv);
    d_queries_ = queries(call.dk + call.dr);
    nope_ = rows(call.dk);
    rope_ = rows(call.dr);
    grad_rows_ = rows(call.dv);
    weights_ = queries(kMlaKeyBlock);
    d_scores_ = queries(kMlaKeyBlock);
    lse2_ = memory.take(kMlaQueryBlock);
    D_ = memory.take(kMlaQueryBlock);
    taken_ = memory.taken();
  }

  int64_t taken() const { return taken_; }

  void run(const MlaQueryBlock& block, const MlaTurns& turns) {
    pack(block);
    const int64_t number = (block.start - block.first) / kMlaQueryBlock;
    const bool first = block.start + block.count == block.last;  // nothing was added before
    for_key_blocks(call_, block, [&](const KeyBlock& keys) {
      for (int64_t lane = 0; lane < block.count; lane += kColumns) meet(block.head, keys, lane);
      turns.wait(keys.number, number);
      add(block, keys, first);
      turns.pass(keys.number, number);
    });
    float* const factors = lse2_;
    for (int64_t i = 0; i < block.count; ++i) factors[i] = float(kLn2);
    unpack_columns<Item>(d_queries_, factors, block.count, call_.dk,
                         {gradient_.d_nope, block.head, block.start});
    unpack_columns<Item>(d_queries_ + call_.dk * kQueryRow, factors, block.count, call_.dr,
                         {gradient_.d_rope, block.head, block.start});
  }

 private:
  void pack(const MlaQueryBlock& block) {
    const auto [head, first, last, start, count] = block;
    const Tokens<Item> nope(call_.q_nope, head, start), rope(call_.q_rope, head, start);
    const Tokens<Item> grad(gradient_.grad, head, start), out(call_.out, head, start);
    pack_columns(nope, count, call_.dk, queries_);
    pack_columns(rope, count, call_.dr, queries_ + call_.dk * kQueryRow);
    pack_columns(grad, count, call_.dv, grads_);
    pack_rows(nope, count, call_.dk, nope_);
    pack_rows(rope, count, call_.dr, rope_);
    pack_rows(grad, count, call_.dv, grad_rows_);
    pack_columns(out, count, call_.dv, outs_);
    for (int64_t lane = 0; lane < count; lane += kColumns) sum_of_products(lane);
    for (int64_t i = 0; i < kMlaQueryBlock; ++i) {
      lse2_[i] = i < count ? float(call_.lse[head * call_.T + start + i] / kLn2) : 0;
    }
    for (int64_t i = 0; i < (call_.dk + call_.dr) * kQueryRow; ++i) d_queries_[i] = 0;
  }

  // D: in the order of products with values, so that one of a single key cancels it exactly.
  void sum_of_products(int64_t lane) {
    Columns D{};
    for (int64_t from = 0; from < call_.dv; from += kChain) {
      Columns sum{};
      for (int64_t c = from; c < min(from + kChain, call_.dv); ++c) {
        const Columns g = load<kColumns>(grads_ + c * kQueryRow + lane);
        sum = sum + g * load<kColumns>(outs_ + c * kQueryRow + lane);
      }
      D = from > 0 ? D + sum : sum;
    }
    store<kColumns>(D_ + lane, D);
  }

  // Weights and the gradients of scores [keys][kQueryRow], and what they give queries.
  void meet(int64_t head, const KeyBlock& keys, int64_t lane) {
    const int64_t seen = keys.seen(lane);
    float *const weights = weights_ + lane, *const d_scores = d_scores_ + lane;
    for (int64_t j = seen; j < keys.count; ++j) {
      store<kColumns>(weights + j * kQueryRow, Columns{});
      store<kColumns>(d_scores + j * kQueryRow, Columns{});
    }
    if (seen == 0) return;
    score(call_, head, keys.start, seen, queries_ + lane, weights);
    keys.mask(weights, lane, -kInfinity);
    multiply({call_.v.at(keys.start, head), call_.v.token, 1, grads_ + lane, kQueryRow, d_scores,
              kQueryRow, seen, kColumns, call_.dv},
             false);
    const Columns lse2 = load<kColumns>(lse2_ + lane), D = load<kColumns>(D_ + lane);
    for (int64_t j = 0; j < seen; ++j) {
      float *const weight = weights + j * kQueryRow, *const d_score = d_scores + j * kQueryRow;
      const Columns P = exp2<kColumns>(load<kColumns>(weight) - lse2);
      store<kColumns>(weight, P);
      store<kColumns>(d_score, P * (load<kColumns>(d_score) - D));
    }
    float* const d_queries = d_queries_ + lane;
    multiply({call_.k.at(keys.start, head), 1, call_.k.token, d_scores, kQueryRow, d_queries,
              kQueryRow, call_.dk, kColumns, seen},
             true);
    multiply({call_.key.at(keys.start, 0), 1, call_.key.token, d_scores, kQueryRow,
              d_queries + call_.dk * kQueryRow, kQueryRow, call_.dr, kColumns, seen},
             true);
  }

  // To the gradients of keys and values; a few at a time where only later queries see them.
  void add(const MlaQueryBlock& block, const KeyBlock& keys, bool first) const {
    const int64_t step = keys.ahead + keys.count > 1 ? 2 * kTile : keys.count;
    for (int64_t j = 0; j < keys.count; j += step) {
      const int64_t from = max(0, j + keys.ahead), rows = min(step, keys.count - j);
      const auto sum = [&](const float* a, const float* b, int64_t width, const MlaFloats& to) {
        multiply({a + j * kQueryRow + from, kQueryRow, 1, b + from * channel_row(width),
                  channel_row(width), to.at(keys.start + j, block.head), to.token, rows, width,
                  block.count - from},
                 !first);
      };
      sum(weights_, grad_rows_, call_.dv, gradient_.dv);
      sum(d_scores_, nope_, call_.dk, gradient_.dk);
      sum(d_scores_, rope_, call_.dr, gradient_.d_key);
    }
  }

  const MlaAttention& call_;
  const MlaAttentionGradient& gradient_;
  float *queries_, *grads_, *outs_, *d_queries_, *nope_, *rope_, *grad_rows_, *weights_, *d_scores_;
  float *lse2_, *D_;
  int64_t taken_;
};

}  // namespace

int64_t mla_attention_backward_space(const MlaAttention& call) {
  return Backward<float>(call, MlaAttentionGradient{}, nullptr).taken();
}

void mla_attention_backward_block(const MlaAttention& call, const MlaAttentionGradient& gradient,
                                  const MlaQueryBlock& block, const MlaTurns& turns,
                                  float* space) {
  with_items(call.dtype, [&](auto item) {
    Backward<decltype(item)>(call, gradient, space).run(block, turns);
  });
}

}  // namespace kexue::KEXUE_ISA
