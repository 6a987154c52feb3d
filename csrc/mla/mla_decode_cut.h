// How mla_decode's Hopper kernel cuts a call up, and which keys a query sees: plain arithmetic, the
// same on CPU and GPU.
#pragma once

#include <cstdint>

#include "common/hopper_layout.h"

namespace kexue::mla {

constexpr int kWidth = 576;   // of a cached row: a key
constexpr int kValues = 512;  // its first columns: the value
constexpr int kKeys = hopper::kTileRows;     // of a block: what is loaded and multiplied at once
constexpr int kQueries = hopper::kTileRows;  // of a thread block: heads within tokens

struct DecodeSizes {
  int B, Tq, H, num_blocks, block_size, max_blocks, splits;
  bool causal;
};

KEXUE_INLINE constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
KEXUE_INLINE constexpr int clamp(int64_t x, int64_t low, int64_t high) {
  return int(x < low ? low : x > high ? high : x);
}

KEXUE_INLINE int query_tiles(const DecodeSizes& sizes) {
  return int(ceil_div(int64_t(sizes.Tq) * sizes.H, kQueries));
}

// What a thread block does: queries from `query` on (m = token * H + head) of sequence b, with the
// keys from `begin` to `end` of its `length`.
struct Work {
  int b, split, query, length, begin, end;
};

// Thread blocks that read the same keys are neighbours, and so share the L2 cache.
KEXUE_INLINE Work work_of(const DecodeSizes& sizes, int64_t index, const int32_t* seqlens) {
  const int tiles = query_tiles(sizes);
  const int64_t part = index / tiles;
  const int b = int(part / sizes.splits), split = int(part % sizes.splits);
  const int length = clamp(seqlens[b], 0, int64_t(sizes.max_blocks) * sizes.block_size);
  const int64_t share = ceil_div(ceil_div(length, kKeys), sizes.splits) * kKeys;
  const int begin = clamp(split * share, 0, length), end = clamp(begin + share, 0, length);
  return {b, split, int(index % tiles) * kQueries, length, begin, end};
}

KEXUE_INLINE int key_blocks(const Work& work) {
  return int(ceil_div(work.end - work.begin, kKeys));
}

// Query m sees the keys of its split that lie before this one; it grows with m.
KEXUE_INLINE int visible_end(const DecodeSizes& sizes, const Work& work, int m) {
  if (!sizes.causal) return work.end;
  return clamp(int64_t(work.length) - sizes.Tq + m / sizes.H + 1, work.begin, work.end);
}

// Rows that are loaded at once: as many of 64 as never lie in two pages, since blocks of 64 keys
// begin at multiples of 64.
KEXUE_INLINE constexpr int piece_rows(int block_size) {
  const int power = block_size & -block_size;  // the largest power of 2 that divides it
  return power < kKeys ? power : kKeys;
}

// Where a key lies. Ids of no page are clamped to the nearest.
struct Place {
  int page, row;
};
KEXUE_INLINE Place place_of(const DecodeSizes& sizes, const int32_t* table, int b, int key) {
  const int32_t id = table[int64_t(b) * sizes.max_blocks + key / sizes.block_size];
  return {clamp(id, 0, sizes.num_blocks - 1), key % sizes.block_size};
}

}  // namespace kexue::mla
