#include "mla/mla_decode_cuda.h"

#include <stdexcept>

#include "mla/mla_decode_hopper.cuh"
#include "mla/mla_decode_join.cuh"

namespace kexue::mla {
namespace {

hopper::TensorMap page_map(const DecodeCall& call) {
  const DecodeSizes& sizes = call.sizes;
  const uint64_t size[3] = {kWidth, uint64_t(sizes.block_size), uint64_t(sizes.num_blocks)};
  const uint64_t stride[2] = {uint64_t(call.stride_row) * 2, uint64_t(call.stride_block) * 2};
  return hopper::tensor_map("mla_decode", call.pages, call.dtype, size, stride,
                            piece_rows(sizes.block_size), kTileChannels);
}

template <DType T>
void run(const DecodeCall& call, void* stream) {
  constexpr double kLog2e = 1.4426950408889634;
  const DecodeSizes& sizes = call.sizes;
  const bool split = sizes.splits > 1;
  const DecodeArgs args = {page_map(call),
                           sizes,
                           call.q,
                           call.stride_qb,
                           call.stride_qt,
                           call.stride_qh,
                           call.table,
                           call.seqlens,
                           split ? call.parts : call.out,
                           split ? call.part_lse : call.lse,
                           float(call.softmax_scale * kLog2e)};
  const int64_t blocks = int64_t(sizes.B) * sizes.splits * query_tiles(sizes);
  hopper::launch_large("mla_decode", mla_decode_hopper_kernel<T>, blocks, kDecodeThreads,
                       sizeof(DecodeShared), stream, args);
  if (split) {
    const JoinArgs join = {call.parts, call.part_lse, call.out, call.lse, sizes};
    launch("mla_decode", mla_decode_join_kernel<T>, int64_t(sizes.B) * sizes.Tq * sizes.H,
           kJoinThreads, stream, join);
  }
}

}  // namespace

void mla_decode_cuda(const DecodeCall& call, void* stream) {
  switch (call.dtype) {
    case DType::bf16: return run<DType::bf16>(call, stream);
    case DType::f16: return run<DType::f16>(call, stream);
    default: throw std::invalid_argument("mla_decode: the Hopper path serves bf16 and f16");
  }
}

}  // namespace kexue::mla
