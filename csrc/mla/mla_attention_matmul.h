// Products of float matrices: keys and values from latents, and gradients back through them.
#pragma once

#include <cstdint>

namespace kexue {

// c[n] = factor a[n] b[n], a [rows, depth], b [depth, columns]; `add`: to what c has. Strides in
// floats; neighbours in a row of c lie side by side.
struct MlaMatmul {
  int64_t count, rows, columns, depth;
  float factor;
  bool add;
  struct A {
    const float* data;
    int64_t matrix, row, term;
  } a;
  struct B {
    const float* data;
    int64_t matrix, term, column;
  } b;
  struct C {
    float* data;
    int64_t matrix, row;
  } c;
};

struct MlaMatmulPart {
  int64_t matrix, row, rows, column, columns;
};

// No result depends on the number of threads.
void mla_matmul_on_threads(const MlaMatmul& call, int threads);

}  // namespace kexue
