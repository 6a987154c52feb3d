// The projections read every weight once, which is what a step's time goes to.
#include "scan/mamba_step_cpu.h"

#include "common/exp.h"

namespace kexue::KEXUE_ISA {
namespace {

constexpr int N = 2 * kWidth;  // two sums side by side hide the latency of an addition

float total(Floats<N> x) {
  float sums[N];
  store<N>(sums, x);
  for (int width = N / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

// y [rows] = weight [rows, columns] x
template <int rows, class Item>
KEXUE_INLINE void products(const Item* weight, int64_t columns, const float* x, float* y) {
  Floats<N> sums[rows] = {};
  int64_t k = 0;
  for (; k + N <= columns; k += N) {
    const auto x_k = load<N>(x + k);
    for (int r = 0; r < rows; ++r) sums[r] = sums[r] + load<N>(weight + r * columns + k) * x_k;
  }
  for (int r = 0; r < rows; ++r) y[r] = total(sums[r]);
  for (; k < columns; ++k) {
    for (int r = 0; r < rows; ++r) y[r] += load<1>(weight + r * columns + k) * x[k];
  }
}

struct Rows {
  int64_t begin, end;
};

struct Vectors {
  const float* data;  // [batch, width], `step` apart
  int64_t batch, width, step;
};

// Some rows of a layer for every x, to y [batch, stride], where row `first` comes first. The
// weights of a block stay in the cache from one x to the next.
template <class Item, class Out>
void project(const Layer& layer, const Vectors& x, Rows rows, Out* y, int64_t stride,
             int64_t first = 0) {
  constexpr int kRows = 4;
  const auto* weight = static_cast<const Item*>(layer.weight);
  const auto* bias = static_cast<const Item*>(layer.bias);
  for (int64_t row = rows.begin; row < rows.end;) {
    const int count = rows.end - row < kRows ? 1 : kRows;
    for (int64_t b = 0; b < x.batch; ++b) {
      const float* x_b = x.data + b * x.step;
      float found[kRows];
      if (count == kRows) {
        products<kRows>(weight + row * x.width, x.width, x_b, found);
      } else {
        products<1>(weight + row * x.width, x.width, x_b, found);
      }
      for (int r = 0; r < count; ++r) {
        if (bias) found[r] += load<1>(bias + row + r);
        store<1>(y + b * stride + row - first + r, found[r]);
      }
    }
    row += count;
  }
}

// The newest inputs, u, become their convolution, and the window's last.
template <class Item>
void convolve(const MambaStep& call, int64_t b, int64_t begin, int64_t end, float* u) {
  const Strided& window = call.window;
  const int64_t behind = call.taps_count - 1, step = window.step;
  for (int64_t c = begin; c < end; ++c) {
    Item* kept = static_cast<Item*>(window.data) + b * window.batch + c * window.channel;
    const float* taps = call.taps + c;
    float y = (call.conv_bias ? call.conv_bias[c] : 0.0f) + taps[behind * call.d] * u[c];
    for (int64_t k = 0; k < behind; ++k) {
      y += taps[k * call.d] * load<1>(kept + (call.kept - behind + k) * step);
    }
    for (int64_t k = 1; k < call.kept; ++k) kept[(k - 1) * step] = kept[k * step];
    if (call.kept) store<1>(kept + (call.kept - 1) * step, u[c]);
    u[c] = y;
  }
}

template <int M>
KEXUE_INLINE void silu(float* x) {
  const auto value = load<M>(x);
  store<M>(x, value * sigmoid<M>(value));
}

}  // namespace

void mamba_step_enter(const MambaStep& call, const MambaStepRoom& room, int64_t begin,
                      int64_t end) {
  const int64_t d = call.d;
  const Vectors x{call.x, call.batch, call.dim, call.dim};
  with_real(call.dtype, [&](auto item) {
    using Item = decltype(item);
    project<Item>(call.in_proj, x, {begin, end}, room.u, d);
    project<Item>(call.in_proj, x, {d + begin, d + end}, room.z, d, d);
    for (int64_t b = 0; b < call.batch; ++b) {
      convolve<Item>(call, b, begin, end, room.u + b * call.d);
    }
  });
  for (int64_t b = 0; b < call.batch; ++b) {
    float* u = room.u + b * call.d;
    int64_t c = begin;
    for (; c + N <= end; c += N) silu<N>(u + c);
    for (; c < end; ++c) silu<1>(u + c);
  }
}

void mamba_step_select(const MambaStep& call, const MambaStepRoom& room, int64_t begin,
                       int64_t end) {
  const int64_t width = call.rank + 2 * call.n;
  const Vectors u{room.u, call.batch, call.d, call.d};
  with_real(call.dtype, [&](auto item) {
    project<decltype(item)>(call.x_proj, u, {begin, end}, room.selected, width);
  });
}

void mamba_step_update(const MambaStep& call, const MambaStepRoom& room, int64_t begin,
                       int64_t end) {
  const Vectors dt{room.selected, call.batch, call.rank, call.rank + 2 * call.n};
  with_real(call.dtype, [&](auto item) {
    project<decltype(item)>(call.dt_proj, dt, {begin, end}, room.dt, call.d);
  });
  for (int64_t b = 0; b < call.batch; ++b) {
    selective_state_update(call.update, b * call.d + begin, b * call.d + end);
  }
}

void mamba_step_leave(const MambaStep& call, const MambaStepRoom& room, int64_t begin,
                      int64_t end) {
  const Vectors y{room.y, call.batch, call.d, call.d};
  with_real(call.dtype, [&](auto item) {
    using Item = decltype(item);
    project<Item>(call.out_proj, y, {begin, end}, static_cast<Item*>(call.out), call.dim);
  });
}

}  // namespace kexue::KEXUE_ISA
