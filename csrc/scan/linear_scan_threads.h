// linear_scan on CPU: a call, shared among threads.
#pragma once

#include "scan/linear_scan_cpu.h"

namespace kexue {

void linear_scan_on_threads(const LinearScanForward& call, DType dtype, int threads);

// grad_a, by `kind`: [B, L, D] in the data's or the state's dtype, or sums, zero before the call:
// [B, L / kTileSteps + 1, D], packed [1, L / kTileSteps + sequences, D], in the state's dtype.
void linear_scan_on_threads(const LinearScanBackward& call, DType dtype, GradA kind, int threads);

}  // namespace kexue
