// linear_scan on CUDA devices, as the bindings see it. Strides are in elements; every pointer is
// of the current device; nothing waits for the device. Errors of CUDA are std::runtime_error.
#pragma once

#include "scan/linear_scan.h"

namespace kexue {

// How a call is cut: tiles of warps x steps_per_warp steps.
struct LinearScanCut {
  int64_t chunks;     // rows of partial sums (of each batch row) where grad_a is time-invariant
  int64_t workspace;  // bytes, 16-byte aligned; 0: none is needed
};

int linear_scan_steps_per_warp(bool backward);
LinearScanCut linear_scan_cut(const LinearScanShape&, DType, bool backward, int warps);

void linear_scan_forward_cuda(const LinearScanForward&, DType, int warps, void* workspace,
                              void* stream);
void linear_scan_backward_cuda(const LinearScanBackward&, DType, int warps, bool partial,
                               void* workspace, void* stream);

}  // namespace kexue
