// Where numbers lie in shared memory and in registers for Hopper's tensor cores: plain arithmetic,
// the same on CPU and GPU. From the PTX ISA, "Asynchronous warpgroup level matrix instructions",
// and the CUDA programming guide, "Tensor memory access" (swizzle patterns).
#pragma once

#include <cstdint>

#include "common/types.h"

namespace kexue::hopper {

// A tile is 64 rows of 64 channels of 16 bits, a row of 128 bytes after the other, at an address
// that is a multiple of 1024. Larger matrices are several tiles, side by side along the channels.
constexpr int kTileRows = 64, kTileChannels = 64;
constexpr int kRowBytes = 128;
constexpr int kTileBytes = kTileRows * kRowBytes;
constexpr int kUnitBytes = 16;                      // that a swizzle moves as one
constexpr int kRepeatRows = 8;                      // after which its pattern repeats
constexpr int kRepeatBytes = kRepeatRows * kRowBytes;
constexpr int kDepth = 16;                          // of one matrix instruction (k)
constexpr int kSteps = kTileChannels / kDepth;      // matrix instructions along a tile

// The 128-byte swizzle: a row's eight units change places, in each of eight rows otherwise, so
// that neither a row nor a column of units lies in few banks. It acts on bits of the address.
KEXUE_INLINE constexpr uint32_t swizzled(uint32_t offset) {
  return offset ^ (offset / kRowBytes % kRepeatRows * kUnitBytes);
}

// Of an element in its tile, in bytes.
KEXUE_INLINE constexpr uint32_t tile_offset(int row, int channel) {
  return swizzled(row * kRowBytes + channel * 2);
}

// What a matrix instruction is told of an operand in shared memory: where it starts and two
// distances, all in units, and (bits 62 and 63) how it is swizzled.
enum class Swizzle : uint64_t { none = 0, bytes_128 = 1 };

KEXUE_INLINE constexpr uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride,
                                           Swizzle swizzle = Swizzle::bytes_128) {
  return uint64_t(address / kUnitBytes & 0x3fff) | uint64_t(leading / kUnitBytes) << 16 |
         uint64_t(stride / kUnitBytes) << 32 | uint64_t(swizzle) << 62;
}

// A tile whose channels are summed over (K-major), as in Q K^T: its rows are those of the
// operand, eight of them every `stride` bytes. Step k takes 16 channels, 32 bytes of each row;
// the leading distance has no use.
KEXUE_INLINE constexpr uint64_t across_channels(uint32_t tile, int step) {
  return descriptor(tile + step * kDepth * 2, kUnitBytes, kRepeatBytes);
}

// Tiles side by side whose rows are summed over (MN-major, "transposed"), as V is in P V: a tile's
// 64 channels are columns of the operand, the next 64 lie `leading` bytes away, and eight rows
// every `stride` bytes. Step k takes 16 rows.
KEXUE_INLINE constexpr uint64_t across_rows(uint32_t tiles, int step) {
  return descriptor(tiles + step * kDepth * kRowBytes, kTileBytes, kRepeatBytes);
}

// Without a swizzle: a unit (8 channels) of each of `rows` rows, then the next unit of all of them.
// Eight rows of a unit lie in one piece of 128 bytes, which is what matrix instructions read.
KEXUE_INLINE constexpr uint32_t unit_offset(int rows, int row, int unit) {
  return (unit * rows + row) * kUnitBytes;
}

// Such an operand, from any multiple of eight rows on, whose channels are summed over. Step k takes
// 16 channels: two units, `leading` bytes apart.
KEXUE_INLINE constexpr uint64_t across_units(uint32_t units, int rows, int step) {
  return descriptor(units + unit_offset(rows, 0, step * 2), rows * kUnitBytes,
                    kRepeatRows * kUnitBytes, Swizzle::none);
}

// Which element of a [64, N] accumulator a warp group's thread holds as its i-th. As pairs i, i + 1
// those of 16 columns are also the thread's part of a [64, 16] first operand.
KEXUE_INLINE constexpr int fragment_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
KEXUE_INLINE constexpr int fragment_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

}  // namespace kexue::hopper
