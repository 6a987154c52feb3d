// A matrix of elements somewhere in memory.
#pragma once

#include "common/types.h"

namespace kexue {

// Strides in elements; the dtype is the call's.
struct MatrixView {
  const void* data;
  int64_t row, column;
};

}  // namespace kexue
