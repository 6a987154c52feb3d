#include "scan/selective_scan_cuda.h"
#include "scan/selective_scan_dispatch.cuh"

namespace kexue::selective {
namespace {

template <DType T, class S>
void launch_reverse(ReverseArgs& args, void* stream) {
  Inputs& in = args.in;
  const int64_t tiles = cut_channels(in, kForwardChannels);
  set_wide<T, S>(in, args.grad_out, nullptr);
  each_states<S>(in, [&](bool) {
    launch("selective_scan_backward", selective_scan_reverse_kernel<T, S>,
           tiles * in.cut.slots, kForwardThreads, stream, args);
  });
}

}  // namespace

void reverse_cuda(ReverseArgs args, DType dtype, bool complex, void* stream) {
  dispatch_type(dtype, [&]<DType T>() {
    if (complex) launch_reverse<T, Complex>(args, stream);
    else launch_reverse<T, float>(args, stream);
  });
}

}  // namespace kexue::selective
