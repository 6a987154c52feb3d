#include "mla/mla_attention_matmul_cpu.h"

#include "common/reading.h"
#include "mla/mla_product.h"

namespace kexue::KEXUE_ISA {
namespace {

// Not a power of two, which would make rows compete for places in the caches.
constexpr int64_t kRowB = kMlaMatmulColumns + 16, kRowA = kMlaMatmulRows + 16;
constexpr int64_t kDepth = 256;  // terms that are packed at once
constexpr int64_t kStrip = 32;  // terms that are moved at once where they lie side by side

constexpr int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }

// terms [0, depth) of b's columns as to [depth][kRowB], zeros up to whole tiles
void pack_b(const MlaMatmul& call, const float* b, int64_t depth, int64_t columns, float* to) {
  const int64_t end = (columns + kColumns - 1) / kColumns * kColumns;
  if (call.b.column == 1) {
    for (int64_t i = 0; i < depth; ++i) {
      const float* row = b + i * call.b.term;
      for (int64_t j = 0; j < columns; ++j) to[i * kRowB + j] = row[j] * call.factor;
    }
  } else {
    for (int64_t from = 0; from < depth; from += kStrip) {
      const int64_t n = min(kStrip, depth - from);
      for (int64_t j = 0; j < columns; ++j) {
        const float* column = b + j * call.b.column + from * call.b.term;
        float* at = to + from * kRowB + j;
        for (int64_t i = 0; i < n; ++i) at[i * kRowB] = column[i * call.b.term] * call.factor;
      }
    }
  }
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t j = columns; j < end; ++j) to[i * kRowB + j] = 0;
  }
}

// terms [0, depth) of a's rows as to [depth][kRowA]
void pack_a(const MlaMatmul& call, const float* a, int64_t depth, int64_t rows, float* to) {
  for (int64_t i = 0; i < depth; ++i) {
    const float* from = Row<float>{a + i * call.a.term, call.a.row}.read(0, rows, to);
    if (from != to) {
      for (int64_t r = 0; r < rows; ++r) to[r] = from[r];
    }
    to += kRowA;
  }
}

}  // namespace

int64_t mla_matmul_space() { return kDepth * (kRowB + kRowA); }

void mla_matmul_part(const MlaMatmul& call, const MlaMatmulPart& part, float* space) {
  float *const b = space, *const packed = space + kDepth * kRowB;
  for (int64_t from = 0; from < call.depth; from += kDepth) {
    const int64_t depth = min(kDepth, call.depth - from);
    pack_b(call,
           call.b.data + part.matrix * call.b.matrix + part.column * call.b.column +
               from * call.b.term,
           depth, part.columns, b);
    for (int64_t r = part.row; r < part.row + part.rows; r += kMlaMatmulRows) {
      const int64_t rows = min(kMlaMatmulRows, part.row + part.rows - r);
      const float* a =
          call.a.data + part.matrix * call.a.matrix + r * call.a.row + from * call.a.term;
      float* c = call.c.data + part.matrix * call.c.matrix + r * call.c.row + part.column;
      SmallProduct product{a, call.a.row, 1,    b,            kRowB, c, call.c.row,
                           rows, part.columns, depth};
      if (call.a.term != 1) {
        pack_a(call, a, depth, rows, packed);
        product.a = packed;
        product.a_row = 1;
        product.a_term = kRowA;
      }
      multiply(product, call.add || from > 0);
    }
  }
}

}  // namespace kexue::KEXUE_ISA
