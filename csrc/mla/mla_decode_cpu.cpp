// Queries lie in the lanes of registers for their scores, channels for the weighted sum of rows.
#include "mla/mla_decode_cpu.h"

#include "common/exp.h"
#include "common/reading.h"

namespace kexue::KEXUE_ISA {
namespace {

using V = Vector<float, kWidth>;

constexpr int kScored = kWidth == 16 ? 12 : 6;   // rows in a tile of scores, of two registers
constexpr int kScoredNarrow = 8;                 // the same, of one register
constexpr int kGroup = 4;                        // queries in a tile of sums
constexpr int kSummed = kWidth == 16 ? 6 : 3;    // registers of channels in it
constexpr int64_t kLanes = 2 * kWidth;           // queries in a panel
constexpr int64_t kPanels = (kMlaQueries + kLanes - 1) / kLanes;
constexpr int64_t kLine = 64;    // bytes that are fetched at once
constexpr int64_t kDepth = 192;  // channels whose products are summed apart, for rounding
constexpr float kInfinity = __builtin_inff();

constexpr int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// ---- scores

// Rows as floats, and those that come after them, which may be far away still.
struct Block {
  const float* rows[kMlaRows];
  const char* next[kMlaRows];
  int64_t count;
  const int64_t item_bytes;
};

// scores [rows][kVectors registers] of a panel q [width][kVectors registers].
template <int kVectors, int kRows>
KEXUE_INLINE void score_rows(const float* q, int64_t width, const Block& block, int64_t first,
                             bool fetch, float* scores) {
  constexpr int64_t kStep = kLine / sizeof(float);
  constexpr int64_t lanes = kVectors * kWidth;
  const float* row[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) row[r] = block.rows[first + r];
  for (int64_t from = 0; from < width; from += kDepth) {
    const int64_t to = min(width, from + kDepth);
    V sum[kRows][kVectors] = {};
    const auto add = [&](int64_t c) __attribute__((always_inline)) {
      V x[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) x[v] = get<V>(q + c * lanes + v * kWidth);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[r][v] += x[v] * row[r][c];
      }
    };
    int64_t c = from;
    for (; c + kStep <= to; c += kStep) {
      if (fetch) {
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          __builtin_prefetch(block.next[first + r] + c * block.item_bytes);
        }
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < kStep; ++i) add(c + i);
    }
    for (; c < to; ++c) add(c);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        float* at = scores + (first + r) * lanes + v * kWidth;
        put(at, from > 0 ? get<V>(at) + sum[r][v] : sum[r][v], false);
      }
    }
  }
}

template <int kVectors>
void score_panel(const float* q, int64_t width, const Block& block, bool fetch, float* scores) {
  constexpr int kRows = kVectors == 2 ? kScored : kScoredNarrow;
  for (int64_t r = 0; r < block.count; r += kRows) {
    if (block.count >= kRows) {  // the last ones once more, where they are fewer
      score_rows<kVectors, kRows>(q, width, block, min(r, block.count - kRows), fetch, scores);
    } else {
      for (; r < block.count; ++r) score_rows<kVectors, 1>(q, width, block, r, fetch, scores);
    }
  }
}

// ---- softmax

// By lane: the top score, the sum of exponentials below it, and what is left of earlier sums.
struct Softmax {
  float *top, *total, *kept;
};

// Scores [count][lanes] become weights.
void weigh(float* scores, int64_t count, int64_t lanes, const Softmax& state) {
  for (int64_t lane = 0; lane < lanes; lane += kWidth) {
    const V before = get<V>(state.top + lane), none = V{} - kInfinity;
    V top = before;
    for (int64_t r = 0; r < count; ++r) {
      const V score = get<V>(scores + r * lanes + lane);
      top = score > top ? score : top;
    }
    const V base = top == none ? V{} : top, kept = exp<kWidth>(before - base);
    V sum{};
    for (int64_t r = 0; r < count; ++r) {
      float* at = scores + r * lanes + lane;
      const V weight = exp<kWidth>(get<V>(at) - base);
      sum += weight;
      put(at, weight, false);
    }
    put(state.top + lane, top, false);
    put(state.total + lane, get<V>(state.total + lane) * kept + sum, false);
    put(state.kept + lane, kept, false);
  }
}

// ---- weighted sums of rows

// Of kQueries neighbouring lanes, at channels from c on: out = kept * out + weights * rows.
template <int kQueries, int kVectors>
KEXUE_INLINE void sum_rows(const float* weights, int64_t lanes, const float* kept,
                           const float* const* rows, int64_t count, int64_t c, float* out,
                           int64_t out_row) {
  V sum[kQueries][kVectors] = {};
#pragma GCC unroll 4
  for (int64_t r = 0; r < count; ++r) {
    V x[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) x[v] = get<V>(rows[r] + c + v * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kQueries; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] += x[v] * weights[r * lanes + i];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kQueries; ++i) {
    const float share = kept[i];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = out + i * out_row + c + v * kWidth;
      put(to, get<V>(to) * share + sum[i][v], false);
    }
  }
}

// ---- results

template <class Item>
void write(const MlaDecode& call, int64_t b, int64_t query, const float* sums, float share,
           float lse) {
  const int64_t dv = call.head_dim_v;
  Item* out = static_cast<Item*>(call.out) + (b * call.queries() + query) * dv;
  int64_t c = 0;
  for (; c + kWidth <= dv; c += kWidth) store<kWidth>(out + c, load<kWidth>(sums + c) * share);
  for (; c < dv; ++c) store<1>(out + c, sums[c] * share);
  call.lse[(b * call.H + query % call.H) * call.Tq + query / call.H] = lse;
}

// What was summed with weights exp(score - top), whose sum is `total`.
float log_sum(float top, float total) {
  return total == 0 ? -kInfinity : top + __builtin_logf(total);
}
float share_of(float total) { return total == 0 ? 0.0f : 1 / total; }

// ---- a piece

template <class Item>
class Piece {
 public:
  Piece(const MlaDecode& call, const MlaPiece& piece, float* space)
      : call_(call), piece_(piece), out_row_(whole(call.head_dim_v, kWidth)) {
    const auto take = [&](int64_t floats) {
      float* taken = space;
      space += whole(floats, kLine / sizeof(float));
      return taken;
    };
    q_ = take(kPanels * kLanes * call.width);
    scores_ = take(kPanels * kLanes * kMlaRows);
    state_ = {take(kPanels * kLanes), take(kPanels * kLanes), take(kPanels * kLanes)};
    out_ = take(kMlaQueries * out_row_);
    rows_ = take(kMlaRows * buffer_row());
    end_ = space;
    const auto& pages = call.pages;
    in_place_ = call.dtype == DType::f32 && pages.channel == 1 && out_row_ <= call.width;
  }

  const float* end() const { return end_; }

  void run(MlaParts part, bool packed) {
    if (!packed) pack_queries();
    for (int64_t i = 0; i < panels() * kLanes; ++i) {
      state_.top[i] = -kInfinity;
      state_.total[i] = 0;
    }
    for (int64_t i = 0; i < piece_.queries * out_row_; ++i) out_[i] = 0;
    for (int64_t i = 0; i < piece_.queries; ++i) seen_[i] = call_.seen(piece_.b, piece_.query + i);
    const int64_t end = min(piece_.to, seen_[piece_.queries - 1]);
    locate(piece_.from, end);
    for (int64_t from = piece_.from; from < end; from += kMlaRows) {
      read(min(kMlaRows, end - from));
      locate(from + kMlaRows, end);
      meet(from);
    }
    for (int64_t i = 0; i < piece_.queries; ++i) finish(i, part);
  }

 private:
  int64_t panels() const { return (piece_.queries + kLanes - 1) / kLanes; }
  int64_t queries_of(int64_t panel) const { return min(kLanes, piece_.queries - panel * kLanes); }
  int64_t lanes_of(int64_t panel) const { return whole(queries_of(panel), kWidth); }
  // Not a power of two apart, which would make rows compete for places in the caches.
  int64_t buffer_row() const { return whole(call_.width, 32) + 16; }

  // Scaled, and zeros in the lanes that have none. A few channels at a time, to stay in the cache.
  void pack_queries() {
    constexpr int64_t kChannels = 64;
    float buffer[kChannels];
    for (int64_t from = 0; from < call_.width; from += kChannels) {
      const int64_t n = min(kChannels, call_.width - from);
      for (int64_t i = 0; i < panels() * kLanes; ++i) {
        const int64_t p = i / kLanes, lanes = lanes_of(p);
        if (i % kLanes >= lanes) continue;
        float* to = q_ + p * kLanes * call_.width + from * lanes + i % kLanes;
        if (i < piece_.queries) {
          const float* x = query_at(piece_.query + i).read(from, n, buffer);
          for (int64_t c = 0; c < n; ++c) to[c * lanes] = x[c] * call_.scale;
        } else {
          for (int64_t c = 0; c < n; ++c) to[c * lanes] = 0;
        }
      }
    }
  }

  Row<Item> query_at(int64_t query) const {
    const MlaQueries& q = call_.q;
    const int64_t at =
        piece_.b * q.batch + query / call_.H * q.token + query % call_.H * q.head;
    return {static_cast<const Item*>(q.data) + at, q.channel};
  }

  // Where the block of rows that begins at `from` lies. Their pages are asked for together, as the
  // look-ups of virtual addresses then overlap.
  void locate(int64_t from, int64_t end) {
    const LatentPages& pages = call_.pages;
    const int32_t* id = call_.table + piece_.b * call_.blocks + from / pages.size;
    int64_t place = from % pages.size;
    for (int64_t r = 0; r < min(kMlaRows, end - from); ++r) {
      block_.next[r] = static_cast<const char*>(pages.data) +
                       (*id * pages.block + place * pages.place) * int64_t(sizeof(Item));
      __builtin_prefetch(block_.next[r]);
      if (++place < pages.size) continue;
      place = 0;
      ++id;
    }
  }

  // The rows of the block that was located, as floats.
  void read(int64_t count) {
    block_.count = count;
    for (int64_t r = 0; r < count; ++r) {
      const char* row = block_.next[r];
      block_.rows[r] = in_place_ ? reinterpret_cast<const float*>(row)
                                 : widened(reinterpret_cast<const Item*>(row), r);
    }
  }

  const float* widened(const Item* data, int64_t r) const {
    const Row<Item> row{data, call_.pages.channel};
    float* to = rows_ + r * buffer_row();
    for_pieces(call_.width, [&](int64_t from, int64_t n) {
      const float* x = row.read(from, n, to + from);
      if (x != to + from) __builtin_memcpy(to + from, x, n * sizeof(float));
    });
    return to;
  }

  // All queries and the block's rows, which begin at `from`.
  void meet(int64_t from) {
    const bool all = from + block_.count <= seen_[0];
    for (int64_t p = 0; p < panels(); ++p) {
      const int64_t lanes = lanes_of(p);
      const float* q = q_ + p * kLanes * call_.width;
      float* scores = scores_ + p * kLanes * kMlaRows;
      const auto score = lanes == kWidth ? score_panel<1> : score_panel<2>;
      score(q, call_.width, block_, p == 0, scores);
      if (!all) hide(p, from);
      const int64_t at = p * kLanes;
      weigh(scores, block_.count, lanes, {state_.top + at, state_.total + at, state_.kept + at});
    }
    int64_t c = 0;
    for (; c + kSummed * kWidth <= out_row_; c += kSummed * kWidth) sum<kSummed>(from, c);
    for (; c < out_row_; c += kWidth) sum<1>(from, c);
  }

  // Rows of the block that query i of the piece sees.
  int64_t seen(int64_t i, int64_t from) const {
    const int64_t rows = seen_[i] - from;
    return rows < 0 ? 0 : min(rows, block_.count);
  }

  void hide(int64_t p, int64_t from) {
    const int64_t lanes = lanes_of(p);
    float* scores = scores_ + p * kLanes * kMlaRows;
    for (int64_t i = 0; i < queries_of(p); ++i) {
      for (int64_t r = seen(p * kLanes + i, from); r < block_.count; ++r) {
        scores[r * lanes + i] = -kInfinity;
      }
    }
  }

  // What a query doesn't see is left out: weighted by zero, a NaN would remain one.
  template <int kVectors>
  void sum(int64_t from, int64_t c) {
    for (int64_t i = 0; i < piece_.queries;) {
      const int64_t p = i / kLanes, lanes = lanes_of(p);
      const float* weights = scores_ + p * kLanes * kMlaRows + i % kLanes;
      float* out = out_ + i * out_row_;
      const int64_t rows = seen(i, from);
      const bool alike = i % kLanes + kGroup <= queries_of(p) && seen(i + kGroup - 1, from) == rows;
      if (alike) {
        sum_rows<kGroup, kVectors>(weights, lanes, state_.kept + i, block_.rows, rows, c, out,
                                   out_row_);
        i += kGroup;
      } else {
        sum_rows<1, kVectors>(weights, lanes, state_.kept + i, block_.rows, rows, c, out, out_row_);
        i += 1;
      }
    }
  }

  void finish(int64_t i, MlaParts part) {
    const float share = share_of(state_.total[i]), lse = log_sum(state_.top[i], state_.total[i]);
    const int64_t query = piece_.query + i, dv = call_.head_dim_v;
    const float* sums = out_ + i * out_row_;
    if (!part.out) return write<Item>(call_, piece_.b, query, sums, share, lse);
    float* out = part.out + query * dv;
    for (int64_t c = 0; c < dv; ++c) out[c] = sums[c] * share;
    part.lse[query] = lse;
  }

  const MlaDecode& call_;
  const MlaPiece& piece_;
  const int64_t out_row_;
  float *q_, *scores_, *out_, *rows_, *end_;
  Softmax state_;
  bool in_place_;
  int64_t seen_[kMlaQueries];  // rows, by query
  Block block_{{}, {}, 0, sizeof(Item)};
};

}  // namespace

int64_t mla_decode_space(const MlaDecode& call) {
  const MlaPiece none{};
  float* const space = nullptr;
  return Piece<float>(call, none, space).end() - space;
}

void mla_decode_piece(const MlaDecode& call, const MlaPiece& piece, float* space, bool packed,
                      MlaParts part) {
  with_items(call.dtype,
             [&](auto item) { Piece<decltype(item)>(call, piece, space).run(part, packed); });
}

void mla_decode_merge(const MlaDecode& call, int64_t b, int64_t query, MlaParts parts, int64_t n) {
  const int64_t queries = call.queries(), dv = call.head_dim_v;
  float top = -kInfinity, total = 0;
  for (int64_t p = 0; p < n; ++p) {
    const float lse = parts.lse[p * queries + query];
    top = lse > top || lse != lse ? lse : top;
  }
  const float base = top == -kInfinity ? 0 : top;
  float* sums = parts.out + query * dv;  // of the first part, and then of all
  for (int64_t p = 0; p < n; ++p) {
    const float weight = exp<1>(parts.lse[p * queries + query] - base);
    const float* part = sums + p * queries * dv;
    total += weight;
    for (int64_t c = 0; c < dv; ++c) sums[c] = part[c] * weight + (p ? sums[c] : 0);
  }
  const float share = share_of(total), lse = log_sum(top, total);
  with_items(call.dtype, [&](auto item) {
    write<decltype(item)>(call, b, query, sums, share, lse);
  });
}

}  // namespace kexue::KEXUE_ISA
