// Rows of states are updated along n, a register at a time; what belongs to a row as a whole
// (dt, x, the gate) is prepared and finished for a few rows at once.
#include "scan/selective_state_update_cpu.h"

#include <cstring>
#include <new>

#include "common/exp.h"

namespace kexue::KEXUE_ISA {
namespace {

constexpr int N = kWidth;
constexpr int kRows = 16;  // at once

constexpr int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

// Elements of any stride, the rest zeros.
template <class Item>
KEXUE_INLINE Floats<N> gather(const Item* from, int64_t stride, int64_t count) {
  float x[N] = {};
  for (int64_t i = 0; i < count; ++i) x[i] = load<1>(from + i * stride);
  return load<N>(x);
}
template <class Item>
KEXUE_INLINE void scatter(Floats<N> x, int64_t stride, int64_t count, Item* to) {
  Item items[N];
  store<N>(items, x);
  for (int64_t i = 0; i < count; ++i) to[i * stride] = items[i];
}

// Some elements along one axis of an array of `dtype`, as floats.
void read(const void* data, int64_t at, int64_t stride, int64_t count, DType dtype, float* to) {
  with_real(dtype, [&](auto item) {
    const auto* from = static_cast<const decltype(item)*>(data) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = load<1>(from + i * stride);
  });
}

float total(Floats<N> x) {
  float sums[N];
  store<N>(sums, x);
  for (int width = N / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

class Weights {  // B and C of one batch row and group: [n, up to whole registers]
 public:
  explicit Weights(const StateUpdate& call)
      : call_(call),
        room_((call.n + N - 1) / N * N),
        values_(static_cast<float*>(::operator new(2 * room_ * sizeof(float)))) {
    std::memset(values_, 0, 2 * room_ * sizeof(float));
  }
  ~Weights() { ::operator delete(values_); }
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  void read_for(int64_t b, int64_t group) {
    if (b == b_ && group == group_) return;
    b_ = b;
    group_ = group;
    read_one(call_.B, values_);
    read_one(call_.C, values_ + room_);
  }
  const float* B() const { return values_; }
  const float* C() const { return values_ + room_; }

 private:
  void read_one(const StateUpdateArray& x, float* to) const {
    read(x.data, b_ * x.strides[0] + group_ * x.strides[1], x.strides[2], call_.n, call_.dtype, to);
  }

  const StateUpdate& call_;
  int64_t room_, b_ = -1, group_ = -1;
  float* values_;
};

// Rows (b, h, p .. p + count) of one batch row and head.
struct Rows {
  int64_t b, h, p, count;
};

struct RowValues {
  alignas(64) float x[kRows] = {}, dt[kRows] = {}, D[kRows] = {}, z[kRows] = {}, bias[kRows] = {},
      y[kRows] = {}, decay[kRows] = {};

  RowValues(const StateUpdate& call, const Rows& rows) {
    const auto data = [&](const StateUpdateArray& a, float* to) {
      const int64_t at = rows.b * a.strides[0] + rows.h * a.strides[1] + rows.p * a.strides[2];
      if (a.data) read(a.data, at, a.strides[2], rows.count, call.dtype, to);
    };
    const auto parameter = [&](const StateUpdateArray& a, float* to) {
      const int64_t at = rows.h * a.strides[0] + rows.p * a.strides[1];
      if (a.data) read(a.data, at, a.strides[1], rows.count, DType::f32, to);
    };
    data(call.x, x);
    data(call.dt, dt);
    data(call.z, z);
    parameter(call.D, D);
    parameter(call.dt_bias, bias);
    for (int i = 0; i < kRows; i += N) {
      auto step = load<N>(dt + i) + load<N>(bias + i);
      if (call.softplus) step = softplus<N>(step);
      store<N>(dt + i, step);
    }
  }

  void finish(const StateUpdate& call) {
    for (int i = 0; i < kRows; i += N) {
      auto out = load<N>(y + i) + load<N>(D + i) * load<N>(x + i);
      if (call.z.data) out = out * (load<N>(z + i) * sigmoid<N>(load<N>(z + i)));
      store<N>(y + i, out);
    }
  }
};

// One row: the new states, and the sum of C times them. `decay`, where it is one for all of n.
template <bool tied, class State>
KEXUE_INLINE float update_row(State* state, int64_t state_stride, const float* A, int64_t A_stride,
                              const Weights& weights, int64_t n, float dt, float dtx,
                              float decay) {
  const auto rate = splat<N>(dt * kLog2E), input = splat<N>(dtx), same = splat<N>(decay);
  Floats<N> y{};
  const auto advance = [&](Floats<N> s, Floats<N> A_k, int64_t k) {
    const auto a = tied ? same : exp2<N>(rate * A_k);
    s = s * a + input * load<N>(weights.B() + k);
    y = y + load<N>(weights.C() + k) * s;
    return s;
  };
  int64_t k = 0;
  if (state_stride == 1 && (tied || A_stride == 1)) {
    for (; k + N <= n; k += N) {
      const auto A_k = tied ? same : load<N>(A + k);
      store<N>(state + k, advance(load<N>(state + k), A_k, k));
    }
  }
  for (; k < n; k += N) {
    const int64_t count = least(N, n - k);
    State* at = state + k * state_stride;
    const auto A_k = tied ? same : gather(A + k * A_stride, A_stride, count);
    scatter(advance(gather(at, state_stride, count), A_k, k), state_stride, count, at);
  }
  return total(y);
}

template <bool tied, class State>
void update_rows(const StateUpdate& call, const Rows& rows, const Weights& weights,
                 RowValues& values) {
  const int64_t* stride = call.state.strides;
  const int64_t index = call.indices ? call.indices[rows.b] : rows.b;
  State* state = static_cast<State*>(call.state.data) + index * stride[0] + rows.h * stride[1] +
                 rows.p * stride[2];
  const float* A = static_cast<const float*>(call.A.data) + rows.h * call.A.strides[0] +
                   rows.p * call.A.strides[1];
  if (tied) {
    for (int i = 0; i < kRows; i += N) {
      store<N>(values.decay + i, exp2<N>(load<N>(values.dt + i) * splat<N>(*A * kLog2E)));
    }
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    values.y[r] = update_row<tied>(state + r * stride[2], stride[3], A + r * call.A.strides[1],
                                   call.A.strides[2], weights, call.n, values.dt[r],
                                   values.dt[r] * values.x[r], values.decay[r]);
  }
}

void write(const StateUpdate& call, const Rows& rows, const float* y) {
  with_real(call.dtype, [&](auto item) {
    using Item = decltype(item);
    Item* to = static_cast<Item*>(call.out) + (rows.b * call.H + rows.h) * call.P + rows.p;
    for (int64_t r = 0; r < rows.count; ++r) store<1>(to + r, y[r]);
  });
}

}  // namespace

void selective_state_update(const StateUpdate& call, int64_t begin, int64_t end) {
  Weights weights(call);
  const bool tied = call.A.strides[1] == 0 && call.A.strides[2] == 0;
  for (int64_t row = begin; row < end;) {
    const int64_t p = row % call.P, h = row / call.P % call.H, b = row / call.P / call.H;
    const Rows rows{b, h, p, least(least(end - row, call.P - p), kRows)};
    row += rows.count;
    if (call.indices && call.indices[b] < 0) {
      const float zeros[kRows] = {};
      write(call, rows, zeros);
      continue;
    }
    weights.read_for(b, h / (call.H / call.G));
    RowValues values(call, rows);
    with_real(call.state_dtype, [&](auto item) {
      using State = decltype(item);
      if (tied) {
        update_rows<true, State>(call, rows, weights, values);
      } else {
        update_rows<false, State>(call, rows, weights, values);
      }
    });
    values.finish(call);
    write(call, rows, values.y);
  }
}

}  // namespace kexue::KEXUE_ISA
