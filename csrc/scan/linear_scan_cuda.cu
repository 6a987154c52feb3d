#include "scan/linear_scan_cuda.h"

#include <stdexcept>

#include "scan/linear_scan_kernel.cuh"

namespace kexue {
namespace {

constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
constexpr int64_t align(int64_t bytes) { return ceil_div(bytes, sizeof(Pack)) * sizeof(Pack); }

template <class F>
auto dispatch(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f.template operator()<DType::f32>();
    case DType::bf16: return f.template operator()<DType::bf16>();
    case DType::f16: return f.template operator()<DType::f16>();
    case DType::c64: return f.template operator()<DType::c64>();
  }
  throw std::invalid_argument("linear_scan: unknown dtype");
}

template <DType T>
Tiling tiling_of(const LinearScanShape& shape, bool backward, int warps) {
  if (warps < 1 || warps > kMaxWarps) throw std::invalid_argument("linear_scan: warps not in 1..8");
  Tiling tiling = {};
  tiling.steps = int64_t(warps) * linear_scan_steps_per_warp(backward);
  tiling.channel_tiles = ceil_div(shape.D, kVectors * kChannels<T>);
  if (shape.cu_seqlens) {
    tiling.chunks = shape.L / tiling.steps + shape.sequences;  // see sequence_of_slot
    tiling.count = tiling.chunks * tiling.channel_tiles;
  } else {
    tiling.chunks = ceil_div(shape.L, tiling.steps);
    tiling.count = tiling.chunks * tiling.channel_tiles * shape.B;
  }
  return tiling;
}

// Divides the workspace; returns its size. The zeroed part, ticket and flags, comes first.
template <DType T>
int64_t place(const LinearScanShape& shape, Tiling& tiling, void* workspace, int64_t& zeroed) {
  zeroed = 0;
  if (shape.L <= tiling.steps) return 0;  // no sequence is longer: nothing to chain
  char* next = static_cast<char*>(workspace);
  tiling.chain.ticket = reinterpret_cast<uint64_t*>(next);
  next += sizeof(Pack);
  tiling.chain.flags = reinterpret_cast<uint32_t*>(next);
  zeroed = sizeof(Pack) + align(tiling.count * sizeof(uint32_t));
  next = static_cast<char*>(workspace) + zeroed;
  tiling.chain.records = next;
  return zeroed + tiling.count * kTileChannels<T> * int64_t(sizeof(AffineOf<T>));
}

template <DType T>
bool vectorizable(const Strided& x) {
  const auto fits = [](int64_t stride) { return stride % kChannels<T> == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(x.data) % sizeof(Pack) == 0;
  return x.channel == 0 || (x.channel == 1 && aligned && fits(x.batch) && fits(x.step));
}

template <DType T, class Args>
void run(const char* op, void (*vector_kernel)(Args), void (*scalar_kernel)(Args), bool vector,
         Args& args, int warps, void* workspace, void* stream) {
  int64_t zeroed;
  place<T>(args.call.shape, args.tiling, workspace, zeroed);
  if (zeroed) zero_async(op, workspace, zeroed, stream);
  launch(op, vector ? vector_kernel : scalar_kernel, args.tiling.count, warps * kWarp, stream,
         args);
}

}  // namespace

int linear_scan_steps_per_warp(bool backward) {
  return kGroupsPerWarp * (backward ? kBackwardSteps : kForwardSteps);
}

LinearScanCut linear_scan_cut(const LinearScanShape& shape, DType dtype, bool backward,
                              int warps) {
  return dispatch(dtype, [&]<DType T>() {
    Tiling tiling = tiling_of<T>(shape, backward, warps);
    int64_t zeroed;
    const int64_t workspace = place<T>(shape, tiling, nullptr, zeroed);
    return LinearScanCut{tiling.chunks, workspace};
  });
}

void linear_scan_forward_cuda(const LinearScanForward& call, DType dtype, int warps,
                              void* workspace, void* stream) {
  dispatch(dtype, [&]<DType T>() {
    ForwardArgs args = {call, tiling_of<T>(call.shape, false, warps)};
    const Strided h = {call.h, call.shape.D, call.shape.D, 1};
    const bool vector = vectorizable<T>(call.a) && vectorizable<T>(call.b) && vectorizable<T>(h);
    run<T>("linear_scan", linear_scan_forward_kernel<T, true>,
           linear_scan_forward_kernel<T, false>, vector, args, warps, workspace, stream);
  });
}

void linear_scan_backward_cuda(const LinearScanBackward& call, DType dtype, int warps,
                               bool partial, void* workspace, void* stream) {
  dispatch(dtype, [&]<DType T>() {
    BackwardArgs args = {call, tiling_of<T>(call.shape, true, warps), partial};
    const Strided grad_b = {call.grad_b, call.shape.D, call.shape.D, 1};
    const Strided grad_a = {partial ? nullptr : call.grad_a, call.shape.D, call.shape.D, 1};
    const bool vector = vectorizable<T>(call.a) && vectorizable<T>(call.grad_h) &&
                        vectorizable<T>(call.h) && vectorizable<T>(grad_b) &&
                        vectorizable<T>(grad_a);
    run<T>("linear_scan_backward", linear_scan_backward_kernel<T, true>,
           linear_scan_backward_kernel<T, false>, vector, args, warps, workspace, stream);
  });
}

}  // namespace kexue
