// How a call of selective_scan is cut up on a GPU: which steps and channels a block takes.
//
// Steps are cut into segments: a sequence, or where there are too few of them, its pieces between
// multiples of `split`. Channels are cut into tiles that never straddle groups.
#pragma once

#include "scan/gpu.cuh"
#include "scan/selective_scan_cuda.h"

namespace kexue::selective {

// Steps [begin, end).
struct Stretch {
  int64_t begin, end;

  KEXUE_DEVICE bool has(int64_t step) const { return step >= begin && step < end; }
};

struct Segment : Stretch {
  int64_t sequence, batch;
  bool first, last;    // of its sequence
  bool there;
};

// Packed: sequence i has the slots from first_slot(i) on, which are enough, and at least one.
KEXUE_DEVICE int64_t first_slot(const Inputs& in, int64_t sequence) {
  return in.cu_seqlens[sequence] / in.cut.split + sequence;
}

KEXUE_DEVICE int64_t sequence_of(const Inputs& in, int64_t slot) {
  int64_t low = 0, high = in.sequences;  // the answer is in [low, high)
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_slot(in, middle) <= slot ? low : high) = middle;
  }
  return low;
}

KEXUE_DEVICE Segment segment_of(const Inputs& in, int64_t slot) {
  Segment segment = {};
  int64_t start = 0, stop = in.L, base = 0, piece;
  if (in.cu_seqlens) {
    segment.sequence = sequence_of(in, slot);
    start = in.cu_seqlens[segment.sequence], stop = in.cu_seqlens[segment.sequence + 1];
    base = start / in.cut.split;
    piece = slot - base - segment.sequence;
  } else {
    const int64_t pieces = ceil_div(in.L, in.cut.split);
    segment.sequence = segment.batch = slot / pieces;
    piece = slot % pieces;
  }
  const int64_t end = (base + piece + 1) * in.cut.split;
  segment.begin = piece == 0 ? start : (base + piece) * in.cut.split;
  segment.end = end < stop ? end : stop;
  segment.first = piece == 0;
  segment.there = piece == 0 || segment.begin < stop;
  segment.last = segment.there && segment.end == stop;
  return segment;
}

struct ChannelTile {
  int64_t index;       // among all
  int64_t begin, end;  // channels
};

KEXUE_DEVICE ChannelTile channel_tile(const Cut& cut, int64_t index, int channels) {
  const int64_t run = index / cut.run_tiles, tile = index % cut.run_tiles;
  const int64_t begin = run * cut.run + tile * channels, stop = (run + 1) * cut.run;
  return {index, begin, begin + channels < stop ? begin + channels : stop};
}

}  // namespace kexue::selective
