// What the forward and the backward of mla_attention share. For *_cpu.cpp files only.
//
// Scores lie as [keys, queries], queries in the lanes of registers: softmax needs no sums across
// lanes, and keys and values are used where they lie.
#pragma once

#include "common/reading.h"
#include "mla/mla_attention_cpu.h"
#include "mla/mla_product.h"

namespace kexue::KEXUE_ISA {

constexpr int64_t kLine = 16;  // floats
// Not a power of two, which would make rows compete for places in the caches.
constexpr int64_t kQueryRow = kMlaQueryBlock + kLine;
constexpr float kInfinity = __builtin_inff();
constexpr double kLn2 = 0.693147180559945309;

constexpr int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t max(int64_t x, int64_t y) { return x > y ? x : y; }
constexpr int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// An odd number of lines, for the same reason.
constexpr int64_t channel_row(int64_t width) {
  return (whole(width, max(kColumns, kLine)) / kLine | 1) * kLine;
}

// Hands out pieces of a thread's memory.
class Space {
 public:
  explicit Space(float* begin) : begin_(begin), next_(begin) {}
  float* take(int64_t floats) {
    float* taken = next_;
    next_ += whole(floats, kLine);
    return taken;
  }
  int64_t taken() const { return next_ - begin_; }

 private:
  float *begin_, *next_;
};

// A head of an array, from token `start` on.
template <class Item>
struct Tokens {
  Item* data;
  int64_t token, channel;

  Tokens(const MlaHeads& x, int64_t head, int64_t start)
      : data(static_cast<Item*>(x.data) + head * x.head + start * x.token),
        token(x.token),
        channel(x.channel) {}
  Row<Item> row(int64_t i) const { return {data + i * token, channel}; }
};

constexpr int64_t kStrip = 64;  // channels that are moved at once

// x [count, width] as to [width][kQueryRow], zeros up to whole tiles.
template <class Item>
void pack_columns(const Tokens<Item>& x, int64_t count, int64_t width, float* to) {
  float buffer[kPiece];
  for (int64_t from = 0; from < width; from += kStrip) {
    const int64_t n = min(kStrip, width - from);
    for (int64_t i = 0; i < count; ++i) {
      const float* row = x.row(i).read(from, n, buffer);
      for (int64_t c = 0; c < n; ++c) to[(from + c) * kQueryRow + i] = row[c];
    }
  }
  for (int64_t c = 0; c < width; ++c) {
    for (int64_t i = count; i < whole(count, kColumns); ++i) to[c * kQueryRow + i] = 0;
  }
}

// x [count, width] as to [count][channel_row(width)], zeros up to whole tiles.
template <class Item>
void pack_rows(const Tokens<Item>& x, int64_t count, int64_t width, float* to) {
  float buffer[kPiece];
  for (int64_t i = 0; i < count; ++i, to += channel_row(width)) {
    for_pieces(width, [&](int64_t from, int64_t n) {
      const float* row = x.row(i).read(from, n, buffer);
      for (int64_t c = 0; c < n; ++c) to[from + c] = row[c];
    });
    for (int64_t c = width; c < whole(width, kColumns); ++c) to[c] = 0;
  }
}

// from [width][kQueryRow], times a factor of each query's, as `to`, channels side by side.
template <class Item>
void unpack_columns(const float* from, const float* factors, int64_t count, int64_t width,
                    const Tokens<Item>& to) {
  float buffer[kStrip];
  for (int64_t strip = 0; strip < width; strip += kStrip) {
    const int64_t n = min(kStrip, width - strip);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < n; ++c) buffer[c] = from[(strip + c) * kQueryRow + i] * factors[i];
      Item* row = to.data + i * to.token + strip;
      int64_t c = 0;
      for (; c + kWidth <= n; c += kWidth) store<kWidth>(row + c, load<kWidth>(buffer + c));
      for (; c < n; ++c) store<1>(row + c, buffer[c]);
    }
  }
}

// A block of keys beside a block of queries.
struct KeyBlock {
  int64_t number, start, count;
  int64_t ahead;  // key 0 is query `ahead`'s own; where all are seen, far below 0

  // How many of the keys are seen by queries from `lane` to the end of a tile, and by each.
  int64_t seen(int64_t lane) const { return max(0, min(count, lane + kColumns - ahead)); }
  int64_t seen_by_all(int64_t lane) const { return max(0, min(count, lane + 1 - ahead)); }

  // of scores [count][kQueryRow] at `lane`: those that come after the query
  void mask(float* scores, int64_t lane, float value) const {
    for (int64_t j = seen_by_all(lane); j < seen(lane); ++j) {
      for (int64_t i = lane; i < j + ahead; ++i) scores[j * kQueryRow + i - lane] = value;
    }
  }
};

// body(KeyBlock) for all that some of the queries see
template <class Body>
KEXUE_INLINE void for_key_blocks(const MlaAttention& call, const MlaQueryBlock& block,
                                 const Body& body) {
  const int64_t end = call.causal ? block.start + block.count : block.last;
  KeyBlock keys{0, block.first, 0, 0};
  for (; keys.start < end; ++keys.number, keys.start += kMlaKeyBlock) {
    keys.count = min(kMlaKeyBlock, end - keys.start);
    keys.ahead = call.causal ? keys.start - block.start : -call.T - kMlaKeyBlock;
    body(keys);
  }
}

// scores [keys][kColumns of kQueryRow] of queries [dk + dr][kQueryRow]
KEXUE_INLINE void score(const MlaAttention& call, int64_t head, int64_t start, int64_t keys,
                        const float* queries, float* scores) {
  multiply({call.k.at(start, head), call.k.token, 1, queries, kQueryRow, scores, kQueryRow, keys,
            kColumns, call.dk},
           false);
  multiply({call.key.at(start, 0), call.key.token, 1, queries + call.dk * kQueryRow, kQueryRow,
            scores, kQueryRow, keys, kColumns, call.dr},
           true);
}

}  // namespace kexue::KEXUE_ISA
