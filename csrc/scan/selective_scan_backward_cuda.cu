#include "scan/selective_scan_cuda.h"
#include "scan/selective_scan_dispatch.cuh"

namespace kexue::selective {
namespace {

constexpr const char* kName = "selective_scan_backward";

template <DType T, class S, bool PER_STEP>
void launch_backward(BackwardArgs& args, void* stream) {
  Inputs& in = args.in;
  args.tiles = cut_channels(in, kBackwardChannels);
  set_wide<T, S>(in, args.grad_out, args.u);
  for (void* out : {args.delta, args.z}) {
    in.wide_out = in.wide_out && is_wide<T>(in, {out, 0, in.d, 1});
  }
  args.finish = take_states<S>(in);
  launch_with_shared(kName, selective_scan_backward_kernel<T, S, PER_STEP>,
                     args.tiles * in.cut.rows, kBackwardThreads, sizeof(BackwardShared<S>),
                     stream, args);
}

}  // namespace

void backward_cuda(BackwardArgs args, DType dtype, bool complex, void* stream) {
  dispatch_type(dtype, [&]<DType T>() {
    const bool per_step = args.in.B.channels && args.in.C.channels;
    if (complex) launch_backward<T, Complex, false>(args, stream);
    else if (per_step) launch_backward<T, float, true>(args, stream);
    else launch_backward<T, float, false>(args, stream);
  });
}

}  // namespace kexue::selective
