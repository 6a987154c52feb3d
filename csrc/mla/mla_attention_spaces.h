// Memory for threads to work in.
#pragma once

#include <cstdint>
#include <memory>

namespace kexue {

// The same for each, on cache lines.
class MlaSpaces {
 public:
  MlaSpaces(int64_t count, int64_t floats)
      : floats_((floats + kLine - 1) / kLine * kLine),
        data_(new float[count * floats_ + kLine]) {}

  float* at(int64_t job) const {
    constexpr uintptr_t bytes = kLine * sizeof(float);
    const uintptr_t address = reinterpret_cast<uintptr_t>(data_.get()) + bytes - 1;
    return reinterpret_cast<float*>(address / bytes * bytes) + job * floats_;
  }

 private:
  static constexpr int64_t kLine = 16;
  const int64_t floats_;
  const std::unique_ptr<float[]> data_;
};

}  // namespace kexue
