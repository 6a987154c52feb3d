// vector_quantize on CPU: its passes, shared among threads. No result depends on their number.
#pragma once

#include "vq/vector_quantize_cpu.h"

namespace kexue {

// quantized [N, d], out. Returns the loss: the mean of (x - q)^2, 0 where no row has a code.
float vector_quantize_on_threads(const VectorQuantize& call, void* quantized, int threads);

// scale_x, scale_c: the gradients of the commitment loss and of the codebook loss.
// grad_codebook [K, d] contiguous, zero before the call, or null: not wanted.
void vector_quantize_on_threads(VectorQuantizeBackward call, double scale_x, double scale_c,
                                void* grad_codebook, int threads);

}  // namespace kexue
