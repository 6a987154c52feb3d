// The short causal convolution on CPU: a call, shared among threads.
#pragma once

#include "scan/causal_conv_cpu.h"

namespace kexue {

void causal_conv_on_threads(const CausalConv& call, int threads);

}  // namespace kexue
