// nearest_codebook on CPU: a search, shared among threads.
#pragma once

#include "vq/nearest_codebook_cpu.h"

namespace kexue {

// Every index does not depend on the number of threads.
void nearest_codebook_on_threads(const NearestCodebook& call, int threads);

}  // namespace kexue
