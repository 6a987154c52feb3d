// selective_scan's backward: chunks from the last to the first. In each, for a block of channels
// and a state index, the chunk's states come again from its checkpoint; then their gradients run
// back over the steps. With g the gradient that reaches y (2 g where states are complex) and s
// what flows between steps,
//   G_t = conj(C_t) g_t + s_{t+1},  s_t = conj(a_t) G_t,  p_t = conj(x_{t-1}) s_t,
//   dC_t = g_t conj(x_t),  dB_t = dt_t u_t G_t,  dA = sum dt_t p_t,
//   ddt_t = Re(conj(A) p_t) + u_t Re(conj(B_t) G_t),  du_t = D g_t + dt_t Re(conj(B_t) G_t).
#include "scan/selective_scan_tile.h"

namespace kexue::KEXUE_ISA {
namespace {

// Sums over the channels of a group, for the steps of a tile: [n, steps, parts, kWidth].
template <class S>
class ChannelSums {
 public:
  ChannelSums(int64_t n, int64_t room) : n_(n), room_(room), sums_(n * room * kSize) {
    sums_.clear();
  }

  static constexpr int kSize = kParts<S> * kWidth;
  float* of(int64_t k) const { return sums_.at(k * room_ * kSize); }

  static KEXUE_INLINE void add(float* to, Lanes<S> x) {
    if constexpr (kParts<S> == 1) {
      store<kWidth>(to, load<kWidth>(to) + folded(x));
    } else {
      store<kWidth>(to, load<kWidth>(to) + folded(x.re));
      store<kWidth>(to + kWidth, load<kWidth>(to + kWidth) + folded(x.im));
    }
  }

  // To [batch, L, groups, n], and back to zeros.
  void flush(int64_t L, int64_t groups, const Tile& tile, int64_t group, void* out) {
    if (group < 0) return;
    for (int64_t s = 0; s < tile.steps; ++s) {
      const int64_t step = tile.row * L + tile.begin + s;
      S* to = static_cast<S*>(out) + (step * groups + group) * n_;
      for (int64_t k = 0; k < n_; ++k) {
        const float* from = of(k) + s * kSize;
        if constexpr (kParts<S> == 1) {
          to[k] = total(from);
        } else {
          to[k] = {total(from), total(from + kWidth)};
        }
      }
    }
    sums_.clear();
  }

 private:
  static KEXUE_INLINE Floats<kWidth> folded(Floats<kWidth> x) { return x; }
  static KEXUE_INLINE Floats<kWidth> folded(Floats<2 * kWidth> x) { return x.lo + x.hi; }

  static float total(const float* p) {
    float sums[kWidth];
    std::memcpy(sums, p, sizeof sums);
    for (int width = kWidth / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
    }
    return sums[0];
  }

  int64_t n_, room_;
  Buffer sums_;
};

// What belongs to the steps of a tile, each [room, N]. Loops take a copy of their own: a store
// through one of the pointers could otherwise be to it.
enum class Row { u, raw, dt, dtu, z, grad, g, y, BG, grad_dt, kCount };

template <int N>
struct Rows {
  float* data;
  int64_t room;

  KEXUE_INLINE float* at(Row row, int64_t s = 0) const {
    return data + (int64_t(row) * room + s) * N;
  }
  KEXUE_INLINE Floats<N> get(Row row, int64_t s) const { return load<N>(at(row, s)); }
  KEXUE_INLINE void put(Row row, int64_t s, Floats<N> x) const { store<N>(at(row, s), x); }
  void clear(Row row, int64_t steps) const { std::memset(at(row), 0, steps * N * sizeof(float)); }
};

template <class S, bool step_B, bool step_C>
class Backward {
 public:
  Backward(const SelectiveBackward& call, const SelectiveWalk& walk, const SelectiveSums& sums)
      : call_(call),
        in_(call.in),
        walk_(walk),
        sums_(sums),
        channels_(call.in, walk),
        n_(call.in.shape.n),
        room_(call.in.shape.chunk),
        flows_(channels_.states()),
        start_(n_ * kState),
        B_(step_B ? n_ * kParts<S> * room_ : 0),
        C_(step_C ? n_ * kParts<S> * room_ : 0),
        xs_(room_ * kState),
        as_(room_ * kState),
        rows_(int64_t(Row::kCount) * room_ * N),
        sums_A_(channels_.states()),
        sums_B_(step_B ? 0 : channels_.states()),
        sums_C_(step_C ? 0 : channels_.states()),
        sums_D_(channels_.count * N),
        sums_bias_(channels_.count * N),
        steps_B_(step_B ? n_ : 0, room_),
        steps_C_(step_C ? n_ : 0, room_) {
    for (Buffer* each : {&sums_A_, &sums_B_, &sums_C_, &sums_D_, &sums_bias_}) each->clear();
  }

  void run() {
    for (int64_t i = 0; i < walk_.count; ++i) {
      const SelectivePiece& piece = walk_.pieces[i];
      each([&](int64_t i, const Block& block) {
        gather_states<S>(piece.enter, block, n_, flows_.at(channels_.state_at(i)));
      });
      for_tiles_back(piece, [&](const Tile& tile) { advance(tile, piece.sequence); });
      each([&](int64_t i, const Block& block) {
        scatter_states<S>(flows_.at(channels_.state_at(i)), block, n_, piece.leave);
      });
    }
    if (walk_.outputs) each([&](int64_t i, const Block& block) { write_sums(i, block); });
  }

 private:
  static constexpr int N = kBlock<S>;
  static constexpr int kState = kParts<S> * N;

  KEXUE_INLINE Rows<N> rows() const { return {rows_.at(0), room_}; }

  template <class Body>
  KEXUE_INLINE void each(Body body) const {
    for_blocks<N>(in_, walk_, body);
  }

  template <class Body>
  void for_tiles_back(const SelectivePiece& piece, Body body) const {
    for (int64_t end = piece.end; end > piece.begin;) {
      const int64_t begin = most(piece.begin, (end - 1) / room_ * room_);
      body(Tile{piece.row, begin, end - begin});
      end = begin;
    }
  }

  void advance(const Tile& tile, int64_t sequence) {
    int64_t B_group = -1, C_group = -1;
    each([&](int64_t i, const Block& block) {
      const int64_t B_before = B_group, C_before = C_group;
      if (step_B && enters_group(in_, in_.B, block, B_group)) {
        flush_B(tile, B_before);
        read_group(channels_, in_.B, tile, B_group, room_, B_.at(0));
      }
      if (step_C && enters_group(in_, in_.C, block, C_group)) {
        flush_C(tile, C_before);
        read_group(channels_, in_.C, tile, C_group, room_, C_.at(0));
      }
      read(tile, i, block);
      if (!walk_.outputs) return summarise(tile, i, block);
      gather_states<S>(states_before(tile, sequence), block, n_, start_.at(0));
      for (const Row each : {Row::y, Row::BG, Row::grad_dt}) rows().clear(each, tile.steps);
      for (int64_t k = 0; k < n_; ++k) sweep(tile.steps, i, k);
      write(tile, i, block);
    });
    flush_B(tile, B_group);
    flush_C(tile, C_group);
  }

  void flush_B(const Tile& tile, int64_t group) {
    if (walk_.outputs) steps_B_.flush(in_.shape.L, in_.B.groups, tile, group, sums_.B);
  }
  void flush_C(const Tile& tile, int64_t group) {
    if (walk_.outputs) steps_C_.flush(in_.shape.L, in_.C.groups, tile, group, sums_.C);
  }

  // A tile begins at a checkpoint, or with its sequence.
  StateRows states_before(const Tile& tile, int64_t sequence) const {
    const SelectiveShape& shape = in_.shape;
    if (tile.begin % room_ == 0) {
      const int64_t chunks = (shape.L + room_ - 1) / room_;
      const int64_t at = (tile.row * chunks + tile.begin / room_) * n_ * shape.d;
      return {const_cast<S*>(static_cast<const S*>(call_.checkpoints)) + at, 1, shape.d};
    }
    if (!in_.initial) return {nullptr, 0, 0};
    const S* initial = static_cast<const S*>(in_.initial) + sequence * shape.d * n_;
    return {const_cast<S*>(initial), n_, 1};
  }

  void read(const Tile& tile, int64_t i, const Block& block) const {
    const Rows<N> r = rows();
    const bool gated = in_.z.data;
    read_steps(channels_, tile, i, block, r.at(Row::u), r.at(Row::raw), r.at(Row::dt),
               r.at(Row::dtu));
    read_tile<N>(call_.grad_out, in_.dtype, tile.row, tile.begin, tile.steps, block,
                 r.at(Row::grad));
    if (gated) {
      read_tile<N>(in_.z, in_.dtype, tile.row, tile.begin, tile.steps, block, r.at(Row::z));
    }
    for (int64_t s = 0; s < tile.steps; ++s) {
      auto reaches = r.get(Row::grad, s) * kOutputScale<S>;
      if (gated) reaches = reaches * (r.get(Row::z, s) * sigmoid<N>(r.get(Row::z, s)));
      r.put(Row::g, s, reaches);
    }
  }

  Coefficients<S, step_B> B_of(int64_t i, int64_t k) const {
    return {step_B ? B_.at(0) : channels_.B.at(channels_.state_at(i)), k, room_};
  }
  Coefficients<S, step_C> C_of(int64_t i, int64_t k) const {
    return {step_C ? C_.at(0) : channels_.C.at(channels_.state_at(i)), k, room_};
  }
  Rate<S> rate_of(int64_t i, int64_t k) const {
    return Rate<S>(channels_.rates_of(i) + k * Rate<S>::kSize);
  }

  void summarise(const Tile& tile, int64_t i, const Block& block) {
    const Rows<N> r = rows();
    float* as = as_.at(0);
    add_dt_sums<N>(r.at(Row::dt), tile.steps, block, walk_);
    for (int64_t k = 0; k < n_; ++k) {
      const Rate<S> rate = rate_of(i, k);
      const auto C = C_of(i, k);
      float* flow = flows_.at(channels_.state_at(i) + k * kState);
      Lanes<S> from_next = get_lanes<S>(flow);
      rate.decays(r.at(Row::dt), tile.steps, as);
      for (int64_t s = tile.steps - 1; s >= 0; --s) {
        const Lanes<S> G = add(from_next, scale(r.get(Row::g, s), conj(C.at(s))));
        from_next = mul(conj(get_lanes<S>(as + s * kState)), G);
      }
      put_lanes<S>(flow, from_next);
    }
  }

  void sweep(int64_t steps, int64_t i, int64_t k) {
    const Rate<S> rate = rate_of(i, k);
    const auto B = B_of(i, k);
    const auto C = C_of(i, k);
    const Rows<N> r = rows();
    const bool gated = in_.z.data;
    float *xs = xs_.at(0), *as = as_.at(0);
    Lanes<S> x = get_lanes<S>(start_.at(k * kState));
    rate.decays(r.at(Row::dt), steps, as);
    for (int64_t s = 0; s < steps; ++s) {
      put_lanes<S>(xs + s * kState, x);
      x = step(get_lanes<S>(as + s * kState), x, scale(r.get(Row::dtu, s), B.at(s)));
      if (gated) r.put(Row::y, s, r.get(Row::y, s) + real_mul(C.at(s), x));
    }
    sweep_back(rate.A, B, C, steps, x, i, k);
  }

  // x: the state after the last step.
  KEXUE_INLINE void sweep_back(const Lanes<S> A, const Coefficients<S, step_B> B,
                               const Coefficients<S, step_C> C, int64_t steps, Lanes<S> x,
                               int64_t i, int64_t k) {
    const int64_t at = channels_.state_at(i) + k * kState;
    const Rows<N> r = rows();
    const float *xs = xs_.at(0), *as = as_.at(0);
    float *to_B = step_B ? steps_B_.of(k) : nullptr, *to_C = step_C ? steps_C_.of(k) : nullptr;
    Lanes<S> from_next = get_lanes<S>(flows_.at(at)), sum_A{}, sum_B{}, sum_C{};
    for (int64_t s = steps - 1; s >= 0; --s) {
      const Reals<S> g = r.get(Row::g, s);
      const Lanes<S> G = add(from_next, scale(g, conj(C.at(s))));
      add_to<step_C>(sum_C, to_C, s, scale(g, conj(x)));
      add_to<step_B>(sum_B, to_B, s, scale(r.get(Row::dtu, s), G));
      x = get_lanes<S>(xs + s * kState);
      from_next = mul(conj(get_lanes<S>(as + s * kState)), G);
      const Lanes<S> p = mul(conj(x), from_next);
      sum_A = add(sum_A, scale(r.get(Row::dt, s), p));
      r.put(Row::grad_dt, s, r.get(Row::grad_dt, s) + real_dot(A, p));
      r.put(Row::BG, s, r.get(Row::BG, s) + real_dot(B.at(s), G));
    }
    put_lanes<S>(flows_.at(at), from_next);
    add_lanes(sums_A_.at(at), sum_A);
    if constexpr (!step_B) add_lanes(sums_B_.at(at), sum_B);
    if constexpr (!step_C) add_lanes(sums_C_.at(at), sum_C);
  }

  template <bool per_step>
  static KEXUE_INLINE void add_to(Lanes<S>& sum, float* sums, int64_t s, Lanes<S> x) {
    if constexpr (per_step) {
      ChannelSums<S>::add(sums + s * ChannelSums<S>::kSize, x);
    } else {
      sum = add(sum, x);
    }
  }

  static KEXUE_INLINE void add_lanes(float* to, Lanes<S> x) {
    put_lanes<S>(to, add(get_lanes<S>(to), x));
  }

  // What is left after the states: each row becomes the gradient of what it held.
  void write(const Tile& tile, int64_t i, const Block& block) const {
    const auto D = load<N>(channels_.D.at(i * N));
    const Rows<N> r = rows();
    const bool gated = in_.z.data, softened = in_.softplus;
    Reals<S> sum_D{}, sum_bias{};
    for (int64_t s = 0; s < tile.steps; ++s) {
      const auto u = r.get(Row::u, s), g = r.get(Row::g, s) * (1 / kOutputScale<S>);
      const auto BG = r.get(Row::BG, s);
      auto grad_delta = r.get(Row::grad_dt, s) + u * BG;
      if (softened) grad_delta = grad_delta * sigmoid<N>(r.get(Row::raw, s));
      sum_D = sum_D + g * u;
      sum_bias = sum_bias + grad_delta;
      r.put(Row::u, s, D * g + r.get(Row::dt, s) * BG);
      r.put(Row::raw, s, grad_delta);
      if (!gated) continue;
      const auto z = r.get(Row::z, s), gate = sigmoid<N>(z), ones = splat<N>(1);
      const auto y = r.get(Row::y, s) * kOutputScale<S> + D * u;
      r.put(Row::z, s, r.get(Row::grad, s) * y * (gate * (ones + z * (ones - gate))));
    }
    write_rows(Row::u, tile, block, call_.u);
    write_rows(Row::raw, tile, block, call_.delta);
    if (gated) write_rows(Row::z, tile, block, call_.z);
    store<N>(sums_D_.at(i * N), load<N>(sums_D_.at(i * N)) + sum_D);
    store<N>(sums_bias_.at(i * N), load<N>(sums_bias_.at(i * N)) + sum_bias);
  }

  void write_rows(Row row, const Tile& tile, const Block& block, void* out) const {
    write_tile<N>(in_, out, tile.row, tile.begin, tile.steps, block,
                  [r = rows(), row](int64_t s) { return r.get(row, s); });
  }

  void write_sums(int64_t i, const Block& block) const {
    const int64_t at = channels_.state_at(i);
    scatter_states<S>(sums_A_.at(at), block, n_, {sums_.A, n_, 1});
    if (!step_B) scatter_states<S>(sums_B_.at(at), block, n_, {sums_.B, n_, 1});
    if (!step_C) scatter_states<S>(sums_C_.at(at), block, n_, {sums_.C, n_, 1});
    const auto put_row = [&](const Buffer& from, float* to) {
      if (to) std::memcpy(to + block.channel, from.at(i * N), block.channels * sizeof(float));
    };
    put_row(sums_D_, sums_.D);
    put_row(sums_bias_, sums_.delta_bias);
  }

  const SelectiveBackward& call_;
  const SelectiveInputs& in_;
  const SelectiveWalk& walk_;
  const SelectiveSums& sums_;
  Channels<S> channels_;
  int64_t n_, room_;
  Buffer flows_, start_, B_, C_, xs_, as_, rows_;
  Buffer sums_A_, sums_B_, sums_C_, sums_D_, sums_bias_;
  ChannelSums<S> steps_B_, steps_C_;
};

}  // namespace

void selective_scan_backward(const SelectiveBackward& call, const SelectiveWalk& walk,
                             const SelectiveSums& sums) {
  with_kinds(call.in, [&](auto step_B, auto step_C) {
    if (call.in.complex) {
      Backward<Complex, step_B.is, step_C.is>(call, walk, sums).run();
    } else {
      Backward<float, step_B.is, step_C.is>(call, walk, sums).run();
    }
  });
}

void add_up(DType dtype, const float* from, int64_t terms, int64_t size, int64_t begin,
            int64_t end, void* out) {
  with_real(dtype, [&](auto item) {
    using Item = decltype(item);
    for (int64_t i = begin; i < end; ++i) {
      float sum = from[i];
      for (int64_t t = 1; t < terms; ++t) sum += from[t * size + i];
      store<1>(static_cast<Item*>(out) + i, sum);
    }
  });
}

}  // namespace kexue::KEXUE_ISA
