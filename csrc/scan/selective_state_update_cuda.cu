#include "scan/selective_state_update_cuda.h"

#include <stdexcept>

#include "scan/selective_scan_math.cuh"

namespace kexue::selective {
namespace {

constexpr int kUpdateThreads = 128;

// What is done in an element's own type; it is the same for all threads.
template <class F>
KEXUE_DEVICE auto in_type(DType dtype, F f) {
  if (dtype == DType::bf16) return f.template operator()<DType::bf16>();
  if (dtype == DType::f16) return f.template operator()<DType::f16>();
  return f.template operator()<DType::f32>();
}

KEXUE_DEVICE float load_element(DType dtype, const void* data, int64_t offset) {
  return in_type(dtype, [&]<DType T>() {
    return float_of<T>(static_cast<const StoredOf<T>*>(data)[offset]);
  });
}

KEXUE_DEVICE void store_element(DType dtype, void* data, int64_t offset, float x) {
  in_type(dtype, [&]<DType T>() { static_cast<StoredOf<T>*>(data)[offset] = stored<T>(x); });
}

KEXUE_DEVICE float parameter(const Array<2>& x, int64_t head, int64_t p) {
  if (!x.data) return 0.0f;
  return static_cast<const float*>(x.data)[head * x.stride[0] + p * x.stride[1]];
}

// Threads that share a channel, neighbours: some of a warp, so that each takes two states.
KEXUE_INLINE int lanes_of(int64_t n) {
  int lanes = 1;
  while (lanes < kWarp && 2 * lanes < n) lanes *= 2;
  return lanes;
}

// A block takes the channels of its threads, of one row and head.
__global__ void __launch_bounds__(kUpdateThreads)
    selective_state_update_kernel(const __grid_constant__ UpdateArgs args) {
  const int lanes = lanes_of(args.n), rows = kUpdateThreads / lanes;
  const int64_t blocks = (args.P + rows - 1) / rows;
  const int64_t p = block_index() % blocks * rows + thread_index() / lanes;
  const int64_t head = block_index() / blocks % args.heads;
  const int64_t row = block_index() / blocks / args.heads;
  if (row >= args.batch) return;
  const auto load = [&](const Array<3>& a) {
    return load_element(args.dtype, a.data,
                        row * a.stride[0] + head * a.stride[1] + p * a.stride[2]);
  };
  const int64_t index = args.indices ? args.indices[row] : row;
  const bool here = p < args.P && index >= 0 && index < args.states;
  float x = 0.0f, y = 0.0f;
  if (here) {
    x = load(args.x);
    float dt = load(args.dt) + parameter(args.bias, head, p);
    if (args.softplus) dt = softplus(dt);
    const int64_t group = head / (args.heads / args.groups);
    const int64_t* s = args.state.stride;
    const int64_t state = index * s[0] + head * s[1] + p * s[2];
    const float* A =
        static_cast<const float*>(args.A.data) + head * args.A.stride[0] + p * args.A.stride[1];
    const int64_t B = row * args.B.stride[0] + group * args.B.stride[1];
    const int64_t C = row * args.C.stride[0] + group * args.C.stride[1];
#pragma unroll 2
    for (int64_t j = thread_index() % lanes; j < args.n; j += lanes) {
      const float before = load_element(args.state_dtype, args.state.data, state + j * s[3]);
      const float input = load_element(args.dtype, args.B.data, B + j * args.B.stride[2]);
      const float output = load_element(args.dtype, args.C.data, C + j * args.C.stride[2]);
      const float a = exp2_approx(dt * A[j * args.A.stride[2]] * kLog2e);
      const float after = fused(a, before, dt * x * input);
      y = fused(output, after, y);
      store_element(args.state_dtype, args.state.data, state + j * s[3], after);
    }
  }
  for (int half = lanes / 2; half > 0; half /= 2) y += shuffle_xor(y, half);
  if (p >= args.P || thread_index() % lanes != 0) return;
  if (here) {
    y = fused(parameter(args.D, head, p), x, y);
    if (args.z.data) y *= silu(load(args.z));
  }
  store_element(args.dtype, args.out, (row * args.heads + head) * args.P + p, y);
}

bool known(DType dtype) {
  return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16;
}

}  // namespace

void update_cuda(const UpdateArgs& args, void* stream) {
  if (!known(args.dtype) || !known(args.state_dtype)) {
    throw std::invalid_argument("selective_state_update: unknown dtype");
  }
  const int64_t rows = kUpdateThreads / lanes_of(args.n), blocks = (args.P + rows - 1) / rows;
  launch("selective_state_update", selective_state_update_kernel,
         args.batch * args.heads * blocks, kUpdateThreads, stream, args);
}

}  // namespace kexue::selective
