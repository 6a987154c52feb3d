// How data of selective_scan comes to a GPU's threads, and into shared memory.
//
// A block takes a tile of channels through some segments, step by step; a thread of it holds
// kStates states of a pair of neighbouring channels. Neighbouring threads have neighbouring pairs;
// what they sum over the states goes through shared memory. Data is read and written by units: 8
// channels of a step.
#pragma once

#include "scan/selective_scan_cut.cuh"
#include "scan/selective_scan_math.cuh"

namespace kexue::selective {

constexpr int kUnit = 8;  // channels
constexpr int kQuad = 4;  // steps that are unrolled

// ---- a thread's states

constexpr int kGroups = 4;  // of threads with the same states: a launch takes 16 (8 complex) states
template <class S>
constexpr int kPadded = kGroups * Kind<S>::kStates;

// PAIRS threads in a row have the pairs of a tile, the next PAIRS the next states.
template <class S, int PAIRS>
struct Patch {
  static constexpr int kStates = Kind<S>::kStates, kChannels = 2 * PAIRS;
  int pair, group;
  int64_t channel;  // first of the pair
  int live;         // channels of the pair that exist
  int state;        // first of the thread's, in this launch
  int states;       // that exist

  KEXUE_DEVICE Patch(const Inputs& in, const ChannelTile& tile)
      : pair(thread_index() % PAIRS),
        group(thread_index() / PAIRS),
        channel(tile.begin + 2 * pair),
        state(group * kStates) {
    const int64_t beyond = tile.end - channel;
    const int rest = int(in.states) - state;
    live = beyond < 0 ? 0 : beyond < 2 ? int(beyond) : 2;
    states = rest < 0 ? 0 : rest < kStates ? rest : kStates;
  }

  KEXUE_DEVICE bool warp_is_idle(const Inputs& in) const {
    return thread_index() / kWarp * kWarp / PAIRS * kStates >= in.states;
  }
};

template <class S>
struct Pair {
  S of[2][Kind<S>::kStates];  // by channel
};

template <class S, class F>
KEXUE_DEVICE void each(F work) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int j = 0; j < Kind<S>::kStates; ++j) work(c, j);
  }
}

// A thread's part of an array with these strides; zeros if there is none.
template <class S, int PAIRS>
KEXUE_DEVICE Pair<S> load_pair(const void* data, const Patch<S, PAIRS>& patch, int64_t channel,
                               int64_t state) {
  Pair<S> x = {};
  if (!data) return x;
  const S* p = static_cast<const S*>(data) + patch.channel * channel + patch.state * state;
  each<S>([&](int c, int j) {
    if (c < patch.live && j < patch.states) x.of[c][j] = p[c * channel + j * state];
  });
  return x;
}

template <class S, int PAIRS>
KEXUE_DEVICE void store_pair(void* data, const Patch<S, PAIRS>& patch, int64_t channel,
                             int64_t state, const Pair<S>& x) {
  if (!data) return;
  S* p = static_cast<S*>(data) + patch.channel * channel + patch.state * state;
  each<S>([&](int c, int j) {
    if (c < patch.live && j < patch.states) p[c * channel + j * state] = x.of[c][j];
  });
}

// Row i of [.., d, n], or of [.., n, d] with the channels contiguous.
template <class S>
KEXUE_DEVICE const S* matrix_row(const void* data, const Inputs& in, int64_t i) {
  return data ? static_cast<const S*>(data) + i * in.d * in.n + in.first_state : nullptr;
}
template <class S>
KEXUE_DEVICE const S* transposed_row(const void* data, const Inputs& in, int64_t i) {
  return data ? static_cast<const S*>(data) + (i * in.n + in.first_state) * in.d : nullptr;
}

template <class S, int PAIRS>
KEXUE_DEVICE Pair<S> load_decays(const Inputs& in, const Patch<S, PAIRS>& patch) {
  Pair<S> A = load_pair<S>(matrix_row<S>(in.A, in, 0), patch, in.n, 1);
  each<S>([&](int c, int j) { A.of[c][j] = held(A.of[c][j]); });
  return A;
}

// ---- units

template <DType T>
struct Raw {
  Pack pack[kUnit * sizeof(StoredOf<T>) / sizeof(Pack)];
};

// A thread's units of an array: of its channels, of the step it has among some and of later ones.
template <DType T>
struct Rows {
  const StoredOf<T>* data;  // null: there is none
  const Strided& array;

  KEXUE_DEVICE Rows(const Strided& x, int64_t batch, int64_t step, int64_t channel)
      : data(static_cast<const StoredOf<T>*>(x.data)), array(x) {
    if (data) data += batch * x.batch + step * x.step + channel * x.channel;
  }

  KEXUE_DEVICE void fetch(int64_t later, int live) const {
    if (live > 0 && data) prefetch(data + later * array.step);
  }

  // `later` steps from there; zeros but for the first `live` channels.
  KEXUE_DEVICE Raw<T> load(bool wide, int64_t later, int live) const {
    Raw<T> raw = {};
    if (live <= 0 || !data) return raw;
    const StoredOf<T>* p = data + later * array.step;
    if (wide) {
#pragma unroll
      for (int i = 0; i < int(sizeof raw / sizeof(Pack)); ++i) {
        if (i * kChannels<T> < live) raw.pack[i] = load_pack(p + i * kChannels<T>);
      }
      return raw;
    }
    StoredOf<T> element[kUnit] = {};
#pragma unroll
    for (int k = 0; k < kUnit; ++k) {
      if (k < live) element[k] = p[k * array.channel];
    }
    memcpy(&raw, element, sizeof raw);
    return raw;
  }
};

template <DType T>
KEXUE_DEVICE void unpack(const Raw<T>& raw, float (&x)[kUnit]) {
#pragma unroll
  for (int i = 0; i < int(sizeof raw / sizeof(Pack)); ++i) {
    float some[kChannels<T>];
    Element<T>::unpack(raw.pack[i], some);
#pragma unroll
    for (int k = 0; k < kChannels<T>; ++k) x[i * kChannels<T> + k] = some[k];
  }
}

// To a contiguous [batch, L, d] array.
template <DType T>
KEXUE_DEVICE void store_unit(void* data, const Inputs& in, int64_t batch, int64_t step,
                             int64_t channel, int live, const float (&x)[kUnit]) {
  auto* p = static_cast<StoredOf<T>*>(data) + (batch * in.L + step) * in.d + channel;
  if (in.wide_out) {
#pragma unroll
    for (int i = 0; i < kUnit / kChannels<T>; ++i) {
      float some[kChannels<T>];
#pragma unroll
      for (int k = 0; k < kChannels<T>; ++k) some[k] = x[i * kChannels<T> + k];
      if (i * kChannels<T> < live) store_pack(p + i * kChannels<T>, Element<T>::pack(some));
    }
    return;
  }
#pragma unroll
  for (int k = 0; k < kUnit; ++k) {
    if (k < live) p[k] = stored<T>(x[k]);
  }
}

KEXUE_DEVICE void load_floats(const float* p, float (&x)[4]) {
  const Pack pack = load_pack(p);
  memcpy(x, &pack, sizeof pack);
}
KEXUE_DEVICE void store_floats(float* p, const float (&x)[4]) {
  Pack pack;
  memcpy(&pack, x, sizeof pack);
  store_pack(p, pack);
}
KEXUE_DEVICE void load_row8(const float* p, float (&x)[kUnit]) {
  float low[4], high[4];
  load_floats(p, low), load_floats(p + 4, high);
#pragma unroll
  for (int k = 0; k < 4; ++k) x[k] = low[k], x[k + 4] = high[k];
}
KEXUE_DEVICE void store_row8(float* p, const float (&x)[kUnit]) {
  float low[4], high[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) low[k] = x[k], high[k] = x[k + 4];
  store_floats(p, low), store_floats(p + 4, high);
}

// A thread's place among the units of some steps.
struct Unit {
  int step, channel;  // in the tile
  int live;           // channels that exist
};

// Neighbouring threads have neighbouring channels, or steps where those are closer in memory.
template <int STEPS, int CHANNELS>
KEXUE_DEVICE Unit unit_of(const Inputs& in, int index, const ChannelTile& tile) {
  constexpr int kAcross = CHANNELS / kUnit;
  const bool by_steps = in.u.channel > in.u.step;
  Unit unit;
  unit.step = by_steps ? index % STEPS : index / kAcross;
  unit.channel = (by_steps ? index / STEPS : index % kAcross) * kUnit;
  const int64_t left = tile.end - tile.begin - unit.channel;
  unit.live = left < 0 ? 0 : left < kUnit ? int(left) : kUnit;
  return unit;
}

// D or delta_bias of a tile's channels; zeros if there is none.
template <int CHANNELS>
KEXUE_DEVICE void stage_parameter(const float* x, const ChannelTile& tile, float* to) {
  for (int c = thread_index(); c < CHANNELS; c += thread_count()) {
    to[c] = x && tile.begin + c < tile.end ? x[tile.begin + c] : 0.0f;
  }
}

// dt from delta; 0, a step that changes nothing, where there is no channel.
KEXUE_DEVICE void step_sizes(const Inputs& in, const float* bias, int live,
                             float (&delta)[kUnit]) {
  float shift[kUnit];
  load_row8(bias, shift);
#pragma unroll
  for (int k = 0; k < kUnit; ++k) delta[k] += shift[k];
  if (in.softplus) {
#pragma unroll
    for (int k = 0; k < kUnit; ++k) delta[k] = softplus(delta[k]);
  }
#pragma unroll
  for (int k = 0; k < kUnit; ++k) delta[k] = k < live ? delta[k] : 0.0f;
}

// x silu(z)
template <DType T>
KEXUE_DEVICE void gate(const Inputs& in, const Raw<T>& raw_z, float (&x)[kUnit]) {
  if (!in.z.data) return;
  float z[kUnit];
  unpack<T>(raw_z, z);
#pragma unroll
  for (int k = 0; k < kUnit; ++k) x[k] *= silu(z[k]);
}

// ---- B and C of some steps into shared memory: [steps][padded states], 16 floats a step

// A thread's unit of B, in the first half of a block, or C: half of the states of a step.
template <DType T, class S>
struct Entries {
  static constexpr bool kComplex = sizeof(S) == sizeof(Complex);
  static constexpr int kStates = kPadded<S> / 2, kFloats = kPadded<S> * Kind<S>::kParts;
  static_assert(kFloats == 2 * kUnit);
  using Entry = std::conditional_t<kComplex, Complex, StoredOf<T>>;
  using Loaded = Raw<kComplex ? DType::f32 : T>;

  bool of_C, wide;
  int row, half, live;
  const Entry* data;
  int64_t step, state;  // strides

  KEXUE_DEVICE Entries(const Inputs& in, const ChannelTile& tile, int64_t batch) {
    const int threads = thread_count() / 2, index = thread_index() % threads;
    of_C = thread_index() >= threads;
    const Matrix& m = of_C ? in.C : in.B;
    row = index / 2, half = index % 2;
    const int rest = int(in.states) - half * kStates;
    live = !m.channels || rest < 0 ? 0 : rest < kStates ? rest : kStates;
    wide = m.wide, step = m.step, state = m.state;
    data = static_cast<const Entry*>(m.data);
    if (live) {
      data += batch * m.batch + row * m.step + tile.begin / m.channels * m.group +
              (in.first_state + half * kStates) * m.state;
    }
  }

  KEXUE_DEVICE Loaded load(const Stretch& stretch, int64_t first) const {
    Loaded raw = {};
    if (live == 0 || !stretch.has(first + row)) return raw;
    const Entry* p = data + first * step;
    constexpr int kOfPack = sizeof(Pack) / sizeof(Entry);
    if (wide) {
#pragma unroll
      for (int i = 0; i < kStates / kOfPack; ++i) {
        if (i * kOfPack < live) raw.pack[i] = load_pack(p + i * kOfPack);
      }
      return raw;
    }
    Entry element[kStates] = {};
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      if (k < live) element[k] = p[k * state];
    }
    memcpy(&raw, element, sizeof raw);
    return raw;
  }

  KEXUE_DEVICE void store(const Loaded& raw, S* B, S* C) const {
    float x[kUnit];
    unpack<kComplex ? DType::f32 : T>(raw, x);
    if (of_C && kComplex) {
#pragma unroll
      for (int k = 0; k < kUnit; ++k) x[k] *= Kind<S>::kOutput;
    }
    store_row8(reinterpret_cast<float*>(of_C ? C : B) + row * kFloats + half * kUnit, x);
  }
};

// 16 bytes of states
template <class S>
KEXUE_DEVICE void load_states(const S* p, S (&x)[Kind<S>::kStates]) {
  static_assert(sizeof x == sizeof(Pack));
  const Pack pack = load_pack(p);
  memcpy(x, &pack, sizeof x);
}

// A row of B or C in both channels; where it is time-invariant x stays.
template <class S, bool PER_STEP>
KEXUE_DEVICE void take_row(const Matrix& m, const S* row, Pair<S>& x) {
  if (!PER_STEP && !m.channels) return;
  S both[Kind<S>::kStates];
  load_states<S>(row, both);
  each<S>([&](int c, int j) { x.of[c][j] = both[j]; });
}

template <class S, int PAIRS>
KEXUE_DEVICE Pair<S> load_invariant(const Matrix& m, const Inputs& in,
                                    const Patch<S, PAIRS>& patch) {
  if (m.channels) return {};
  return load_pair<S>(matrix_row<S>(m.data, in, 0), patch, in.n, 1);
}

}  // namespace kexue::selective
