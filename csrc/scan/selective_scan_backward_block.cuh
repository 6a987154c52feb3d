// What the backward kernel of selective_scan does by unit: 8 channels of a step. See
// selective_scan_backward.cuh.
#pragma once

#include "scan/selective_scan_forward.cuh"

namespace kexue::selective {

constexpr int kBackwardPairs = kWarp, kBackwardChannels = 2 * kBackwardPairs;
constexpr int kBackwardThreads = kBackwardPairs * kGroups;
constexpr int kSpan = 32, kPiece = 16;  // steps
constexpr int kHeld = 8;                // floats: a thread's states
constexpr int kSpanUnits = kSpan * kBackwardChannels / kUnit / kBackwardThreads;  // of a thread
static_assert(kQuad * kHeld == kWarp);
static_assert(kBackwardThreads == kPiece * kBackwardChannels / kUnit, "a unit for each");
static_assert(kBackwardThreads == 4 * kSpan, "and one of B or C");

template <class S>
struct BackwardShared {
  using Plane = float[kSpan][kBackwardChannels];
  Plane dt, dtu, g;
  // For each channel of a thread the states that enter a step. Once that is done, (y, p) of both
  // channels, then q: sums over its states.
  float held[kPiece][2][kBackwardThreads][4];
  S B[kSpan][kPadded<S>], C[kSpan][kPadded<S>];
  float D[kBackwardChannels], bias[kBackwardChannels];
};

// A thread on its way through a segment.
template <DType T, class S>
struct BackwardBlock {
  const BackwardArgs& args;
  const Inputs& in;
  const ChannelTile& tile;
  const Segment& segment;
  BackwardShared<S>& shared;
  Unit unit;  // of the first steps of a span
  Rows<T> u, delta, z, grad;
  Entries<T, S> entries;

  KEXUE_DEVICE BackwardBlock(const BackwardArgs& args, const ChannelTile& tile, const Unit& unit,
                             const Segment& segment, BackwardShared<S>& shared)
      : args(args),
        in(args.in),
        tile(tile),
        segment(segment),
        shared(shared),
        unit(unit),
        u(in.u, segment.batch, unit.step, tile.begin + unit.channel),
        delta(in.delta, segment.batch, unit.step, tile.begin + unit.channel),
        z(in.z, segment.batch, unit.step, tile.begin + unit.channel),
        grad(args.grad_out, segment.batch, unit.step, tile.begin + unit.channel),
        entries(in, tile, segment.batch) {}

  KEXUE_DEVICE int live(const Stretch& stretch, int64_t step) const {
    return stretch.has(step + unit.step) ? unit.live : 0;
  }

  // dt, dtu, B and C of a span; and g, if it is needed.
  KEXUE_DEVICE void stage(const Stretch& stretch, int64_t step, bool gradients) const {
    const auto of_matrix = entries.load(stretch, step);
    Raw<T> of_u[kSpanUnits], of_delta[kSpanUnits], of_grad[kSpanUnits], of_z[kSpanUnits];
#pragma unroll
    for (int i = 0; i < kSpanUnits; ++i) {
      const int64_t at = step + i * kPiece;
      const int live = this->live(stretch, at);
      of_u[i] = u.load(in.wide, at, live), of_delta[i] = delta.load(in.wide, at, live);
      if (!gradients) continue;
      of_grad[i] = grad.load(in.wide, at, live), of_z[i] = z.load(in.wide, at, live);
    }
    entries.store(of_matrix, shared.B[0], shared.C[0]);
#pragma unroll
    for (int i = 0; i < kSpanUnits; ++i) {
      const int t = unit.step + i * kPiece;
      float x[kUnit], dt[kUnit], g[kUnit];
      unpack<T>(of_u[i], x);
      unpack<T>(of_delta[i], dt);
      step_sizes(in, shared.bias + unit.channel, live(stretch, step + i * kPiece), dt);
#pragma unroll
      for (int k = 0; k < kUnit; ++k) x[k] *= dt[k];
      store_row8(shared.dt[t] + unit.channel, dt);
      store_row8(shared.dtu[t] + unit.channel, x);
      if (!gradients) continue;
      unpack<T>(of_grad[i], g);
      gate<T>(in, of_z[i], g);
      store_row8(shared.g[t] + unit.channel, g);
    }
  }

  // What is staged next is on its way meanwhile.
  KEXUE_DEVICE void fetch(const Stretch& stretch, int64_t step) const {
#pragma unroll
    for (int i = 0; i < kSpanUnits; ++i) {
      const int64_t at = step + i * kPiece;
      const int live = this->live(stretch, at);
      u.fetch(at, live), delta.fetch(at, live), grad.fetch(at, live), z.fetch(at, live);
    }
  }

  // A piece's sums over states become gradients of u, delta and z; shared.dt and shared.dtu
  // become what is summed over steps for delta_bias and D.
  KEXUE_DEVICE void finish(const Stretch& stretch, int64_t step, int piece) const {
    const int64_t at = step + piece;
    const int live = this->live(stretch, at), row = piece + unit.step;
    if (live == 0) {
      const float zero[kUnit] = {};
      store_row8(shared.dt[row] + unit.channel, zero);
      store_row8(shared.dtu[row] + unit.channel, zero);
      return;
    }
    const Raw<T> of_u = u.load(in.wide, at, live), of_delta = delta.load(in.wide, at, live);
    const Raw<T> of_grad = grad.load(in.wide, at, live), of_z = z.load(in.wide, at, live);
    float y[kUnit] = {}, p[kUnit] = {}, q[kUnit] = {};
    add_groups(y, p, q);
    const int64_t t = at + unit.step, channel = tile.begin + unit.channel;
    if (args.sums) add_launches((segment.batch * in.L + t) * in.d + channel, live, y, p, q);
    if (!args.finish) return;
    if (in.z.data) write_z(of_u, of_grad, of_z, y, t, live);
    write(of_u, of_delta, p, q, t, row, live);
  }

  KEXUE_DEVICE void add_groups(float (&y)[kUnit], float (&p)[kUnit], float (&q)[kUnit]) const {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (group * Kind<S>::kStates >= in.states) break;
#pragma unroll
      for (int k = 0; k < kUnit; k += 2) {
        const int thread = group * kBackwardPairs + (unit.channel + k) / 2;
        float both[4], rest[2];
        load_floats(shared.held[unit.step][0][thread], both);
        memcpy(rest, shared.held[unit.step][1][thread], sizeof rest);
        y[k] += both[0], y[k + 1] += both[1], p[k] += both[2], p[k + 1] += both[3];
        q[k] += rest[0], q[k + 1] += rest[1];
      }
    }
  }

  KEXUE_DEVICE void add_launches(int64_t place, int live, float (&y)[kUnit], float (&p)[kUnit],
                                 float (&q)[kUnit]) const {
    const int64_t plane = in.batch * in.L * in.d;
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      if (k >= live) continue;
      float* sums = args.sums + place + k;
      if (in.first_state > 0) {
        y[k] += sums[0], p[k] += sums[plane], q[k] += sums[2 * plane];
      }
      if (!args.finish) sums[0] = y[k], sums[plane] = p[k], sums[2 * plane] = q[k];
    }
  }

  KEXUE_DEVICE void write_z(const Raw<T>& raw_u, const Raw<T>& raw_grad, const Raw<T>& raw_z,
                            const float (&y)[kUnit], int64_t t, int live) const {
    float u[kUnit], grad[kUnit], z[kUnit], D[kUnit];
    unpack<T>(raw_u, u);
    unpack<T>(raw_grad, grad);
    unpack<T>(raw_z, z);
    load_row8(shared.D + unit.channel, D);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) z[k] = grad[k] * fused(D[k], u[k], y[k]) * silu_slope(z[k]);
    store_unit<T>(args.z, in, segment.batch, t, tile.begin + unit.channel, live, z);
  }

  KEXUE_DEVICE void write(const Raw<T>& raw_u, const Raw<T>& raw_delta, const float (&p)[kUnit],
                          const float (&q)[kUnit], int64_t t, int row, int live) const {
    const int64_t channel = tile.begin + unit.channel;
    float u[kUnit], x[kUnit], dt[kUnit], g[kUnit], D[kUnit], bias[kUnit], grad_u[kUnit];
    unpack<T>(raw_u, u);
    unpack<T>(raw_delta, x);
    load_row8(shared.dt[row] + unit.channel, dt), load_row8(shared.g[row] + unit.channel, g);
    load_row8(shared.D + unit.channel, D), load_row8(shared.bias + unit.channel, bias);
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      grad_u[k] = fused(D[k], g[k], dt[k] * p[k]);
      dt[k] = fused(u[k], p[k], Kind<S>::kOfHeld * q[k]);
      u[k] *= g[k];
    }
    if (in.softplus) {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) dt[k] *= sigmoid(x[k] + bias[k]);
    }
    store_unit<T>(args.u, in, segment.batch, t, channel, live, grad_u);
    store_unit<T>(args.delta, in, segment.batch, t, channel, live, dt);
    store_row8(shared.dt[row] + unit.channel, dt), store_row8(shared.dtu[row] + unit.channel, u);
  }
};

}  // namespace kexue::selective
