// selective_scan on CUDA devices, as the bindings see it. Strides are in elements; every pointer is
// of the current device; nothing waits for the device. Errors of CUDA are std::runtime_error.
//
// States, and what is said to have their type, are float (or complex).
#pragma once

#include "common/types.h"

namespace kexue::selective {

KEXUE_INLINE constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// B or C: per step [batch, L, groups, n] by strides, or time-invariant [d, n].
struct Matrix {
  const void* data;
  int64_t batch, step, group, state;
  int64_t channels;  // of a group; 0: time-invariant
  bool wide;         // can be read by 16 bytes
};

struct Cut {
  int64_t split;      // steps between two boundaries of segments: a multiple of chunk
  int64_t slots;      // room for segments: some may be empty
  int64_t rows;       // blocks of a channel tile: each takes every rows-th slot
  int64_t run;        // neighbouring channels that share B's and C's group
  int64_t run_tiles;  // tiles of a run
};

struct Inputs {
  int64_t batch, L, d, n;
  int64_t chunk;              // steps between two checkpoints
  int64_t sequences;          // batch, or the number of packed ones
  const int64_t* cu_seqlens;  // [sequences + 1], or null
  bool softplus;
  bool wide, wide_out;        // units can be read, written by 16 bytes
  Strided u, delta, z;        // z.data null: none
  const void* A;              // [d, n]
  int64_t first_state;        // of this launch, which takes `states` of n; A, B and C begin there
  int64_t states;
  Matrix B, C;
  const float *D, *bias;  // [d] or null
  const void* initial;    // [sequences, d, n] or null, from first_state
  Cut cut;
};

struct ForwardArgs {
  Inputs in;
  void* out;          // [batch, L, d]
  float* sums;        // [batch, L, d]: y of the states of earlier launches; null: of none
  bool finish;        // write out; else sums
  void* final;        // [sequences, d, n] or null
  void* checkpoints;  // [batch, ceil(L / chunk), n, d] or null
  const void* entering;  // [slots, n, d]: states that enter segments; null: `in.initial` does
  void* local;        // [slots, n, d]: takes what leaves segments that zeros enter; or null
  float* time;        // [slots, d]: takes the sum of dt over segments; or null
};

struct BackwardArgs {
  Inputs in;
  Strided grad_out;
  const void* checkpoints;  // [batch, ceil(L / chunk), n, d]
  const void* grad_final;   // [sequences, d, n] or null
  const void* entering;     // [slots, n, d]: s that enters segments from behind; or null
  void *u, *delta, *z;      // gradients [batch, L, d]; z or null
  void* A;                  // sums over steps [rows, n, d]
  void *B, *C;      // per step: sums over a tile's channels [batch, L, tiles, states]; else as A
  float *D, *bias;  // sums over steps [rows, d]
  void* initial;    // [sequences, d, n] or null
  float* sums;      // [3, batch, L, d]: of the states of earlier launches; or null
  bool finish;      // write u, delta, z, D, bias; else sums
  int64_t tiles;    // of channels
};

struct ReverseArgs {
  Inputs in;  // cut into tiles of kForwardChannels
  Strided grad_out;
  void* local;  // [slots, n, d]: takes s that leaves segments at their beginning, zero entering
  float* time;  // [slots, d]: takes the sum of dt over segments
};

struct ChainArgs {
  Inputs in;
  const void* firsts;  // [sequences, d, n] or null: enters every sequence
  void* states;        // [slots, n, d]: what segments do from zero becomes what enters them
  const float* time;   // [slots, d]
  bool reverse;
};

// Launches take some of the n states each, and need `sums` where that is not all. forward_cuda and
// reverse_cuda make them one after the other; backward_cuda makes one, from in.first_state on. The
// caller sets neither states, wide, wide_out, run_tiles nor finish.
struct Limits {
  int forward_channels, backward_channels;  // of a tile
  int states;                               // of a launch
};
Limits limits(bool complex);

void forward_cuda(ForwardArgs, DType, bool complex, void* stream);
void backward_cuda(BackwardArgs, DType, bool complex, void* stream);
void reverse_cuda(ReverseArgs, DType, bool complex, void* stream);
void chain_cuda(ChainArgs, bool complex, void* stream);

}  // namespace kexue::selective
