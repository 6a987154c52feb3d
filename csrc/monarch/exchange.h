// Lanes of two vectors, exchanged. For *_cpu.cpp files only.
#pragma once

#include "common/lanes.h"

namespace kexue::KEXUE_ISA {

// For `shuffle`: lanes whose index has no bit `part`, of one vector and then of the other, each
// `part` of them; and those that have it.
template <int part>
struct Even {
  static constexpr int at(int i) { return i & part ? kWidth + i - part : i; }
};
template <int part>
struct Odd {
  static constexpr int at(int i) { return i & part ? kWidth + i : i + part; }
};

}  // namespace kexue::KEXUE_ISA
