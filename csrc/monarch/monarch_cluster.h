// How the thread blocks of a cluster share a Monarch product: plain arithmetic, the same on CPU and
// GPU. Of the factors w1 [k, q, p] and w2 [l, s, r] k / blocks and l / blocks are a thread block's
// own, and of z [rows, r, l] what its own w2 multiplies, in its shared memory. The factors are
// there too (resident), or come by in pieces for every tile of rows (streamed).
#pragma once

#include <cstdint>

#include "common/hopper_layout.h"

namespace kexue::monarch {

using hopper::kTileBytes;
using hopper::kTileChannels;
using hopper::kTileRows;
using hopper::kUnitBytes;

constexpr int kTogether = 8;  // blocks multiplied together: 16 bytes of z or y
constexpr int kWalkers = 2;   // warp groups that multiply
constexpr int kSmallestCluster = 2, kLargestCluster = 16;
constexpr int kMostShared = 227 * 1024 - 1024;  // bytes, but for alignment

// Resident: each walker has tiles of its own.
constexpr int kResidentRows = 32;
constexpr int kStages = 4;  // of a walker's boxes of x
constexpr int kBoxBytes = kResidentRows * kTileChannels * 2;

// Streamed: they share pieces of the factors, and each has half of a tile's rows.
constexpr int kStreamRows = 40;
constexpr int kPieces = 6;                                              // on their way
constexpr int kPieceBytes = kWalkers * kStreamRows * kTileChannels * 2;  // of x: the largest
constexpr int kStreamOutputs = 2 * kTileRows;                            // q
constexpr int kQuarter = 4;                                              // blocks of w1 together

constexpr int kHeadBytes = 1024;  // barriers, at most

struct ClusterSizes {
  int N, k, q, p, l, s, r;
  int blocks;  // of a cluster

  KEXUE_INLINE constexpr int firsts() const { return k / blocks; }   // of w1, of a thread block
  KEXUE_INLINE constexpr int seconds() const { return l / blocks; }  // of w2
  KEXUE_INLINE constexpr int tiles(int rows) const { return N / rows + (N % rows > 0); }
  KEXUE_INLINE constexpr int w1_bytes() const { return firsts() * q * p * 2; }
  KEXUE_INLINE constexpr int w2_bytes() const { return seconds() * s * r * 2; }
  KEXUE_INLINE constexpr int z_block(int rows) const { return rows * r * 2; }  // of one of w2
  KEXUE_INLINE constexpr int z_bytes(int rows) const { return seconds() * z_block(rows); }
};

// Bytes of a thread block's shared memory. Sizes beyond it may not fit in an int.
constexpr int64_t resident_bytes(const ClusterSizes& c) {
  const int64_t first = int64_t(c.firsts()) * c.q * c.p, second = int64_t(c.seconds()) * c.s * c.r;
  const int64_t z = int64_t(c.seconds()) * c.r * kResidentRows;
  return (first + second + kWalkers * z) * 2 + kWalkers * kStages * kBoxBytes + kHeadBytes;
}
constexpr int64_t streamed_bytes(const ClusterSizes& c) {
  const int64_t z = int64_t(c.seconds()) * c.r * kStreamRows;
  return kWalkers * z * 2 + kPieces * kPieceBytes + kHeadBytes;
}

constexpr bool whole(const ClusterSizes& c, int firsts) {
  const bool some = c.N > 0 && c.k > 0 && c.q > 0 && c.p > 0 && c.l > 0 && c.s > 0 && c.r > 0;
  return some && c.blocks >= kSmallestCluster && c.blocks <= kLargestCluster &&
         c.k % (firsts * c.blocks) == 0 && c.l % (kTogether * c.blocks) == 0 && c.q % c.l == 0 &&
         c.r == int64_t(c.k) * (c.q / c.l);
}
constexpr bool can_stay(const ClusterSizes& c) {
  const bool boxes = c.p == kTileChannels / 2 || c.p % kTileChannels == 0;
  return whole(c, kTogether) && boxes && c.s % kTogether == 0 && resident_bytes(c) <= kMostShared;
}
constexpr bool can_stream(const ClusterSizes& c) {
  return whole(c, kQuarter) && c.q == kStreamOutputs && c.l == c.q && c.p % kTileChannels == 0 &&
         c.s % kTileRows == 0 && c.r % kTileChannels == 0 && streamed_bytes(c) <= kMostShared;
}

// Hidden unit a of w1's block i is input t of w2's block j, i q + a = t l + j: with m = q / l,
// t = i m + a / l and j = a mod l. So eight adjacent i's with the same a are every m-th t, which z
// and w2 have side by side in shared memory: unit i / 8 * m + a / l of block a mod l.
KEXUE_INLINE constexpr int input_of_unit(int unit, int element, int m) {
  return (unit / m * kTogether + element) * m + unit % m;
}

}  // namespace kexue::monarch
