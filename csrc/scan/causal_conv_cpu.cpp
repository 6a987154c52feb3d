#include "scan/causal_conv_cpu.h"

#include "common/exp.h"

namespace kexue::KEXUE_ISA {
namespace {

constexpr int kWide = 2 * kWidth;

// Some channels of one step. inputs + (k - first) * step is tap k's; those before it come from
// the window, where there is one.
struct Inputs {
  const void *window, *x;
  int64_t window_step, step, first;
};

template <int N, class Item>
KEXUE_INLINE void channels(const CausalConv& call, const Inputs& in, int64_t c, Item* y) {
  auto sum = call.bias ? load<N>(call.bias + c) : splat<N>(0.0f);
  const auto add_tap = [&](int64_t k, const Item* input) {
    sum = sum + load<N>(call.taps + k * call.d + c) * load<N>(input + c);
  };
  for (int64_t k = 0; in.window && k < in.first; ++k) {
    add_tap(k, static_cast<const Item*>(in.window) + k * in.window_step);
  }
  for (int64_t k = in.first; k < call.K; ++k) {
    add_tap(k, static_cast<const Item*>(in.x) + (k - in.first) * in.step);
  }
  if (call.silu) sum = sum * sigmoid<N>(sum);
  store<N>(y + c, sum);
}

template <class Item>
void steps(const CausalConv& call, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / call.L, t = row % call.L, behind = call.K - 1;
    const int64_t first = t < behind ? behind - t : 0;
    const auto* window = static_cast<const Item*>(call.window.data);
    const auto* x = static_cast<const Item*>(call.x.data) + b * call.x.batch;
    const Inputs in{window ? window + b * call.window.batch + t * call.window.step : nullptr,
                    x + (t - behind + first) * call.x.step, call.window.step, call.x.step, first};
    Item* y = static_cast<Item*>(call.y) + row * call.d;
    int64_t c = 0;
    for (; c + kWide <= call.d; c += kWide) channels<kWide>(call, in, c, y);
    for (; c < call.d; ++c) channels<1>(call, in, c, y);
  }
}

}  // namespace

void causal_conv(const CausalConv& call, int64_t begin, int64_t end) {
  with_real(call.dtype, [&](auto item) { steps<decltype(item)>(call, begin, end); });
}

}  // namespace kexue::KEXUE_ISA
