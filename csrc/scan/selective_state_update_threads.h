// One step of selective_scan for every sequence of a batch, on CPU: a call, shared among threads.
#pragma once

#include "scan/selective_state_update_cpu.h"

namespace kexue {

void state_update_on_threads(const StateUpdate& call, int threads);

}  // namespace kexue
