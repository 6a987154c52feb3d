// mla_decode on Hopper GPUs, as the bindings see it. Strides are in elements; every pointer is of
// the current device; nothing waits for the device. Errors of CUDA are std::runtime_error.
#pragma once

#include "mla/mla_decode_cut.h"

namespace kexue::mla {

struct DecodeCall {
  DecodeSizes sizes;
  DType dtype;     // bf16 or f16
  const void* q;   // [B, Tq, H, 576]: rows contiguous, 16-byte aligned
  int64_t stride_qb, stride_qt, stride_qh;
  const void* pages;  // [num_blocks, block_size, 576]: likewise
  int64_t stride_block, stride_row;
  const int32_t* table;    // [B, max_blocks]
  const int32_t* seqlens;  // [B]
  void* out;               // [B, Tq, H, 512]
  float* lse;              // [B, H, Tq]
  float* parts;            // [splits, B, Tq, H, 512]; null where there is one split
  float* part_lse;         // [splits, B, H, Tq]
  double softmax_scale;
};

void mla_decode_cuda(const DecodeCall&, void* stream);

}  // namespace kexue::mla
