// What a block-diagonal factor is computed with, one copy per instruction set.
#pragma once

#include "build_config.h"
#include "monarch/factor.h"

namespace kexue::monarch {

// A part of a block of weights as floats: [outs, ins], contiguous (both twice for complex).
struct Unpack {
  DType dtype;
  const void* data;  // its first item
  int64_t outs, ins;
  int64_t out, in;  // strides in items
  bool conjugate;
};

// The gradient of a block of weights [outs, ins] from that of its floats, whose rows are
// `row` apart.
struct Pack {
  DType dtype;
  int64_t outs, ins;
  const float* from;
  int64_t row;
  void* to;  // contiguous
};

}  // namespace kexue::monarch

namespace kexue {

#define KEXUE_MONARCH(isa, unused)                                          \
  namespace isa {                                                           \
  int64_t monarch_register(); /* floats */                                  \
  void monarch_rows_to_lines(const monarch::Transfer&);                     \
  void monarch_lines_to_rows(const monarch::Transfer&);                     \
  void monarch_product(const monarch::Product&);                            \
  void monarch_outer_sum(const monarch::OuterSum&, const monarch::SumsAt&); \
  void monarch_unpack_weights(const monarch::Unpack&, float* to);           \
  void monarch_pack_gradient(const monarch::Pack&);                         \
  }
KEXUE_ISAS(KEXUE_MONARCH, )
#undef KEXUE_MONARCH

}  // namespace kexue
