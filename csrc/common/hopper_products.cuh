// Hopper's matrix instructions, wgmma: a warp group (four warps, 128 threads) multiplies [64, 16]
// by [16, N] and adds to a [64, N] float32 accumulator in its registers. They run on by themselves:
// an accumulator may not be touched between an instruction and the wait for its group.
#pragma once

#include "common/types.h"
#include "scan/gpu.cuh"

namespace kexue::hopper {

// Registers written before are seen by the matrix instructions after.
KEXUE_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
KEXUE_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All that were committed are done, as far as this warp is concerned.
KEXUE_DEVICE void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// Keeps the compiler from moving uses of an accumulator across this point.
template <int N>
KEXUE_DEVICE void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define KEXUE_NAMES_16 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define KEXUE_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KEXUE_NAMES_128 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define KEXUE_HOLD_4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define KEXUE_HOLD_8(x, i)                                                             \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]),          \
      "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define KEXUE_HOLD_16(x) KEXUE_HOLD_8(x, 0), KEXUE_HOLD_8(x, 8)
#define KEXUE_HOLD_32(x, i) \
  KEXUE_HOLD_8(x, i), KEXUE_HOLD_8(x, i + 8), KEXUE_HOLD_8(x, i + 16), KEXUE_HOLD_8(x, i + 24)
#define KEXUE_HOLD_128(x) \
  KEXUE_HOLD_32(x, 0), KEXUE_HOLD_32(x, 32), KEXUE_HOLD_32(x, 64), KEXUE_HOLD_32(x, 96)

// After the operands: the accumulator counts (1, or a predicate), neither operand is negated, and
// which are transposed, that is, not K-major.
#define KEXUE_PRODUCTS(TYPE)                                                                     \
  static KEXUE_DEVICE void multiply(float (&d)[16], uint64_t a, uint64_t b, int add) {           \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"                                \
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPE "." TYPE                     \
                 " {" KEXUE_NAMES_16 "}, %16, %17, add, 1, 1, 0, 0;\n}"                          \
                 : KEXUE_HOLD_16(d)                                                              \
                 : "l"(a), "l"(b), "r"(add)                                                      \
                 : "memory");                                                                    \
  }                                                                                              \
  static KEXUE_DEVICE void multiply(float (&d)[20], uint64_t a, uint64_t b, int add) {           \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %22, 0;\n"                                \
                 "wgmma.mma_async.sync.aligned.m64n40k16.f32." TYPE "." TYPE                     \
                 " {" KEXUE_NAMES_16 ", %16, %17, %18, %19}, %20, %21, add, 1, 1, 0, 0;\n}"      \
                 : KEXUE_HOLD_16(d), KEXUE_HOLD_4(d, 16)                                         \
                 : "l"(a), "l"(b), "r"(add)                                                      \
                 : "memory");                                                                    \
  }                                                                                              \
  static KEXUE_DEVICE void scores(float (&d)[32], uint64_t a, uint64_t b, int add) {             \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                                \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE                     \
                 " {" KEXUE_NAMES_32 "}, %32, %33, add, 1, 1, 0, 0;\n}"                          \
                 : KEXUE_HOLD_32(d, 0)                                                           \
                 : "l"(a), "l"(b), "r"(add)                                                      \
                 : "memory");                                                                    \
  }                                                                                              \
  static KEXUE_DEVICE void values(float (&d)[128], const uint32_t (&a)[4], uint64_t b) {         \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                    \
                 " {" KEXUE_NAMES_128 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"           \
                 : KEXUE_HOLD_128(d)                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)                            \
                 : "memory");                                                                    \
  }                                                                                              \
  static KEXUE_DEVICE void values(float (&d)[128], uint64_t a, uint64_t b) {                     \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                    \
                 " {" KEXUE_NAMES_128 "}, %128, %129, 1, 1, 1, 0, 1;"                            \
                 : KEXUE_HOLD_128(d)                                                             \
                 : "l"(a), "l"(b)                                                                \
                 : "memory");                                                                    \
  }

// multiply: d (+)= a b^T, a [64, 16] and b [32 or 40, 16] by descriptor. scores: the same, b
// [64, 16].
// values: d += a b, a [64, 16] in registers or by descriptor, b [16, 256] with its columns side by
// side.
template <DType>
struct Products;
template <>
struct Products<DType::bf16> {
  KEXUE_PRODUCTS("bf16")
};
template <>
struct Products<DType::f16> {
  KEXUE_PRODUCTS("f16")
};

#undef KEXUE_PRODUCTS
#undef KEXUE_HOLD_128
#undef KEXUE_HOLD_32
#undef KEXUE_HOLD_16
#undef KEXUE_HOLD_8
#undef KEXUE_HOLD_4
#undef KEXUE_NAMES_128
#undef KEXUE_NAMES_32
#undef KEXUE_NAMES_16

}  // namespace kexue::hopper
