// The instruction sets that the CPU kernels were compiled for, and which one runs here.
//
// Each *_cpu.cpp is compiled once per set, inside `namespace kexue::KEXUE_ISA`; what it defines
// must stay in that namespace (or be anonymous or always inlined): a function shared with code
// for another set could be linked in the version that this machine can't run.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "build_config.h"

namespace kexue {

#define KEXUE_ENUMERATOR(isa, unused) isa,
enum class Isa { KEXUE_ISAS(KEXUE_ENUMERATOR, ) };
#undef KEXUE_ENUMERATOR

// The best that this machine supports, or what KEXUE_CPU_ISA or set_cpu_isa lowered it to. A set
// that does not run here is a std::invalid_argument.
Isa cpu_isa();
void set_cpu_isa(const std::string& name);

const char* name(Isa isa);
std::vector<std::string> supported_isas();

// `function` of the namespace that runs here; all are to be declared with KEXUE_ISAS.
#define KEXUE_FOR_THIS_CPU(function) ::kexue::pick({KEXUE_ISAS(KEXUE_ADDRESS_OF, function)})
#define KEXUE_ADDRESS_OF(isa, function) &isa::function,

template <class F>
F pick(std::initializer_list<F> each) {
  return each.begin()[static_cast<int>(cpu_isa())];
}

}  // namespace kexue
