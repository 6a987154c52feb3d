#include "mla/mla_cache_append_cpu.h"

#include "common/reading.h"

namespace kexue::KEXUE_ISA {
namespace {

using V = Vector<float, kWidth>;

constexpr int64_t kPairs = kPiece / 2;  // of channels that are turned at once

// Channels [from, from + n) of a token, n <= kPiece, as floats: where they lie, or in `buffer`.
const float* read(const TokenRows& rows, int64_t t, int64_t from, int64_t n, float* buffer) {
  const float* found = nullptr;
  with_items(rows.dtype, [&](auto item) {
    using Item = decltype(item);
    const auto* data = static_cast<const Item*>(rows.data) + t * rows.token;
    found = Row<Item>{data, rows.channel}.read(from, n, buffer);
  });
  return found;
}

// The row of the cache that a token's becomes.
template <class Item>
class Target {
 public:
  Target(const MlaCacheAppend& call, int64_t t) : stride_(call.pages.channel) {
    const LatentPages& pages = call.pages;
    const int64_t slot = call.slots[t];
    // the pages are the caller's to write to
    data_ = static_cast<Item*>(const_cast<void*>(pages.data)) + slot / pages.size * pages.block +
            slot % pages.size * pages.place;
  }

  // Channels from `first` on, `step` apart.
  void write(const float* x, int64_t n, int64_t first, int64_t step = 1) const {
    const int64_t stride = step * stride_;
    Item* to = data_ + first * stride_;
    int64_t i = 0;
    if (stride == 1) {
      for (; i + kWidth <= n; i += kWidth) store<kWidth>(to + i, load<kWidth>(x + i));
    }
    for (; i < n; ++i) store<1>(to + i * stride, x[i]);
  }

 private:
  Item* data_;
  int64_t stride_;
};

float sum_of_squares(const float* x, int64_t n) {
  V sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth) {
    const V x0 = get<V>(x + i), x1 = get<V>(x + i + kWidth);
    sum[0] += x0 * x0;
    sum[1] += x1 * x1;
  }
  sum[0] += sum[1];
  float total = 0;
  for (int lane = 0; lane < kWidth; ++lane) total += sum[0][lane];
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

template <class Item>
void append_latent(const MlaCacheAppend& call, int64_t t, const Target<Item>& to) {
  float x_buffer[kPiece], w_buffer[kPiece], made[kPiece];
  float scale = 1;
  if (call.weight.data) {
    float squares = 0;
    for_pieces(call.dc, [&](int64_t from, int64_t n) {
      squares += sum_of_squares(read(call.latent, t, from, n, x_buffer), n);
    });
    scale = 1 / __builtin_sqrtf(squares / float(call.dc) + call.eps);
  }
  for_pieces(call.dc, [&](int64_t from, int64_t n) {
    const float* x = read(call.latent, t, from, n, x_buffer);
    if (!call.weight.data) return to.write(x, n, from);
    const float* w = read(call.weight, 0, from, n, w_buffer);
    for (int64_t i = 0; i < n; ++i) made[i] = x[i] * scale * w[i];
    to.write(made, n, from);
  });
}

// Pair i is channels i and i + dr / 2, or, interleaved, 2i and 2i + 1.
template <class Item>
void append_turned_key(const MlaCacheAppend& call, int64_t t, const Target<Item>& to) {
  float c_buffer[kPairs], s_buffer[kPairs], x_buffer[kPairs], y_buffer[kPairs];
  float made[2][kPairs];
  const int64_t half = call.dr / 2, step = call.interleaved ? 2 : 1;
  const int64_t other = call.interleaved ? 1 : half;
  TokenRows first = call.key;
  first.channel *= step;
  TokenRows second = first;
  second.data = static_cast<const Item*>(second.data) + other * call.key.channel;
  for (int64_t from = 0; from < half; from += kPairs) {
    const int64_t n = half - from < kPairs ? half - from : kPairs;
    const float* c = read(call.cos, t, from, n, c_buffer);
    const float* s = read(call.sin, t, from, n, s_buffer);
    const float *x = read(first, t, from, n, x_buffer), *y = read(second, t, from, n, y_buffer);
    for (int64_t i = 0; i < n; ++i) {
      made[0][i] = x[i] * c[i] - y[i] * s[i];
      made[1][i] = y[i] * c[i] + x[i] * s[i];
    }
    to.write(made[0], n, call.dc + from * step, step);
    to.write(made[1], n, call.dc + from * step + other, step);
  }
}

template <class Item>
void append_key(const MlaCacheAppend& call, int64_t t, const Target<Item>& to) {
  if (call.cos.data) return append_turned_key(call, t, to);
  float buffer[kPiece];
  for_pieces(call.dr, [&](int64_t from, int64_t n) {
    to.write(read(call.key, t, from, n, buffer), n, call.dc + from);
  });
}

}  // namespace

void mla_cache_append_token(const MlaCacheAppend& call, int64_t t) {
  with_items(call.dtype, [&](auto item) {
    const Target<decltype(item)> to(call, t);
    append_latent(call, t, to);
    append_key(call, t, to);
  });
}

}  // namespace kexue::KEXUE_ISA
