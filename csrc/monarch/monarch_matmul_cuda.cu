#include "monarch/monarch_matmul_cuda.h"

#include <stdexcept>

#include "monarch/monarch_matmul_resident.cuh"
#include "monarch/monarch_matmul_streamed.cuh"

namespace kexue::monarch {
namespace {

constexpr char kOp[] = "monarch_matmul";

hopper::TensorMap row_map(const ClusterCall& call, int rows) {  // of a box
  const ClusterSizes& sizes = call.sizes;
  const uint64_t width = uint64_t(sizes.k) * sizes.p, N = sizes.N;
  const uint64_t stride = (N > 1 ? uint64_t(call.stride) : width) * 2;
  return hopper::tensor_map(kOp, call.x, call.dtype, {width, N, 1}, {stride, N * stride}, rows,
                            kTileChannels);
}

hopper::TensorMap factor_map(const void* w, DType dtype, int blocks, int outputs, int inputs) {
  const uint64_t size[3] = {uint64_t(inputs), uint64_t(outputs), uint64_t(blocks)};
  const uint64_t stride[2] = {size[0] * 2, size[0] * size[1] * 2};
  return hopper::tensor_map(kOp, w, dtype, size, stride, kTileRows, kTileChannels);
}

template <class Args>
void launch(void (*kernel)(Args), int tiles, int64_t shared, const ClusterCall& call, void* stream,
            const Args& args) {
  hopper::launch_clusters(kOp, kernel, tiles, call.sizes.blocks, kClusterThreads, int(shared),
                          stream, args);
}

template <DType T>
void run(const ClusterCall& call, void* stream) {
  const ClusterSizes& sizes = call.sizes;
  const bool stays = can_stay(sizes);
  const auto [N, k, q, p, l, s, r, blocks] = sizes;
  const int rows = stays ? kResidentRows : kWalkers * kStreamRows;
  const ClusterArgs args = {row_map(call, rows), sizes, call.w1, call.w2, call.bias, call.y};
  if (stays) {
    const auto kernel = p == kTileChannels / 2
                            ? resident::monarch_matmul_resident_hopper_kernel<T, 2>
                            : resident::monarch_matmul_resident_hopper_kernel<T, 1>;
    launch(kernel, sizes.tiles(kWalkers * rows), resident_bytes(sizes), call, stream, args);
  } else {
    const streamed::StreamArgs stream_args = {args, factor_map(call.w1, T, k, q, p),
                                              factor_map(call.w2, T, l, s, r)};
    launch(streamed::monarch_matmul_streamed_hopper_kernel<T>, sizes.tiles(rows),
           streamed_bytes(sizes), call, stream, stream_args);
  }
}

}  // namespace

void monarch_matmul_cuda(const ClusterCall& call, void* stream) {
  if (!can_stay(call.sizes) && !can_stream(call.sizes)) {
    throw std::invalid_argument("monarch_matmul: the cluster kernels don't serve these sizes");
  }
  switch (call.dtype) {
    case DType::bf16: return run<DType::bf16>(call, stream);
    case DType::f16: return run<DType::f16>(call, stream);
    default: throw std::invalid_argument("monarch_matmul: the Hopper path serves bf16 and f16");
  }
}

}  // namespace kexue::monarch
