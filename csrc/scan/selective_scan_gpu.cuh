// What selective_scan asks of a GPU beyond gpu.cuh. tests/emulation offers the same names.
#pragma once

#include "scan/gpu.cuh"

#if defined(__CUDACC__)

namespace kexue {

// ---- numbers

KEXUE_DEVICE float exp2_approx(float x) {  // 2 units in the last place; denormals are zero
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KEXUE_DEVICE float reciprocal(float x) {  // 1 unit in the last place
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
KEXUE_DEVICE float fused(float x, float y, float z) { return __fmaf_rn(x, y, z); }
KEXUE_DEVICE float nearest(float x) { return rintf(x); }
KEXUE_DEVICE float absolute(float x) { return fabsf(x); }

// ---- threads and memory

KEXUE_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// Shared memory whose size the launch tells.
KEXUE_DEVICE float* launch_shared() {
  extern __shared__ __align__(16) float memory[];
  return memory;
}

KEXUE_DEVICE Pack load_pack(const void* p) { return pack_of(*static_cast<const uint4*>(p)); }
KEXUE_DEVICE void store_pack(void* p, Pack x) { *static_cast<uint4*>(p) = vector_of(x); }

// Keeps what comes after from being started before: that takes registers.
KEXUE_DEVICE void settle() { asm volatile("" ::: "memory"); }

KEXUE_DEVICE void prefetch(const void* p) {  // into the L2 cache
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// ---- host

template <class Args>
void launch_with_shared(const char* op, void (*kernel)(Args), int64_t blocks, int threads,
                        int shared_bytes, void* stream, const Args& args) {
  constexpr int kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
               op);
  }
  constexpr int64_t kWide = 1 << 30;
  const dim3 grid(blocks < kWide ? blocks : kWide, (blocks + kWide - 1) / kWide);
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
  check_cuda(cudaGetLastError(), op);
}

}  // namespace kexue

#endif
