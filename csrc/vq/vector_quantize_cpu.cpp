#include "vq/vector_quantize_cpu.h"

#include "common/reading.h"

namespace kexue::KEXUE_ISA {
namespace {

constexpr double kSmall = 1e-6;  // norms below which a direction means nothing

bool has_code(const VectorQuantize& call, int64_t row) {
  return call.indices[row] >= 0 && call.indices[row] < call.K;
}

template <class Item>
const Item* code_of(const VectorQuantize& call, int64_t row) {
  return static_cast<const Item*>(call.codebook.data) + call.indices[row] * call.codebook.row;
}

template <class Item>
double quantize_row(const VectorQuantize& call, int64_t row, Item* out) {
  if (!has_code(call, row)) {
    for (int64_t i = 0; i < call.d; ++i) store<1>(out + i, __builtin_nanf(""));
    return 0;
  }
  const Item* code = code_of<Item>(call, row);
  __builtin_memcpy(out, code, call.d * sizeof(Item));
  const Row<Item> x = row_of<Item>(call.x, row), q{code, 1};
  float x_buffer[kPiece], q_buffer[kPiece];
  Sum squares;
  for_pieces(call.d, [&](int64_t from, int64_t n) {
    const float *a = x.read(from, n, x_buffer), *b = q.read(from, n, q_buffer);
    squares.add(n, [&](int64_t i) {
      const double difference = double(a[i]) - double(b[i]);
      return difference * difference;
    });
  });
  return squares.total();
}

// dx = g * [0] + x * [1] + q * [2]
struct Coefficients {
  double g, x, q;
};

// A row's x, q and g.
template <class Item>
struct Triple {
  Row<Item> x, q, g;
  int64_t d;

  // Calls body(x, q, g, from, n) for pieces of the rows.
  template <class Body>
  KEXUE_INLINE void for_pieces_of_all(const Body& body) const {
    float x_buffer[kPiece], q_buffer[kPiece], g_buffer[kPiece];
    for_pieces(d, [&](int64_t from, int64_t n) {
      body(x.read(from, n, x_buffer), q.read(from, n, q_buffer), g.read(from, n, g_buffer), from,
           n);
    });
  }
};

// With u = x / |x|, p = q / |q| and w = u + p: s (g - 2 w (w.g) / |w|^2 + 2 u (p.g)).
template <class Item>
Coefficients rotation(const Triple<Item>& row) {
  Sum xx, qq, qg;
  row.for_pieces_of_all([&](const float* x, const float* q, const float* g, int64_t, int64_t n) {
    xx.add(n, [&](int64_t i) { return double(x[i]) * double(x[i]); });
    qq.add(n, [&](int64_t i) { return double(q[i]) * double(q[i]); });
    qg.add(n, [&](int64_t i) { return double(q[i]) * double(g[i]); });
  });
  const double x_norm = __builtin_sqrt(xx.total()), q_norm = __builtin_sqrt(qq.total());
  if (x_norm < kSmall) return {1, 0, 0};
  if (q_norm == 0) return {0, 0, 0};
  const double per_x = 1 / x_norm, per_q = 1 / q_norm;
  Sum ww, wg;
  row.for_pieces_of_all([&](const float* x, const float* q, const float* g, int64_t, int64_t n) {
    const auto w = [&](int64_t i) { return x[i] * per_x + q[i] * per_q; };
    ww.add(n, [&](int64_t i) { return w(i) * w(i); });
    wg.add(n, [&](int64_t i) { return w(i) * g[i]; });
  });
  const double square = ww.total(), s = q_norm * per_x;
  const double along_w = square < kSmall * kSmall ? 0 : -2 * wg.total() / square;
  const double along_u = 2 * qg.total() * per_q;
  return {s, s * (along_w + along_u) * per_x, s * along_w * per_q};
}

template <class Item>
void differentiate_row(const VectorQuantizeBackward& call, int64_t at, Item* out) {
  const VectorQuantize& forward = call.forward;
  if (!has_code(forward, at)) {
    for (int64_t i = 0; i < forward.d; ++i) store<1>(out + i, 0.0f);
    return;
  }
  const Triple<Item> row{row_of<Item>(forward.x, at), Row<Item>{code_of<Item>(forward, at), 1},
                         row_of<Item>(call.grad, at), forward.d};
  Coefficients by = call.gradient == Gradient::ste ? Coefficients{1, 0, 0} : rotation(row);
  by.x += call.commitment;
  by.q -= call.commitment;
  row.for_pieces_of_all(
      [&](const float* x, const float* q, const float* g, int64_t from, int64_t n) {
        float sum[kPiece];
        for (int64_t i = 0; i < n; ++i) {
          sum[i] = float(by.g * double(g[i]) + (by.x * double(x[i]) + by.q * double(q[i])));
        }
        int64_t i = 0;
        for (; i + kWidth <= n; i += kWidth) {
          store<kWidth>(out + from + i, load<kWidth>(sum + i));
        }
        for (; i < n; ++i) store<1>(out + from + i, sum[i]);
      });
}

}  // namespace

double vector_quantize_forward(const VectorQuantize& call, int64_t from, int64_t to,
                               void* quantized) {
  double squares = 0;
  with_items(call.dtype, [&](auto item) {
    auto* out = static_cast<decltype(item)*>(quantized);
    for (int64_t row = from; row < to; ++row) {
      squares += quantize_row(call, row, out + row * call.d);
    }
  });
  return squares;
}

void vector_quantize_backward(const VectorQuantizeBackward& call, int64_t from, int64_t to) {
  with_items(call.forward.dtype, [&](auto item) {
    auto* out = static_cast<decltype(item)*>(call.grad_x);
    for (int64_t row = from; row < to; ++row) {
      differentiate_row(call, row, out + row * call.forward.d);
    }
  });
}

}  // namespace kexue::KEXUE_ISA
