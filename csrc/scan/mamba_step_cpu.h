// One token through a Mamba mixer on CPU: four stages, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "common/types.h"
#include "scan/selective_state_update_cpu.h"

namespace kexue {

struct Layer {
  const void* weight;  // [out, in] of dtype, contiguous
  const void* bias;    // [out] of dtype, or null
};

// x [batch, dim] of float; window [batch, kept, d] and out [batch, dim] of dtype. d are the inner
// channels and n the states; taps, the last of which meets the newest input, and D are of float.
struct MambaStep {
  int64_t batch, dim, d, n, rank, taps_count, kept;
  DType dtype;
  const float* x;
  Strided window;
  Layer in_proj, x_proj, dt_proj, out_proj;  // to 2 d, rank + 2 n, d and dim
  const float* taps;       // [taps_count, d]
  const float* conv_bias;  // [d] or null
  StateUpdate update;      // with one head and softplus; its data are the arrays below
  bool normalised;         // dt, B and C are divided by their root mean squares
  float eps;
  void* out;
};

// What one stage leaves to the next, each [batch, ..], contiguous.
struct MambaStepRoom {
  float *u, *z, *dt, *y;  // d
  float* selected;        // rank + 2 n: dt, B and C
};

// in_proj, the convolution (`window` advances) and silu for channels [begin, end); x_proj's rows;
// dt_proj and the states' update for channels; out_proj's rows.
#define KEXUE_MAMBA_STEP(isa, unused)                                                             \
  namespace isa {                                                                                 \
  void mamba_step_enter(const MambaStep&, const MambaStepRoom&, int64_t begin, int64_t end);      \
  void mamba_step_select(const MambaStep&, const MambaStepRoom&, int64_t begin, int64_t end);     \
  void mamba_step_update(const MambaStep&, const MambaStepRoom&, int64_t begin, int64_t end);     \
  void mamba_step_leave(const MambaStep&, const MambaStepRoom&, int64_t begin, int64_t end);      \
  }
KEXUE_ISAS(KEXUE_MAMBA_STEP, )
#undef KEXUE_MAMBA_STEP

}  // namespace kexue
