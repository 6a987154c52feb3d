// selective_scan on CPU: a call, shared among threads.
#pragma once

#include "scan/selective_scan.h"

namespace kexue {

void selective_scan_on_threads(const SelectiveForward& call, int threads);
void selective_scan_on_threads(const SelectiveBackward& call, int threads);

}  // namespace kexue
