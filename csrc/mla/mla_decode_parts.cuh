// What the parties of mla_decode's Hopper kernel share (mla_decode_hopper.cuh has the plan): its
// arguments, its shared memory, the loader, and what both warp groups do.
#pragma once

#include "common/hopper.cuh"
#include "mla/mla_decode_cut.h"

namespace kexue::mla {

using hopper::Barrier;
using hopper::kTileBytes;
using hopper::kTileChannels;

constexpr int kTiles = kWidth / kTileChannels;
constexpr int kHalfTiles = kValues / kTileChannels / 2;  // under half of the output's columns
constexpr int kWeights = kTiles - 1;                     // the tile that weights replace
constexpr int kStages = 2;
constexpr int kGroup = 128, kGroupWarps = kGroup / 32;   // threads and warps of a warp group
constexpr int kDecodeThreads = 3 * kGroup;
// Registers of a thread: 168 of each when the block starts, all that there are.
constexpr int kLoaderRegisters = 24, kGroupRegisters = 240;
static_assert((kLoaderRegisters + 2 * kGroupRegisters) * kGroup <= 64 * 1024);
constexpr int kScores = kKeys / 2, kColumns = kValues / 4;  // a thread's part of S, of the output
enum : int { kBoth = 1, kOfWeigher, kOfFollower };       // barriers for some of the threads

struct DecodeArgs {
  hopper::TensorMap pages;  // [num_blocks, block_size, 576], loaded by pieces of rows
  DecodeSizes sizes;
  const void* q;  // rows of 576, 16-byte aligned; strides in elements
  int64_t stride_qb, stride_qt, stride_qh;
  const int32_t *table, *seqlens;
  void* out;    // [B, Tq, H, 512]; of several splits: float32 [splits, B, Tq, H, 512]
  float* lse;   // [B, H, Tq] or [splits, B, H, Tq], natural
  float scale;  // softmax_scale log2(e)
};

struct DecodeShared {
  uint8_t q[kTiles][kTileBytes];
  uint8_t kv[kStages][kTiles][kTileBytes];
  float kept[kStages][kQueries];  // by what the output so far is to be multiplied
  float inverse[kQueries];        // of the sums of weights
  Barrier full[kStages][kTiles], weighed[kStages], empty[kStages][2];
};
static_assert(sizeof(DecodeShared) + 1024 <= 227 * 1024);

// Block i of the keys goes to stage i % 2, whose barriers are then in phase i / 2.
KEXUE_DEVICE int stage_of(int i) { return i % kStages; }
KEXUE_DEVICE int parity_of(int i) { return i / kStages % 2; }

KEXUE_DEVICE void init_barriers(DecodeShared& shared) {
  for (int stage = 0; stage < kStages; ++stage) {
    for (Barrier& barrier : shared.full[stage]) hopper::init_barrier(barrier, 1);
    hopper::init_barrier(shared.weighed[stage], kGroup);
    for (Barrier& barrier : shared.empty[stage]) hopper::init_barrier(barrier, kGroupWarps);
  }
  hopper::publish_barriers();
}

// ---- the loader

KEXUE_DEVICE void load_keys(const DecodeArgs& args, const Work& work, DecodeShared& shared) {
  const int lane = thread_index() % 32;
  const int rows = piece_rows(args.sizes.block_size);
  for (int i = 0; i < key_blocks(work); ++i) {
    const int stage = stage_of(i), first = work.begin + i * kKeys;
    const int here = work.end - first < kKeys ? work.end - first : kKeys;
    const int pieces = int(ceil_div(here, rows));  // at most 64: two of a lane
    Place place[2] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int piece = lane + 32 * k;
      if (piece < pieces) {
        place[k] = place_of(args.sizes, args.table, work.b, first + piece * rows);
      }
    }
    for (int tile = 0; tile < kTiles; ++tile) {
      const int half = tile / kHalfTiles == 0 ? 0 : 1;
      if (tile % kHalfTiles == 0 && tile < kWeights) {
        hopper::await(shared.empty[stage][half], parity_of(i) ^ 1);
      }
      Barrier& full = shared.full[stage][tile];
      if (lane == 0) hopper::arrive_expecting(full, pieces * rows * hopper::kRowBytes);
      hopper::sync_warp();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int piece = lane + 32 * k;
        if (piece < pieces) {
          hopper::load_box(shared.kv[stage][tile] + piece * rows * hopper::kRowBytes, args.pages,
                           tile * kTileChannels, place[k].row, place[k].page, full);
        }
      }
    }
  }
}

// ---- what both warp groups do

// Queries into their tiles, zeros where there are none.
KEXUE_DEVICE void load_queries(const DecodeArgs& args, const Work& work, DecodeShared& shared) {
  constexpr int kUnits = kWidth * 2 / hopper::kUnitBytes;  // of a row
  constexpr int kTileUnits = hopper::kRowBytes / hopper::kUnitBytes;
  for (int k = thread_index(); k < kQueries * kUnits; k += 2 * kGroup) {
    const int row = k / kUnits, unit = k % kUnits, m = work.query + row;
    const int t = m / args.sizes.H, h = m % args.sizes.H;
    Pack x = {};
    if (t < args.sizes.Tq) {
      const int64_t at = work.b * args.stride_qb + t * args.stride_qt + h * args.stride_qh;
      x = load_pack(static_cast<const uint16_t*>(args.q) + at + unit * 8);
    }
    store_pack(shared.q[unit / kTileUnits] + hopper::tile_offset(row, unit % kTileUnits * 8), x);
  }
  hopper::fence_proxy();
}

// Rows from `count` on of four tiles become zeros, since a weight of zero times NaN is NaN.
KEXUE_DEVICE void clear_values(uint8_t (*tiles)[kTileBytes], int count, int barrier) {
  constexpr int kUnits = hopper::kRowBytes / hopper::kUnitBytes;
  const int thread = thread_index() % kGroup;
  for (int k = count * kUnits + thread; k < kKeys * kUnits; k += kGroup) {
    for (int tile = 0; tile < kHalfTiles; ++tile) {
      store_pack(tiles[tile] + k * hopper::kUnitBytes, Pack{});
    }
  }
  hopper::fence_proxy();
  hopper::sync_some(barrier, kGroup);
}

// A thread has two rows of the output: kept[0] goes with its first, kept[1] with the other.
KEXUE_DEVICE void rescale(float (&out)[kColumns], const float (&kept)[2]) {
  if (!hopper::any_of_warp(kept[0] != 1.0f || kept[1] != 1.0f)) return;
#pragma unroll
  for (int k = 0; k < kColumns; ++k) out[k] *= kept[k / 2 % 2];
}

// All that this warp's products read of the stage is read.
KEXUE_DEVICE void release(Barrier& empty) {
  if (thread_index() % 32 == 0) hopper::arrive(empty);
}

template <DType T>
KEXUE_DEVICE uint32_t halves(float low, float high) {
  return T == DType::bf16 ? bfloats_of_floats(low, high) : halves_of_floats(low, high);
}

// This warp group's half of the output's columns, normalised.
template <DType T>
KEXUE_DEVICE void store_output(const DecodeArgs& args, const Work& work,
                               const float (&out)[kColumns], const float (&inverse)[2], int half) {
  const int thread = thread_index() % kGroup;
  const int queries = args.sizes.Tq * args.sizes.H;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int m = work.query + hopper::fragment_row(thread, row * 2);
    if (m >= queries) continue;
    const int64_t at = (int64_t(work.split) * args.sizes.B + work.b) * queries + m;
    const int64_t first = at * kValues + half * (kValues / 2) + hopper::fragment_column(thread, 0);
#pragma unroll
    for (int k = row * 2; k < kColumns; k += 4) {
      const float low = out[k] * inverse[row], high = out[k + 1] * inverse[row];
      const int64_t to = first + k / 4 * 8;
      if (args.sizes.splits > 1) {
        hopper::store_floats(static_cast<float*>(args.out) + to, low, high);
      } else {
        hopper::store_word(static_cast<uint16_t*>(args.out) + to, halves<T>(low, high));
      }
    }
  }
}

}  // namespace kexue::mla
