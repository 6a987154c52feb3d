// One token through a Mamba mixer on CPU: a call, shared among threads.
#pragma once

#include "scan/mamba_step_cpu.h"

namespace kexue {

// call.update holds the states and what belongs to them; its data come from the stages before.
void mamba_step_on_threads(MambaStep call, int threads);

}  // namespace kexue
