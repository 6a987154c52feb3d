// nearest_codebook on CPU for up to kFewRows rows: each code is read once, nothing is packed.
#pragma once

#include "vq/nearest_codebook_few_cpu.h"

namespace kexue {

// Every index does not depend on the number of threads.
void nearest_codebook_few_on_threads(const NearestCodebook& call, int threads);

}  // namespace kexue
