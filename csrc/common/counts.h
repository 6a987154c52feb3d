// A small number known at run time as one that the compiler knows. For *_cpu.cpp files only.
#pragma once

#include "common/types.h"

namespace kexue::KEXUE_ISA {

template <int n>
struct Int {
  static constexpr int value = n;
};

// body(Int<n>{}) for 1 <= n <= most
template <int most, class Body>
KEXUE_INLINE void with_int(int64_t n, const Body& body) {
  if constexpr (most == 1) {
    body(Int<1>{});
  } else {
    if (n == most) return body(Int<most>{});
    with_int<most - 1>(n, body);
  }
}

}  // namespace kexue::KEXUE_ISA
