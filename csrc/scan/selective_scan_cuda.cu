#include "scan/selective_scan_cuda.h"

#include "scan/selective_scan_dispatch.cuh"

namespace kexue::selective {
namespace {

template <DType T, class S, bool PER_STEP>
void launch_forward(ForwardArgs& args, void* stream) {
  const int64_t tiles = cut_channels(args.in, kForwardChannels);
  set_wide<T, S>(args.in, {}, args.out);
  each_states<S>(args.in, [&](bool last) {
    args.finish = last;
    launch("selective_scan", selective_scan_forward_kernel<T, S, PER_STEP>,
           tiles * args.in.cut.rows, kForwardThreads, stream, args);
  });
}

template <class S>
void launch_chain(const ChainArgs& args, void* stream) {
  const int64_t count = args.in.sequences * args.in.n * args.in.d;
  launch("selective_scan", selective_scan_chain_kernel<S>, ceil_div(count, kChainThreads),
         kChainThreads, stream, args);
}

}  // namespace

Limits limits(bool complex) {
  return {kForwardChannels, kBackwardChannels, complex ? kPadded<Complex> : kPadded<float>};
}

void forward_cuda(ForwardArgs args, DType dtype, bool complex, void* stream) {
  dispatch_type(dtype, [&]<DType T>() {
    const bool per_step = args.in.B.channels && args.in.C.channels;
    if (complex) launch_forward<T, Complex, false>(args, stream);
    else if (per_step) launch_forward<T, float, true>(args, stream);
    else launch_forward<T, float, false>(args, stream);
  });
}

void chain_cuda(ChainArgs args, bool complex, void* stream) {
  complex ? launch_chain<Complex>(args, stream) : launch_chain<float>(args, stream);
}

}  // namespace kexue::selective
