// What the scan kernels ask of a GPU. For a CPU compiler tests/emulation offers the same names.
#pragma once

#include <cstdint>
#include <cstring>

namespace kexue {

struct alignas(16) Pack {
  uint32_t word[4];
};

}  // namespace kexue

#if !defined(__CUDACC__)
#include "cuda_emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#define KEXUE_DEVICE __device__ __forceinline__

namespace kexue {

// ---- memory: data is streamed (read or written once), the chain's records live in L2

KEXUE_DEVICE Pack pack_of(uint4 x) { return {{x.x, x.y, x.z, x.w}}; }
KEXUE_DEVICE uint4 vector_of(Pack x) { return {x.word[0], x.word[1], x.word[2], x.word[3]}; }

KEXUE_DEVICE Pack load_stream(const void* p) { return pack_of(__ldcs((const uint4*)p)); }
KEXUE_DEVICE void store_stream(void* p, Pack x) { __stcs((uint4*)p, vector_of(x)); }
template <class T>
KEXUE_DEVICE T load_l2(const T* p) {  // of 8 or 16 bytes
  using Vector = std::conditional_t<sizeof(T) == 8, uint2, uint4>;
  static_assert(sizeof(T) == sizeof(Vector));
  const Vector x = __ldcg(reinterpret_cast<const Vector*>(p));
  T value;
  memcpy(&value, &x, sizeof x);
  return value;
}
template <class T>
KEXUE_DEVICE void store_l2(T* p, const T& value) {
  using Vector = std::conditional_t<sizeof(T) == 8, uint2, uint4>;
  static_assert(sizeof(T) == sizeof(Vector));
  Vector x;
  memcpy(&x, &value, sizeof x);
  __stcg(reinterpret_cast<Vector*>(p), x);
}

KEXUE_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
KEXUE_DEVICE void store_release(uint32_t* p, uint32_t x) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
KEXUE_DEVICE int64_t fetch_increment(uint64_t* p) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(p), 1ull);
}
KEXUE_DEVICE void pause() {}

// Hides from the compiler that x is what it was: what was made of it is made anew, not kept.
KEXUE_DEVICE void forget(Pack& x) {
#pragma unroll
  for (uint32_t& word : x.word) asm volatile("" : "+r"(word));
}

// ---- threads

template <class T>
KEXUE_DEVICE T& block_shared() {
  __shared__ alignas(16) unsigned char storage[sizeof(T)];
  return *reinterpret_cast<T*>(storage);
}
KEXUE_DEVICE int thread_index() { return threadIdx.x; }
KEXUE_DEVICE int thread_count() { return blockDim.x; }
KEXUE_DEVICE int64_t block_index() { return int64_t(blockIdx.y) * gridDim.x + blockIdx.x; }
KEXUE_DEVICE void sync_block() { __syncthreads(); }
KEXUE_DEVICE uint32_t ballot(bool x) { return __ballot_sync(~0u, x); }

// The value of the lane `delta` below; lanes that have none keep their own.
template <class T>
KEXUE_DEVICE T shuffle_up(T x, int delta) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t word[sizeof(T) / 4];
  memcpy(word, &x, sizeof(T));
#pragma unroll
  for (uint32_t& w : word) w = __shfl_up_sync(~0u, w, delta);
  memcpy(&x, word, sizeof(T));
  return x;
}
KEXUE_DEVICE int64_t broadcast(int64_t x, int lane) { return __shfl_sync(~0u, x, lane); }

// ---- numbers

KEXUE_DEVICE int count_bits(uint32_t x) { return __popc(x); }
KEXUE_DEVICE float float_of_bits(uint32_t x) { return __uint_as_float(x); }
KEXUE_DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }

KEXUE_DEVICE void floats_of_halves(uint32_t x, float& low, float& high) {
  const float2 both = __half22float2(__halves2half2(__ushort_as_half(x & 0xffff),
                                                    __ushort_as_half(x >> 16)));
  low = both.x, high = both.y;
}
KEXUE_DEVICE uint32_t halves_of_floats(float low, float high) {  // to nearest, ties to even
  const __half2 both = __floats2half2_rn(low, high);
  return uint32_t(__half_as_ushort(both.y)) << 16 | __half_as_ushort(both.x);
}
KEXUE_DEVICE uint32_t bfloats_of_floats(float low, float high) {  // to nearest, ties to even
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return uint32_t(__bfloat16_as_ushort(both.y)) << 16 | __bfloat16_as_ushort(both.x);
}

// ---- host

inline void check_cuda(cudaError_t status, const char* op) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA says " + cudaGetErrorName(status) + ", " +
                             cudaGetErrorString(status));
  }
}

inline void zero_async(const char* op, void* data, int64_t bytes, void* stream) {
  check_cuda(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)), op);
}

template <class Args>
void launch(const char* op, void (*kernel)(Args), int64_t blocks, int threads, void* stream,
            const Args& args) {
  constexpr int64_t kWide = 1 << 30;  // beyond it, rows of blocks; the surplus of the last exits
  const dim3 grid(blocks < kWide ? blocks : kWide, (blocks + kWide - 1) / kWide);
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  check_cuda(cudaGetLastError(), op);
}

}  // namespace kexue

#endif
