// The CPU kernels of selective_scan: one thread's walks, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "scan/selective_scan.h"

namespace kexue {

// States of some channels, by strides in elements; null: zeros, or not wanted.
struct StateRows {
  void* data;
  int64_t channel, state;
};

// Steps [begin, end) of a batch row, all of one sequence. `enter` is what comes in from the
// neighbouring steps: a state, or, against the forward's direction, a state's gradient.
struct SelectivePiece {
  int64_t row, sequence, begin, end;
  StateRows enter, leave;
};

// Some channels of pieces in the order of the walk. Without `outputs`, only what leaves is found
// (from a state of zeros: the pieces' own share of it).
struct SelectiveWalk {
  int64_t channel, channels;
  const SelectivePiece* pieces;
  int64_t count;
  bool outputs;
  double* dt_sums;  // [d] += the sum of dt, or null
};

// What one walk adds to sums over all steps, [d] or [d, n], and over channels, [batch, L, groups,
// n]; those over channels are zeros where the walk has no channel of the group.
struct SelectiveSums {
  void *A, *B, *C;
  float *D, *delta_bias;  // or null
};

// add_up: out[i] = the sum over t < terms of from[t * size + i], begin <= i < end, rounded once.
#define KEXUE_SELECTIVE_SCAN(isa, unused)                                           \
  namespace isa {                                                                   \
  void selective_scan_forward(const SelectiveForward& call, const SelectiveWalk&);  \
  void selective_scan_backward(const SelectiveBackward& call, const SelectiveWalk&, \
                               const SelectiveSums& sums);                          \
  void add_up(DType, const float* from, int64_t terms, int64_t size, int64_t begin, \
              int64_t end, void* out);                                              \
  }
KEXUE_ISAS(KEXUE_SELECTIVE_SCAN, )
#undef KEXUE_SELECTIVE_SCAN

}  // namespace kexue
