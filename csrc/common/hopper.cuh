// What kernels ask of a Hopper GPU beyond its matrix instructions: barriers that count arrivals and
// bytes, the copy engine (TMA), and clusters of thread blocks. For a CPU compiler tests/emulation
// offers the same names, hopper_products.cuh's included.
//
// Two kinds of access ("proxies") meet in shared memory: ordinary loads and stores by threads, and
// those of the copy engine and the matrix instructions. A barrier orders one kind; between them
// fence_proxy() is needed as well.
#pragma once

#include "scan/selective_scan_gpu.cuh"

#if !defined(__CUDACC__)
#include "hopper_emulation.h"
#else

#include <cuda.h>

#include "common/hopper_products.cuh"

namespace kexue::hopper {

// ---- memory

KEXUE_DEVICE void store_word(void* p, uint32_t x) { *static_cast<uint32_t*>(p) = x; }
KEXUE_DEVICE void store_floats(float* p, float x, float y) {
  *reinterpret_cast<float2*>(p) = make_float2(x, y);
}

KEXUE_DEVICE uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// Shared memory whose size the launch tells, from a multiple of 1024 on (launch_large adds room).
template <class T>
KEXUE_DEVICE T& aligned_shared() {
  extern __shared__ unsigned char aligned_memory[];
  const uint32_t address = shared_address(aligned_memory);
  return *reinterpret_cast<T*>(aligned_memory + ((0u - address) & 1023u));
}

// Ordinary stores before are seen by the copy engine and the matrix instructions after.
KEXUE_DEVICE void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- threads

KEXUE_DEVICE int warp_index() { return __shfl_sync(~0u, int(threadIdx.x) / 32, 0); }
KEXUE_DEVICE void sync_warp() { __syncwarp(); }
KEXUE_DEVICE bool any_of_warp(bool x) { return __any_sync(~0u, x); }

// Registers of each of this warp group's threads: what some give back others take.
template <int N>
KEXUE_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
KEXUE_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Of some of the block's threads, whole warps; 0 is sync_block's.
KEXUE_DEVICE void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- barriers in shared memory. A phase ends when all arrivals and all bytes expected are there.

using Barrier = uint64_t;

KEXUE_DEVICE void init_barrier(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(arrivals)
               : "memory");
}
KEXUE_DEVICE void publish_barriers() {  // before the block's sync
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  fence_proxy();
}
KEXUE_DEVICE void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier))
               : "memory");
}
KEXUE_DEVICE void arrive_expecting(Barrier& barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(&barrier)),
               "r"(bytes)
               : "memory");
}
// Until the phase of this parity (0, 1, 0, ...) has ended; parity 1 at first is in the past.
KEXUE_DEVICE void await(Barrier& barrier, int parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// ---- clusters: thread blocks that run at the same time and reach each other's shared memory,
// which must not be touched before its block has begun (sync_cluster) or after its end (again).

KEXUE_DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
KEXUE_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
KEXUE_DEVICE int cluster_index() { return blockIdx.x / cluster_size(); }
KEXUE_DEVICE int cluster_count() { return gridDim.x / cluster_size(); }

KEXUE_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Where block `rank` has what lies at `address` of this block's shared memory.
KEXUE_DEVICE uint32_t address_in(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
KEXUE_DEVICE void store_remote(uint32_t address, Pack x) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.word[0]),
               "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3])
               : "memory");
}
KEXUE_DEVICE void store_remote(uint32_t address, uint32_t low, uint32_t high) {
  asm volatile("st.shared::cluster.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(low), "r"(high)
               : "memory");
}
// fence_proxy(), for stores to any block of the cluster.
KEXUE_DEVICE void fence_cluster() {
  asm volatile("fence.proxy.async.shared::cluster;" ::: "memory");
}
// What this thread did or was told of before is known to whoever awaits the barrier.
KEXUE_DEVICE void arrive_remote(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier)
               : "memory");
}
// await(), where other blocks arrive.
KEXUE_DEVICE void await_cluster(Barrier& barrier, int parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// ---- the copy engine

using TensorMap = CUtensorMap;

// A box of the map, from (channel, row, page) on, to shared memory; `barrier` gets its bytes. What
// lies outside the array counts and is zeros.
KEXUE_DEVICE void load_box(void* to, const TensorMap& map, int channel, int row, int page,
                           Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(&map), "r"(channel), "r"(row), "r"(page), "r"(shared_address(&barrier))
      : "memory");
}

// The same box, into the L2 cache.
KEXUE_DEVICE void prefetch_box(const TensorMap& map, int channel, int row, int page) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(&map),
               "r"(channel), "r"(row), "r"(page)
               : "memory");
}

// ---- host

// An array [pages, rows, channels] of 16-bit elements, of which boxes of [1, box_rows,
// box_channels] are loaded, 128-byte swizzled. Sizes are innermost first; strides are in bytes, of
// rows and pages. The driver's function is found at run time: nothing links with it.
inline TensorMap tensor_map(const char* op, const void* data, DType dtype,
                            const uint64_t (&sizes)[3], const uint64_t (&strides)[2],
                            uint32_t box_rows, uint32_t box_channels) {
  static const auto encode = [&] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                cudaEnableDefault, &status),
               op);
#else
    check_cuda(
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status), op);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  if (!encode) throw std::runtime_error(std::string(op) + ": the driver has no tensor maps");
  TensorMap map;
  const uint32_t box[3] = {box_channels, box_rows, 1}, steps[3] = {1, 1, 1};
  const CUtensorMapDataType type =
      dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result =
      encode(&map, type, 3, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled says error " +
                             std::to_string(int(result)));
  }
  return map;
}

constexpr int kAlignment = 1024;

template <class Args>
void launch_large(const char* op, void (*kernel)(Args), int64_t blocks, int threads,
                  int shared_bytes, void* stream, const Args& args) {
  launch_with_shared(op, kernel, blocks, threads, shared_bytes + kAlignment, stream, args);
}

// Clusters of `size` blocks, as many as run at the same time, `most` at most: they share the work.
template <class Args>
void launch_clusters(const char* op, void (*kernel)(Args), int64_t most, int size, int threads,
                     int shared_bytes, void* stream, const Args& args) {
  constexpr int kPortable = 8;
  const void* address = reinterpret_cast<const void*>(kernel);
  const int bytes = shared_bytes + kAlignment;
  check_cuda(cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), op);
  if (size > kPortable) {
    check_cuda(cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               op);
  }
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {unsigned(size), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(size);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster, config.numAttrs = 1;
  int at_once = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&at_once, kernel, &config), op);
  if (at_once == 0) throw std::runtime_error(std::string(op) + ": this GPU has no such clusters");
  config.gridDim = dim3(size * unsigned(most < at_once ? most : at_once));
  check_cuda(cudaLaunchKernelEx(&config, kernel, args), op);
}

}  // namespace kexue::hopper

#endif
