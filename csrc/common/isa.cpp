#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace kexue {
namespace {

#define KEXUE_NAME(isa, unused) #isa,
constexpr const char* kNames[] = {KEXUE_ISAS(KEXUE_NAME, )};
#undef KEXUE_NAME
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);

// `__builtin_cpu_supports` also asks whether the system saves the wide registers.
bool runs_here([[maybe_unused]] const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx2" || name == "avx512") {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("f16c");
    if (name == "avx2") return avx2;
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return true;
}

Isa find(const char* asker, const std::string& wanted) {
  for (int i = 0; i < kCount; ++i) {
    if (wanted == kNames[i] && runs_here(wanted)) return static_cast<Isa>(i);
  }
  std::string supported;
  for (const std::string& name : supported_isas()) supported += " " + name;
  throw std::invalid_argument(std::string(asker) + ": expected one of" + supported + ", got " +
                              wanted);
}

Isa initial() {
  const char* wanted = std::getenv("KEXUE_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return find("", supported_isas().back());
  return find("KEXUE_CPU_ISA", wanted);
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{initial()};
  return isa;
}

}  // namespace

Isa cpu_isa() { return current().load(std::memory_order_relaxed); }

void set_cpu_isa(const std::string& name) { current() = find("name", name); }

const char* name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<std::string> supported_isas() {
  std::vector<std::string> supported;
  for (const char* name : kNames) {
    if (runs_here(name)) supported.emplace_back(name);
  }
  return supported;
}

}  // namespace kexue
