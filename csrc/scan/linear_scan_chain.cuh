// Chained scan over tiles of steps x channels, in one pass and bitwise reproducible.
//
// A tile is `steps` steps of one sequence x kVectors Packs of channels. Its threads are groups of
// kVectors neighbours; a group owns consecutive steps, a thread of it one Pack of channels. What
// happens between warps and between tiles is work by channel, through shared memory: registers
// are for data.
//
// A tile learns the state that enters it from what the tiles before it published, as in Merrill
// and Garland, "Single-pass Parallel Prefix Scan with Decoupled Look-back" (2016), but a tile's
// number alone decides what it publishes, what it reads and in which order it combines that.
// kWindow tiles of a sequence are a window, kWindow windows a span. A span's last tile publishes
// the state that leaves the span, another window's last tile what the window does to a state,
// every other tile what it does itself. A tile reads from the last tiles of the span before its
// own and of the windows between, then from the tiles of its window: few enough for a warp to
// await all at once. What tiles do is known without waiting, what windows do waits for that
// alone, so it is only from span to span that one tile waits for another that waits.
#pragma once

#include "scan/pack.cuh"

namespace kexue {

constexpr int kWarp = 32;
constexpr int kGroupsPerWarp = kWarp / kVectors;
constexpr int kMaxWarps = 8;
constexpr int kMaxThreads = kMaxWarps * kWarp;

constexpr int kWindow = 16;  // tiles of a window, windows of a span
constexpr int kSpan = kWindow * kWindow;
static_assert(2 * kWindow - 1 <= kWarp, "a warp awaits all that a tile reads");

// What tiles publish, by slot; in workspace. Null: every sequence is one tile.
struct Chain {
  uint64_t* ticket;  // tiles started
  uint32_t* flags;   // [slots] published? These two are zero before the kernel
  void* records;     // [slots][channels of a tile] Affine; a state is {0, state}
};

struct Tiling {
  int64_t steps;          // of a tile
  int64_t chunks;         // of every sequence; of all of them together where they are packed
  int64_t channel_tiles;  // ceil(D / channels of a tile)
  int64_t count;          // tiles, and slots
  Chain chain;
};

struct Tile {
  int64_t sequence, batch;
  int64_t chunk;    // of the sequence, counted the way the scan travels; negative: no tile
  int64_t length;   // of the sequence
  int64_t first;    // row at which the scan enters the sequence
  int64_t channel;  // first of the tile's
  int64_t slot;     // the chunk before has the slot before
  int64_t part;     // row of grad_a's partial sums
  bool last;        // chunk of the sequence
};

template <DType T>
using AffineOf = Affine<StateOf<T>>;
template <DType T>
constexpr int kTileChannels = kVectors * kChannels<T>;

// What some steps do to the channels of a thread.
template <DType T>
struct Run {
  AffineOf<T> channel[kChannels<T>];
};

template <DType T>
struct Shared {
  Tile tile;
  AffineOf<T> groups[kChannels<T>][kMaxThreads + 1];  // up to a thread's group, from its warp's
  AffineOf<T> warps[kMaxWarps][kTileChannels<T>];  // up to a warp, from the tile's first
  AffineOf<T> total[kTileChannels<T>];             // the tile's run
  AffineOf<T> segments[kMaxThreads];               // parts of a trail
  StateOf<T> state[kTileChannels<T>];              // enters the tile
  States<T> sums[kMaxWarps][kVectors];
};

KEXUE_DEVICE int lane_index() { return thread_index() % kWarp; }
KEXUE_DEVICE int warp_index() { return thread_index() / kWarp; }
KEXUE_DEVICE int vector_index() { return thread_index() % kVectors; }
KEXUE_DEVICE int group_index() { return thread_index() / kVectors; }
KEXUE_DEVICE int group_count() { return thread_count() / kVectors; }

// ---- which tile

// Packed sequences: every sequence n has the slots from bounds[n] / steps + n on, which are
// enough whatever its length, and at least one. So the grid follows from shapes alone.
KEXUE_DEVICE int64_t first_slot(const LinearScanShape& shape, int64_t steps, int64_t n) {
  return shape.cu_seqlens[n] / steps + n;
}

// The last sequence whose first slot is not past `slot`; a warp's search, 32 probes at once.
KEXUE_DEVICE int64_t sequence_of_slot(const LinearScanShape& shape, int64_t steps, int64_t slot) {
  int64_t low = 0, count = shape.sequences;  // the answer is in [low, low + count)
  while (count > 1) {
    const int64_t stride = (count + kWarp - 1) / kWarp, ahead = lane_index() * stride;
    const bool hit = ahead < count && first_slot(shape, steps, low + ahead) <= slot;
    const int64_t jump = (count_bits(ballot(hit || ahead == 0)) - 1) * stride;
    low += jump;
    count = count - jump < stride ? count - jump : stride;
  }
  return low;
}

// Tiles of one chain come in the order of the scan, so whoever a tile waits for has started.
KEXUE_DEVICE Tile locate(const LinearScanShape& shape, const Tiling& tiling, int64_t index,
                         bool from_end) {
  Tile tile = {};
  tile.chunk = tile.part = -1;
  if (index >= tiling.count) return tile;
  const int64_t column = index % tiling.channel_tiles, rest = index / tiling.channel_tiles;
  int64_t start = 0, chunk;
  if (shape.cu_seqlens) {
    tile.sequence = sequence_of_slot(shape, tiling.steps, rest);
    start = shape.cu_seqlens[tile.sequence];
    tile.length = shape.cu_seqlens[tile.sequence + 1] - start;
    chunk = rest - first_slot(shape, tiling.steps, tile.sequence);
    tile.slot = column * tiling.chunks + rest;
    tile.part = rest;
  } else {
    tile.sequence = tile.batch = rest % shape.B;
    tile.length = shape.L;
    chunk = rest / shape.B;
    tile.slot = (tile.batch * tiling.channel_tiles + column) * tiling.chunks + chunk;
    tile.part = tile.batch * tiling.chunks + chunk;
  }
  // an empty sequence has a tile too, which hands its state on
  if (chunk == 0 || chunk * tiling.steps < tile.length) tile.chunk = chunk;
  tile.channel = column * kVectors;  // in Packs
  tile.first = from_end ? start + tile.length - 1 : start;
  tile.last = (chunk + 1) * tiling.steps >= tile.length;
  return tile;
}

template <DType T>
KEXUE_DEVICE Tile take_tile(const LinearScanShape& shape, const Tiling& tiling, bool from_end,
                            Shared<T>& shared) {
  if (warp_index() == 0) {
    int64_t index = block_index();
    if (tiling.chain.ticket) {
      index = broadcast(lane_index() == 0 ? fetch_increment(tiling.chain.ticket) : 0, 0);
    }
    Tile tile = locate(shape, tiling, index, from_end);
    tile.channel *= kChannels<T>;
    if (lane_index() == 0) shared.tile = tile;
  }
  sync_block();
  return shared.tile;
}

// ---- runs

template <DType T>
KEXUE_DEVICE AffineOf<T> identity() {
  return {one(StateOf<T>{}), StateOf<T>{}};
}

// Leaves in shared.groups what the groups of a warp up to each do together.
template <DType T>
KEXUE_DEVICE void scan_warp(const Run<T>& own, Shared<T>& shared) {
#pragma unroll
  for (int k = 0; k < kChannels<T>; ++k) {
    AffineOf<T> run = own.channel[k];
#pragma unroll
    for (int delta = kVectors; delta < kWarp; delta *= 2) {
      const AffineOf<T> before = shuffle_up(run, delta);
      if (lane_index() >= delta) run = then(before, run);
    }
    shared.groups[k][thread_index()] = run;
  }
}

// ---- by channel

template <DType T, class F>
KEXUE_DEVICE void each_channel(F work) {
  for (int c = thread_index(); c < kTileChannels<T>; c += thread_count()) work(c);
}

// The channel of a tile that its thread v has as the k-th is v * kChannels + k.
template <DType T, bool VECTOR>
KEXUE_DEVICE int64_t column_of(const Tile& tile, int c) {
  return tile.channel + (VECTOR ? c : c / kChannels<T> + c % kChannels<T> * kVectors);
}

// What all warps before each do, and the tile.
template <DType T>
KEXUE_DEVICE void fold_warps(int c, Shared<T>& shared) {
  const int k = c % kChannels<T>, last = kWarp - kVectors + c / kChannels<T>;
  AffineOf<T> run = identity<T>();
#pragma unroll 1
  for (int warp = 0; warp < thread_count() / kWarp; ++warp) {
    shared.warps[warp][c] = run;
    run = then(run, shared.groups[k][warp * kWarp + last]);
  }
  shared.total[c] = run;
}

// ---- between tiles

// Tiles whose records are read, in this order: the last ones of the `ends` windows before a
// window (the first of them may end a span), then the first ones of the window.
struct Trail {
  int64_t window;  // slot of the window's first tile
  int ends, count;

  KEXUE_DEVICE int64_t slot(int i) const {
    return i < ends ? window - 1 - (ends - 1 - i) * kWindow : window + (i - ends);
  }
};

// From the state that enters a tile's span on; in the first span, from its first tile on.
KEXUE_DEVICE Trail trail_before(const Tile& tile) {
  const int inside = tile.chunk % kWindow;
  const int ends = tile.chunk % kSpan / kWindow + (tile.chunk >= kSpan);
  return {tile.slot - inside, ends, ends + inside};
}

template <DType T>
KEXUE_DEVICE AffineOf<T>* record(const Chain& chain, int64_t slot, int c) {
  return static_cast<AffineOf<T>*>(chain.records) + slot * kTileChannels<T> + c;
}

template <DType T, class F>
KEXUE_DEVICE void publish(const Chain& chain, const Tile& tile, F record_of) {
  each_channel<T>([&](int c) { store_l2(record<T>(chain, tile.slot, c), record_of(c)); });
  sync_block();  // puts the block's stores before the flag's
  if (thread_index() == 0) store_release(chain.flags + tile.slot, 1);
}

// What the tiles [begin, end) of a trail do together.
template <DType T>
KEXUE_DEVICE AffineOf<T> fold_tiles(const Chain& chain, const Trail& trail, int begin, int end,
                                    int c) {
  constexpr int kBatch = 32 / sizeof(StateOf<T>);  // loads under way at once
  AffineOf<T> run = identity<T>();
#pragma unroll 1
  for (int i = begin; i < end; i += kBatch) {
    AffineOf<T> next[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const bool there = i + j < end;
      next[j] = there ? load_l2(record<T>(chain, trail.slot(i + j), c)) : identity<T>();
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) run = then(run, next[j]);
  }
  return run;
}

template <DType T>
KEXUE_DEVICE int segment_count() {
  return thread_count() > kTileChannels<T> ? thread_count() / kTileChannels<T> : 1;
}

// Waits for the tiles of a trail; leaves in shared.segments what equal parts of it do.
template <DType T>
KEXUE_DEVICE void follow(const Chain& chain, const Trail& trail, Shared<T>& shared) {
  if (thread_index() < trail.count) {
    while (!load_acquire(chain.flags + trail.slot(thread_index()))) pause();
  }
  sync_block();
  const int segments = segment_count<T>(), length = (trail.count + segments - 1) / segments;
  for (int i = thread_index(); i < segments * kTileChannels<T>; i += thread_count()) {
    const int begin = i / kTileChannels<T> * length, end = begin + length;
    shared.segments[i] = fold_tiles<T>(chain, trail, begin, end < trail.count ? end : trail.count,
                                       i % kTileChannels<T>);
  }
  sync_block();
}

// What the trail that was followed does.
template <DType T>
KEXUE_DEVICE AffineOf<T> fold_segments(int c, const Shared<T>& shared) {
  AffineOf<T> run = identity<T>();
#pragma unroll 1
  for (int i = c; i < segment_count<T>() * kTileChannels<T>; i += kTileChannels<T>) {
    run = then(run, shared.segments[i]);
  }
  return run;
}

// Leaves in shared.state the state that enters a tile. `firsts` [sequences, D], or null for zeros,
// are the states that enter the sequences.
template <DType T, bool VECTOR>
KEXUE_DEVICE void look_back(const Chain& chain, const Tile& tile, const void* firsts, int64_t D,
                            Shared<T>& shared) {
  if (tile.chunk > 0) follow(chain, trail_before(tile), shared);
  each_channel<T>([&](int c) {
    StateOf<T> first = {};
    const int64_t column = column_of<T, VECTOR>(tile, c);
    if (firsts && tile.chunk < kSpan && column < D) {
      first = static_cast<const StateOf<T>*>(firsts)[tile.sequence * D + column];
    }
    shared.state[c] = tile.chunk > 0 ? apply(fold_segments(c, shared), first) : first;
  });
}

// From what a thread's steps do to a state, the state that enters them. `firsts` as above.
template <DType T, bool VECTOR>
KEXUE_DEVICE States<T> enter(const Run<T>& own, const Chain& chain, const Tile& tile,
                             const void* firsts, int64_t D, Shared<T>& shared) {
  const int64_t next = tile.chunk + 1;
  const bool ends_window = next % kWindow == 0, ends_span = next % kSpan == 0;
  scan_warp(own, shared);
  sync_block();
  each_channel<T>([&](int c) { fold_warps(c, shared); });
  if (!tile.last && !ends_window) {
    publish<T>(chain, tile, [&](int c) { return shared.total[c]; });
  } else if (!tile.last && !ends_span) {
    follow(chain, {tile.slot - (kWindow - 1), 0, kWindow - 1}, shared);
    publish<T>(chain, tile,
               [&](int c) { return then(fold_segments(c, shared), shared.total[c]); });
  }
  look_back<T, VECTOR>(chain, tile, firsts, D, shared);
  if (!tile.last && ends_span) {
    publish<T>(chain, tile, [&](int c) {
      return AffineOf<T>{{}, apply(shared.total[c], shared.state[c])};
    });
  }
  sync_block();
  States<T> state;
#pragma unroll
  for (int k = 0; k < kChannels<T>; ++k) {
    const int c = vector_index() * kChannels<T> + k;
    state.channel[k] = apply(shared.warps[warp_index()][c], shared.state[c]);
    if (lane_index() >= kVectors) {
      const AffineOf<T> before = shared.groups[k][thread_index() - kVectors];
      state.channel[k] = apply(before, state.channel[k]);
    }
  }
  return state;
}

}  // namespace kexue
