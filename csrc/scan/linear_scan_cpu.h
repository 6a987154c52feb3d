// The CPU kernels of linear_scan: one thread's walks, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "scan/linear_scan.h"

namespace kexue {

// Steps per row of grad_a's partial sums (and of the tiles that a walk goes by).
constexpr int64_t kTileSteps = 64;

// Some channels of some steps of one sequence: the first element in the order of the walk, and
// strides in elements; `step` is negative where the walk goes towards lower addresses.
struct Rows {
  void* data;
  int64_t step, channel;
};

// States [channels] are float (or complex); a null one to enter from is zeros.
struct ForwardWalk {
  int64_t steps, channels;
  Rows a, b, h;
  const void* enter;
  void* leave;  // or null
  bool stream;  // store past the caches; h is then aligned to cache lines
};

// What the steps do to a state that passes through: Affine<S>, in two arrays.
struct Summary {
  int64_t steps, channels;
  Rows a, x;  // x: b, or grad_h
  bool backward;
  void *product, *local;
};

enum class GradA { none, data, state, sums };  // dtype of the output; sums of tiles, of states

// Against the forward's direction. What flows from step to step is s_t = conj(a_t) db_t, with
// db_t = g_t + s_{t+1} and da_t = db_t conj(h_{t-1}).
struct BackwardWalk {
  int64_t steps, channels;
  Rows a, grad_h;
  Rows h;               // h_{t-1} beside each step, past the end at the last if it is the first
  bool first;           // the walk's last step is the sequence's first: its h_{t-1} is `initial`
  const void* initial;  // [channels] or null
  const void* enter;
  void* leave;  // or null
  Rows grad_b;
  GradA kind;
  Rows grad_a;  // for sums, one row a tile
  bool stream;
};

#define KEXUE_LINEAR_SCAN(isa, unused)                        \
  namespace isa {                                             \
  void linear_scan_forward(DType, const ForwardWalk& walk);   \
  void linear_scan_summary(DType, const Summary& walk);       \
  void linear_scan_backward(DType, const BackwardWalk& walk); \
  }
KEXUE_ISAS(KEXUE_LINEAR_SCAN, )
#undef KEXUE_LINEAR_SCAN

}  // namespace kexue
