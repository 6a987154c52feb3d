// selective_scan's forward: for a tile of steps, block by block of channels, each state index
// runs over the steps in registers while y, dt and dt u stay in the first cache.
#include "scan/selective_scan_tile.h"

namespace kexue::KEXUE_ISA {
namespace {

constexpr int64_t kTileSteps = 32;

template <class S, bool step_B, bool step_C>
class Forward {
 public:
  Forward(const SelectiveForward& call, const SelectiveWalk& walk)
      : call_(call),
        walk_(walk),
        channels_(call.in, walk),
        n_(call.in.shape.n),
        states_(channels_.states()),
        B_(n_ * kParts<S> * kTileSteps),
        C_(n_ * kParts<S> * kTileSteps) {}

  void run() {
    for (int64_t i = 0; i < walk_.count; ++i) {
      const SelectivePiece& piece = walk_.pieces[i];
      each([&](int64_t i, const Block& block) {
        gather_states<S>(piece.enter, block, n_, states_.at(channels_.state_at(i)));
      });
      for_tiles(piece, kTileSteps, [&](const Tile& tile) { advance(tile); });
      each([&](int64_t i, const Block& block) {
        scatter_states<S>(states_.at(channels_.state_at(i)), block, n_, piece.leave);
      });
    }
  }

 private:
  static constexpr int N = kBlock<S>;

  template <class Body>
  void each(Body body) {
    for_blocks<N>(call_.in, walk_, body);
  }

  void advance(const Tile& tile) {
    const SelectiveInputs& in = call_.in;
    int64_t B_group = -1, C_group = -1;
    each([&](int64_t i, const Block& block) {
      if (step_B && enters_group(in, in.B, block, B_group)) {
        read_group(channels_, in.B, tile, B_group, kTileSteps, B_.at(0));
      }
      if (step_C && enters_group(in, in.C, block, C_group)) {
        read_group(channels_, in.C, tile, C_group, kTileSteps, C_.at(0));
      }
      advance(tile, i, block);
    });
  }

  void advance(const Tile& tile, int64_t i, const Block& block) {
    float* states = states_.at(channels_.state_at(i));
    read_steps(channels_, tile, i, block, u_, dt_, dt_, dtu_);
    if (walk_.outputs) keep(tile, block, states);
    add_dt_sums<N>(dt_, tile.steps, block, walk_);
    std::memset(y_, 0, tile.steps * N * sizeof(float));
    const float* B = step_B ? B_.at(0) : channels_.B.at(channels_.state_at(i));
    const float* C = step_C ? C_.at(0) : channels_.C.at(channels_.state_at(i));
    for (int64_t k = 0; k < n_; ++k) {
      scan(Rate<S>(channels_.rates_of(i) + k * Rate<S>::kSize), {B, k, kTileSteps},
           {C, k, kTileSteps}, tile.steps, states + k * kParts<S> * N);
    }
    if (walk_.outputs) write(tile, i, block);
  }

  KEXUE_INLINE void scan(const Rate<S> rate, const Coefficients<S, step_B> B,
                         const Coefficients<S, step_C> C, int64_t steps, float* state) {
    rate.decays(dt_, steps, a_);
    Lanes<S> x = get_lanes<S>(state);
    for (int64_t s = 0; s < steps; ++s) {
      const int64_t at = s * N;
      x = step(get_lanes<S>(a_ + s * kParts<S> * N), x, scale(load<N>(dtu_ + at), B.at(s)));
      store<N>(y_ + at, load<N>(y_ + at) + real_mul(C.at(s), x));
    }
    put_lanes<S>(state, x);
  }

  void keep(const Tile& tile, const Block& block, const float* states) const {
    const SelectiveShape& shape = call_.in.shape;
    if (!call_.checkpoints || tile.begin % shape.chunk != 0) return;
    const int64_t chunks = (shape.L + shape.chunk - 1) / shape.chunk;
    const int64_t at = (tile.row * chunks + tile.begin / shape.chunk) * n_ * shape.d;
    scatter_states<S>(states, block, n_, {static_cast<S*>(call_.checkpoints) + at, 1, shape.d});
  }

  void write(const Tile& tile, int64_t i, const Block& block) {
    const SelectiveInputs& in = call_.in;
    const bool gated = in.z.data;
    if (gated) read_tile<N>(in.z, in.dtype, tile.row, tile.begin, tile.steps, block, dt_);
    const auto D = load<N>(channels_.D.at(i * N)), factor = splat<N>(kOutputScale<S>);
    write_tile<N>(in, call_.out, tile.row, tile.begin, tile.steps, block, [&](int64_t s) {
      const auto y = factor * load<N>(y_ + s * N) + D * load<N>(u_ + s * N);
      if (!gated) return y;
      const auto z = load<N>(dt_ + s * N);
      return y * (z * sigmoid<N>(z));
    });
  }

  const SelectiveForward& call_;
  const SelectiveWalk& walk_;
  Channels<S> channels_;
  int64_t n_;
  Buffer states_, B_, C_;
  alignas(64) float u_[kTileSteps * N], dt_[kTileSteps * N], dtu_[kTileSteps * N],
      y_[kTileSteps * N], a_[kTileSteps * kParts<S> * N];
};

}  // namespace

void selective_scan_forward(const SelectiveForward& call, const SelectiveWalk& walk) {
  with_kinds(call.in, [&](auto step_B, auto step_C) {
    if (call.in.complex) {
      Forward<Complex, step_B.is, step_C.is>(call, walk).run();
    } else {
      Forward<float, step_B.is, step_C.is>(call, walk).run();
    }
  });
}

}  // namespace kexue::KEXUE_ISA
