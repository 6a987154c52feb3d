// What the walks of selective_scan work on: blocks of a few channels by tiles of steps, in
// buffers where a block's channels lie side by side, zeros beyond the last.
#pragma once

#include <cstring>
#include <initializer_list>
#include <new>

#include "scan/selective_scan_cpu.h"
#include "scan/selective_scan_lanes.h"

namespace kexue::KEXUE_ISA {

constexpr int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }

class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<float*>(::operator new(count * sizeof(float), kLine))), count_(count) {}
  ~Buffer() { ::operator delete(data_, kLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  float* at(int64_t i) const { return data_ + i; }
  void clear() { std::memset(data_, 0, count_ * sizeof(float)); }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_;
  int64_t count_;
};

// Some neighbouring channels, of one group of B's and one of C's.
struct Block {
  int64_t channel, channels;
};

// Whether the block is the first of another group, which `group` then is.
inline bool enters_group(const SelectiveInputs& in, const Projection& x, const Block& block,
                         int64_t& group) {
  const int64_t own = block.channel / (in.shape.d / x.groups);
  if (own == group) return false;
  group = own;
  return true;
}

// Calls body(i, block) for blocks of at most N channels.
template <int N, class Body>
KEXUE_INLINE void for_blocks(const SelectiveInputs& in, const SelectiveWalk& walk, Body body) {
  const int64_t end = walk.channel + walk.channels;
  const int64_t B_size = in.shape.d / in.B.groups, C_size = in.shape.d / in.C.groups;
  int64_t i = 0;
  for (int64_t channel = walk.channel; channel < end; ++i) {
    const int64_t B_end = (channel / B_size + 1) * B_size, C_end = (channel / C_size + 1) * C_size;
    const int64_t stop = least(least(end, channel + N), least(B_end, C_end));
    body(i, Block{channel, stop - channel});
    channel = stop;
  }
}
template <int N>
int64_t count_blocks(const SelectiveInputs& in, const SelectiveWalk& walk) {
  int64_t count = 0;
  for_blocks<N>(in, walk, [&](int64_t, const Block&) { ++count; });
  return count;
}

// ---- between arrays and buffers

// States of a block to a buffer [n, parts, N], and back.
template <class S>
void gather_states(const StateRows& from, const Block& block, int64_t n, float* to) {
  constexpr int N = kBlock<S>;
  const bool whole = kParts<S> == 1 && from.channel == 1 && block.channels == N;
  if (!whole || !from.data) std::memset(to, 0, n * kParts<S> * N * sizeof(float));
  if (!from.data) return;
  for (int64_t k = 0; k < n; ++k, to += kParts<S> * N) {
    const S* row =
        static_cast<const S*>(from.data) + block.channel * from.channel + k * from.state;
    if (whole) {
      std::memcpy(to, row, N * sizeof(float));
      continue;
    }
    for (int64_t c = 0; c < block.channels; ++c) {
      if constexpr (kParts<S> == 1) {
        to[c] = row[c * from.channel];
      } else {
        to[c] = row[c * from.channel].re;
        to[N + c] = row[c * from.channel].im;
      }
    }
  }
}
template <class S>
void scatter_states(const float* from, const Block& block, int64_t n, const StateRows& to) {
  constexpr int N = kBlock<S>;
  if (!to.data) return;
  for (int64_t k = 0; k < n; ++k, from += kParts<S> * N) {
    S* row = static_cast<S*>(to.data) + block.channel * to.channel + k * to.state;
    if (kParts<S> == 1 && to.channel == 1 && block.channels == N) {
      std::memcpy(row, from, N * sizeof(float));
      continue;
    }
    for (int64_t c = 0; c < block.channels; ++c) {
      if constexpr (kParts<S> == 1) {
        row[c * to.channel] = from[c];
      } else {
        row[c * to.channel] = {from[c], from[N + c]};
      }
    }
  }
}

template <int N, class Item>
void read_rows(const Item* from, int64_t step, int64_t channel, int64_t steps, int64_t channels,
               float* to) {
  if (channel == 1 && channels == N) {
    for (int64_t s = 0; s < steps; ++s) {
      __builtin_prefetch(from + s * step + N);  // the next block's
      store<N>(to + s * N, load<N>(from + s * step));
    }
    return;
  }
  if (channels < N) std::memset(to, 0, steps * N * sizeof(float));
  for (int64_t c = 0; c < channels; ++c) {
    const Item* next = from + (c + N) * channel;
    for (int64_t s = 0; s < steps; s += 64 / int64_t(sizeof(Item))) {
      __builtin_prefetch(next + s * step);
    }
    for (int64_t s = 0; s < steps; ++s) {
      to[s * N + c] = load<1>(from + s * step + c * channel);
    }
  }
}

// Steps [begin, begin + steps) of x as floats [steps, N].
template <int N>
void read_tile(const Strided& x, DType dtype, int64_t row, int64_t begin, int64_t steps,
               const Block& block, float* to) {
  with_real(dtype, [&](auto item) {
    using Item = decltype(item);
    const Item* from = static_cast<const Item*>(x.data) + row * x.batch + begin * x.step +
                       block.channel * x.channel;
    read_rows<N>(from, x.step, x.channel, steps, block.channels, to);
  });
}

template <int N, class Item>
KEXUE_INLINE void write_row(Floats<N> x, int64_t channels, Item* to) {
  if (channels == N) return store<N>(to, x);
  Item row[N];
  store<N>(row, x);
  std::memcpy(to, row, channels * sizeof(Item));
}

// Calls write(s, x) for x = row(s), s < steps, to out [batch, L, d].
template <int N, class Row>
KEXUE_INLINE void write_tile(const SelectiveInputs& in, void* out, int64_t batch, int64_t begin,
                             int64_t steps, const Block& block, Row row) {
  with_real(in.dtype, [&](auto item) {
    using Item = decltype(item);
    const int64_t d = in.shape.d, channels = block.channels;
    Item* to = static_cast<Item*>(out) + (batch * in.shape.L + begin) * d + block.channel;
    for (int64_t s = 0; s < steps; ++s, to += d) write_row<N>(row(s), channels, to);
  });
}

// B or C for the steps of a tile: floats [n, parts, room], room >= steps.
template <class S, class Item>
void read_projection(const Projection& x, int64_t row, int64_t begin, int64_t steps, int64_t group,
                     int64_t n, int64_t room, float* to) {
  const Item* from =
      static_cast<const Item*>(x.data) + row * x.batch + begin * x.step + group * x.group;
  for (int64_t s = 0; s < steps; ++s, from += x.step) {
    for (int64_t k = 0; k < n; ++k) {
      float* at = to + k * kParts<S> * room + s;
      if constexpr (kParts<S> == 1) {
        *at = load<1>(from + k * x.state);
      } else {
        at[0] = from[k * x.state].re;
        at[room] = from[k * x.state].im;
      }
    }
  }
}
template <class S>
void read_projection(const Projection& x, DType dtype, int64_t row, int64_t begin, int64_t steps,
                     int64_t group, int64_t n, int64_t room, float* to) {
  if constexpr (kParts<S> == 2) {
    read_projection<S, Complex>(x, row, begin, steps, group, n, room, to);
  } else {
    with_real(dtype, [&](auto item) {
      read_projection<S, decltype(item)>(x, row, begin, steps, group, n, room, to);
    });
  }
}

// ---- what does not change over the steps, for the blocks of a walk

template <class S>
struct Channels {
  static constexpr int N = kBlock<S>;
  const SelectiveInputs& in;
  int64_t n, count;
  Buffer rates, B, C, D, bias;  // B, C: [count, n, parts, N] where time-invariant

  Channels(const SelectiveInputs& in, const SelectiveWalk& walk)
      : in(in),
        n(in.shape.n),
        count(count_blocks<N>(in, walk)),
        rates(count * n * Rate<S>::kSize),
        B(in.B.per_step ? 0 : states()),
        C(in.C.per_step ? 0 : states()),
        D(count * N),
        bias(count * N) {
    rates.clear();
    D.clear();
    bias.clear();
    for_blocks<N>(in, walk, [&](int64_t i, const Block& block) {
      for (int64_t c = 0; c < block.channels; ++c) prepare(i, c, block.channel + c);
      const int64_t at = i * n * kParts<S> * N;
      if (!in.B.per_step) gather_states<S>({in.B.data, n, 1}, block, n, B.at(at));
      if (!in.C.per_step) gather_states<S>({in.C.data, n, 1}, block, n, C.at(at));
    });
  }

  int64_t states() const { return count * n * kParts<S> * N; }
  int64_t state_at(int64_t i) const { return i * n * kParts<S> * N; }
  const float* rates_of(int64_t i) const { return rates.at(i * n * Rate<S>::kSize); }

 private:
  void prepare(int64_t i, int64_t lane, int64_t channel) {
    const S* A = static_cast<const S*>(in.A) + channel * n;
    for (int64_t k = 0; k < n; ++k) {
      Rate<S>::prepare(A[k], lane, rates.at((i * n + k) * Rate<S>::kSize));
    }
    if (in.D) D.at(i * N)[lane] = in.D[channel];
    if (in.delta_bias) bias.at(i * N)[lane] = in.delta_bias[channel];
  }
};

// Steps [begin, begin + steps) of a row; a group's B and C are in their tiles.
struct Tile {
  int64_t row, begin, steps;
};

template <class S>
void read_group(const Channels<S>& channels, const Projection& x, const Tile& tile, int64_t group,
                int64_t room, float* to) {
  read_projection<S>(x, channels.in.dtype, tile.row, tile.begin, tile.steps, group, channels.n,
                     room, to);
}

// delta + delta_bias to `raw`, dt to `dt` (they may be one), u, and dt u.
template <class S>
void read_steps(const Channels<S>& channels, const Tile& tile, int64_t i, const Block& block,
                float* u, float* raw, float* dt, float* dtu) {
  constexpr int N = kBlock<S>;
  const SelectiveInputs& in = channels.in;
  read_tile<N>(in.u, in.dtype, tile.row, tile.begin, tile.steps, block, u);
  read_tile<N>(in.delta, in.dtype, tile.row, tile.begin, tile.steps, block, raw);
  const auto bias = repeated<kWide, N>(load<N>(channels.bias.at(i * N)));
  for (int64_t at = 0; at < tile.steps * N; at += kWide) {
    auto x = load<kWide>(raw + at) + bias;
    store<kWide>(raw + at, x);
    if (in.softplus) x = softplus<kWide>(x);
    store<kWide>(dt + at, x);
    store<kWide>(dtu + at, x * load<kWide>(u + at));
  }
}

template <int N>
void add_dt_sums(const float* dt, int64_t steps, const Block& block, const SelectiveWalk& walk) {
  if (!walk.dt_sums) return;
  for (int64_t c = 0; c < block.channels; ++c) {
    double sum = 0;
    for (int64_t s = 0; s < steps; ++s) sum += dt[s * N + c];
    walk.dt_sums[block.channel + c] += sum;
  }
}

// Calls body(tile) for pieces of at most `size` steps, cut at its multiples.
template <class Body>
KEXUE_INLINE void for_tiles(const SelectivePiece& piece, int64_t size, Body body) {
  for (int64_t begin = piece.begin; begin < piece.end;) {
    const int64_t end = least(piece.end, (begin / size + 1) * size);
    body(Tile{piece.row, begin, end - begin});
    begin = end;
  }
}

// Calls `call` with whether B, then C, are per step, as types.
template <bool value>
struct Flag {
  static constexpr bool is = value;
};
template <class Call>
KEXUE_INLINE void with_kinds(const SelectiveInputs& in, Call call) {
  if (in.B.per_step) {
    in.C.per_step ? call(Flag<true>{}, Flag<true>{}) : call(Flag<true>{}, Flag<false>{});
  } else {
    in.C.per_step ? call(Flag<false>{}, Flag<true>{}) : call(Flag<false>{}, Flag<false>{});
  }
}

}  // namespace kexue::KEXUE_ISA
