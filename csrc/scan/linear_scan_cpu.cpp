// A walk goes panel by panel of channels, tile by tile of steps. In a tile, a strip of a few rows
// at a time, blocks of one cache line of channels carry their state in registers over the strip.
#include "scan/linear_scan_cpu.h"

#include "common/lanes.h"

namespace kexue::KEXUE_ISA {
namespace {

constexpr int64_t kPanel = 4096;      // channels whose states stay in the cache
constexpr int64_t kCopied = 64;       // and where inputs have to be gathered
constexpr int64_t kStripBytes = 512;  // of one array: more hits one set of the cache too often

constexpr int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t max(int64_t x, int64_t y) { return x < y ? y : x; }

template <class Item>
struct StateOf {
  using type = float;
};
template <>
struct StateOf<Complex> {
  using type = Complex;
};
template <class Item>
using State = typename StateOf<Item>::type;

// Rows of one tile, channels side by side.
template <class Item>
struct Tile {
  Item* data;
  int64_t step;
  Item* at(int64_t row, int64_t channel) const { return data + row * step + channel; }
};

template <class Item>
Tile<Item> tile_of(const Rows& rows, int64_t row, int64_t channel) {
  return {static_cast<Item*>(rows.data) + row * rows.step + channel, rows.step};
}

// An input's tile: where its channels are not side by side, a copy.
template <class Item>
struct Input {
  const Rows& rows;
  Item copy[kTileSteps * kCopied];

  explicit Input(const Rows& rows) : rows(rows) {}

  Tile<const Item> tile(int64_t row, int64_t steps, int64_t channel, int64_t channels) {
    if (rows.channel == 1) return tile_of<const Item>(rows, row, channel);
    const Item* from =
        static_cast<const Item*>(rows.data) + row * rows.step + channel * rows.channel;
    if (rows.step == 0) steps = 1;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t s = 0; s < steps; ++s) {
        copy[s * kCopied + c] = from[s * rows.step + c * rows.channel];
      }
    }
    return {copy, rows.step == 0 ? 0 : kCopied};
  }
};

// Calls body(slot, channel, row, end) for strips of rows and, in them, blocks of N channels. The
// last block overlaps the one before rather than be narrower, so what a block carries from strip
// to strip has a slot of its own. Walks towards lower addresses take their blocks that way too:
// memory is then read in one sweep, as prefetchers like it.
template <int N, class Item, class Body>
KEXUE_INLINE void for_blocks(int64_t rows, int64_t channels, bool descending, Body body) {
  const int64_t strip = max(1, kStripBytes / (channels * int64_t(sizeof(Item))));
  const int64_t blocks = (channels + N - 1) / N;
  const int64_t first = descending ? (blocks - 1) * N : 0, next = descending ? -N : N;
  for (int64_t row = 0; row < rows; row += strip) {
    const int64_t end = min(rows, row + strip);
    int64_t slot = first;
    for (int64_t i = 0; i < blocks; ++i, slot += next) {
      body(slot, min(slot, channels - N), row, end);
    }
  }
}

// What blocks carry: [channels], each block's in its slot.
template <int N, class S>
struct Carried {
  alignas(64) S slots[kPanel + N];

  void fill(S value, int64_t channels) {
    for (int64_t i = 0; i < channels + N; ++i) slots[i] = value;
  }
  void enter(const void* from, int64_t channel, int64_t channels) {
    if (!from) return fill(S{}, channels);
    const S* states = static_cast<const S*>(from) + channel;
    for (int64_t slot = 0; slot < channels; slot += N) {
      store<N>(slots + slot, load<N>(states + min(slot, channels - N)));
    }
  }
  void leave(void* to, int64_t channel, int64_t channels) const {
    if (!to) return;
    S* states = static_cast<S*>(to) + channel;
    for (int64_t slot = 0; slot < channels; slot += N) {
      store<N>(states + min(slot, channels - N), load<N>(slots + slot));
    }
  }
};

// ---- forward

template <int N, class Item>
void forward_tile(Tile<const Item> a, Tile<const Item> b, Tile<Item> h, int64_t rows,
                  int64_t channels, State<Item>* states, bool stream) {
  const auto body = [&](int64_t slot, int64_t c, int64_t row, int64_t end) {
    auto state = load<N>(states + slot);
    for (int64_t r = row; r < end; ++r) {
      state = step(load<N>(a.at(r, c)), state, load<N>(b.at(r, c)));
      store<N>(h.at(r, c), state, stream);
    }
    store<N>(states + slot, state);
  };
  for_blocks<N, Item>(rows, channels, h.step < 0, body);
}

template <int N, class Item>
void forward_panel(const ForwardWalk& walk, int64_t channel, int64_t channels) {
  Carried<N, State<Item>> state;
  Input<Item> a(walk.a), b(walk.b);
  state.enter(walk.enter, channel, channels);
  for (int64_t row = 0; row < walk.steps; row += kTileSteps) {
    const int64_t rows = min(kTileSteps, walk.steps - row);
    forward_tile<N, Item>(a.tile(row, rows, channel, channels),
                          b.tile(row, rows, channel, channels),
                          tile_of<Item>(walk.h, row, channel), rows, channels, state.slots,
                          walk.stream);
  }
  state.leave(walk.leave, channel, channels);
}

// ---- summary

template <int N, class Item>
void summary_tile(Tile<const Item> a, Tile<const Item> x, bool backward, int64_t rows,
                  int64_t channels, State<Item>* products, State<Item>* locals) {
  const auto body = [&](int64_t slot, int64_t c, int64_t row, int64_t end) {
    auto product = load<N>(products + slot), local = load<N>(locals + slot);
    for (int64_t r = row; r < end; ++r) {
      auto decay = load<N>(a.at(r, c));
      const auto input = load<N>(x.at(r, c));
      if (backward) {
        decay = conj(decay);
        local = mul(decay, add(input, local));
      } else {
        local = step(decay, local, input);
      }
      product = mul(decay, product);
    }
    store<N>(products + slot, product);
    store<N>(locals + slot, local);
  };
  for_blocks<N, Item>(rows, channels, x.step < 0, body);
}

template <int N, class Item>
void summary_panel(const Summary& walk, int64_t channel, int64_t channels) {
  using S = State<Item>;
  Carried<N, S> product, local;
  Input<Item> a(walk.a), x(walk.x);
  product.fill(one(S{}), channels);
  local.fill(S{}, channels);
  for (int64_t row = 0; row < walk.steps; row += kTileSteps) {
    const int64_t rows = min(kTileSteps, walk.steps - row);
    summary_tile<N, Item>(a.tile(row, rows, channel, channels),
                          x.tile(row, rows, channel, channels), walk.backward, rows, channels,
                          product.slots, local.slots);
  }
  product.leave(walk.product, channel, channels);
  local.leave(walk.local, channel, channels);
}

// ---- backward

template <class Item, GradA kind>
struct OutOf {
  using type = Item;
};
template <class Item>
struct OutOf<Item, GradA::state> {
  using type = State<Item>;
};

template <class Item, GradA kind>
using Out = typename OutOf<Item, kind>::type;

template <class Item, GradA kind>
struct Gradients {
  Tile<Item> b;
  Tile<Out<Item, kind>> a;
  bool stream;

  Gradients after(int64_t rows) const {
    return {{b.at(rows, 0), b.step}, {a.at(rows, 0), a.step}, stream};
  }
};

template <int N, GradA kind, class Item, class Before>
void backward_tile(Tile<const Item> a, Tile<const Item> grad_h, Tile<const Before> before,
                   Gradients<Item, kind> grad, int64_t rows, int64_t channels,
                   State<Item>* states, State<Item>* sums) {
  const auto body = [&](int64_t slot, int64_t c, int64_t row, int64_t end) {
    auto state = load<N>(states + slot);
    decltype(state) sum{};
    for (int64_t r = row; r < end; ++r) {
      const auto grad_b = add(load<N>(grad_h.at(r, c)), state);
      store<N>(grad.b.at(r, c), grad_b, grad.stream);
      state = mul(conj(load<N>(a.at(r, c))), grad_b);
      if constexpr (kind != GradA::none) {
        const auto grad_a = mul(grad_b, conj(load<N>(before.at(r, c))));
        if constexpr (kind == GradA::sums) {
          sum = add(sum, grad_a);
        } else {
          store<N>(grad.a.at(r, c), grad_a, grad.stream);
        }
      }
    }
    store<N>(states + slot, state);
    if constexpr (kind == GradA::sums) store<N>(sums + slot, add(sum, load<N>(sums + slot)));
  };
  for_blocks<N, Item>(rows, channels, grad.b.step < 0, body);
}

template <class S>
S zeros[kPanel];  // never written: a constant would take its room in the file

template <int N, GradA kind, class Item>
void backward_panel(const BackwardWalk& walk, int64_t channel, int64_t channels) {
  using S = State<Item>;
  Carried<N, S> state, sums;
  Input<Item> a(walk.a), grad_h(walk.grad_h), h(walk.h);
  const S* initial = walk.initial ? static_cast<const S*>(walk.initial) + channel : zeros<S>;
  state.enter(walk.enter, channel, channels);
  for (int64_t row = 0; row < walk.steps; row += kTileSteps) {
    const int64_t rows = min(kTileSteps, walk.steps - row);
    // a sequence's first step follows no row of h
    const int64_t alone = kind != GradA::none && walk.first && row + rows == walk.steps;
    const int64_t most = rows - alone;
    const auto a_rows = a.tile(row, rows, channel, channels);
    const auto grad_h_rows = grad_h.tile(row, rows, channel, channels);
    Gradients<Item, kind> grad{tile_of<Item>(walk.grad_b, row, channel), {}, walk.stream};
    Tile<const Item> before{};
    if constexpr (kind == GradA::sums) sums.fill(S{}, channels);
    if constexpr (kind != GradA::none) {
      if (kind != GradA::sums) grad.a = tile_of<Out<Item, kind>>(walk.grad_a, row, channel);
      before = h.tile(row, most, channel, channels);
    }
    backward_tile<N, kind, Item, Item>(a_rows, grad_h_rows, before, grad, most, channels,
                                       state.slots, sums.slots);
    if (alone) {
      backward_tile<N, kind, Item, S>({a_rows.at(most, 0), 0}, {grad_h_rows.at(most, 0), 0},
                                      {initial, 0}, grad.after(most), 1, channels, state.slots,
                                      sums.slots);
    }
    if (kind == GradA::sums) {
      sums.leave(tile_of<S>(walk.grad_a, row / kTileSteps, 0).data, channel, channels);
    }
  }
  state.leave(walk.leave, channel, channels);
}

// ---- choice of panels, block and types

template <int N>
struct Block {
  static constexpr int size = N;
};

template <class Item, class Call>
KEXUE_INLINE void for_panels(int64_t channels, bool gathered, Call call) {
  constexpr int line = 64 / sizeof(Item);
  const int64_t most = gathered ? kCopied : kPanel;
  const int64_t count = (channels + most - 1) / most;
  const int64_t width = ((channels + count - 1) / count + line - 1) / line * line;
  for (int64_t channel = 0; channel < channels; channel += width) {
    const int64_t own = min(width, channels - channel);
    if (own >= line) {
      call(Block<line>{}, channel, own);
    } else if (own >= 4) {
      call(Block<4>{}, channel, own);
    } else {
      call(Block<1>{}, channel, own);
    }
  }
}

template <class Call>
KEXUE_INLINE void with_item(DType dtype, Call call) {
  if (dtype == DType::c64) return call(Complex{});
  with_real(dtype, call);
}

bool gathered(const Rows& rows) { return rows.data && rows.channel != 1; }

}  // namespace

void linear_scan_forward(DType dtype, const ForwardWalk& walk) {
  with_item(dtype, [&](auto item) {
    using Item = decltype(item);
    const bool copied = gathered(walk.a) || gathered(walk.b);
    for_panels<Item>(walk.channels, copied, [&](auto block, int64_t channel, int64_t channels) {
      forward_panel<decltype(block)::size, Item>(walk, channel, channels);
    });
  });
  if (walk.stream) finish_streaming();
}

void linear_scan_summary(DType dtype, const Summary& walk) {
  with_item(dtype, [&](auto item) {
    using Item = decltype(item);
    const bool copied = gathered(walk.a) || gathered(walk.x);
    for_panels<Item>(walk.channels, copied, [&](auto block, int64_t channel, int64_t channels) {
      summary_panel<decltype(block)::size, Item>(walk, channel, channels);
    });
  });
}

void linear_scan_backward(DType dtype, const BackwardWalk& walk) {
  with_item(dtype, [&](auto item) {
    using Item = decltype(item);
    const bool copied = gathered(walk.a) || gathered(walk.grad_h) || gathered(walk.h);
    for_panels<Item>(walk.channels, copied, [&](auto block, int64_t channel, int64_t channels) {
      constexpr int N = decltype(block)::size;
      constexpr GradA as_state = sizeof(Item) < sizeof(State<Item>) ? GradA::state : GradA::data;
      switch (walk.kind) {
        case GradA::none: return backward_panel<N, GradA::none, Item>(walk, channel, channels);
        case GradA::data: return backward_panel<N, GradA::data, Item>(walk, channel, channels);
        case GradA::state: return backward_panel<N, as_state, Item>(walk, channel, channels);
        case GradA::sums: return backward_panel<N, GradA::sums, Item>(walk, channel, channels);
      }
    });
  });
  if (walk.stream) finish_streaming();
}

}  // namespace kexue::KEXUE_ISA
