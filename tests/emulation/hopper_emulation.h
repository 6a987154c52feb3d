// What csrc/common/hopper.cuh offers, on a CPU: shared memory with addresses, barriers that count
// bytes, a copy engine that takes its time, matrix instructions that read their operands by
// descriptor, at once or as late as the wait allows, and clusters of blocks whose stores to each
// other arrive at once or as late as a fence allows. Written from the PTX ISA's and the CUDA
// programming guide's own formulas, not from csrc/common/hopper_layout.h, which it checks.
#pragma once

#include <map>

#include "cuda_emulation.h"

#pragma GCC push_options
#pragma GCC optimize("O2")  // the matrix instructions are most of the time

namespace kexue::hopper {

constexpr uint32_t kSharedBase = 4096;  // address of the first byte

namespace emulation {

using kexue::emulation::self;

// A block's: of a cluster the blocks run at the same time.
struct State {
  alignas(1024) std::array<std::byte, 227 << 10> shared;
  std::mt19937_64 random;
  std::vector<std::function<void()>> copies;                   // under way
  std::map<int, std::vector<std::function<void()>>> products;  // of a thread, not yet waited for
  std::map<int, std::vector<std::function<void()>>> stores;    // likewise, to other blocks
  std::map<int, kexue::emulation::Barrier> barriers;
  int64_t block = -1;
};
constexpr int kMostBlocks = 16;
inline std::array<State, kMostBlocks> states;
inline int cluster = 1;  // blocks of one
inline kexue::emulation::Barrier cluster_barrier{0};
inline int64_t clusters = 1;
inline bool zeros_outside = false;  // else a copy from outside an array is an error

inline State& state() { return states[self.block->index % cluster]; }

inline void begin_launch(int blocks_of_cluster) {
  cluster = blocks_of_cluster;
  for (State& each : states) each.block = -1;
}

inline void begin_thread() {
  State& own = state();
  if (own.block == self.block->index) return;
  own.block = self.block->index;
  own.shared.fill(std::byte{0xff});  // NaN
  own.random.seed(kexue::emulation::schedule.seed + own.block);
  own.copies.clear(), own.products.clear(), own.stores.clear(), own.barriers.clear();
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "hopper_emulation: %s\n", what);
  abort();
}

// The 128-byte swizzle acts on address bits: 4 to 6 by 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline uint16_t& half_at(State& of, uint32_t address, bool swizzle = true) {
  const uint32_t offset = (swizzle ? swizzled(address) : address) - kSharedBase;
  if (offset + 2 > of.shared.size()) fail("an address outside shared memory");
  return *reinterpret_cast<uint16_t*>(of.shared.data() + offset);
}

struct Operand {  // "Matrix descriptor format"
  State& of;
  uint32_t start, leading, stride;
  bool swizzle;  // by 128 bytes, or not at all
  explicit Operand(uint64_t descriptor)
      : of(state()),
        start(uint32_t(descriptor & 0x3fff) << 4),
        leading(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        stride(uint32_t(descriptor >> 32 & 0x3fff) << 4),
        swizzle(descriptor >> 62 == 1) {
    if (descriptor >> 62 > 1) fail("a descriptor with another swizzle");
    if (descriptor >> 49 & 7) fail("a descriptor with a base offset");
  }
  // ((8, m), (T, 2k)) : ((8T, SBO), (1, T)), in elements of 16 bits: T is 8; without a swizzle
  // ((8, m), (T, 2)) : ((1T, SBO), (1, LBO))
  uint16_t k_major(int row, int k) const {
    if (swizzle) return half_at(of, start + row % 8 * 128 + row / 8 * stride + k * 2);
    const uint32_t at = row % 8 * 16 + row / 8 * stride + k / 8 * leading + k % 8 * 2;
    return half_at(of, start + at, false);
  }
  // ((T, 8, m), (8, k)) : ((1, T, LBO), (8T, SBO))
  uint16_t mn_major(int column, int k) const {
    if (!swizzle) fail("a transposed operand without a swizzle");
    return half_at(of, start + column % 64 * 2 + column / 64 * leading + k % 8 * 128 +
                           k / 8 * stride);
  }
};

// Where the last arrival and the last byte end a phase.
struct Count {
  int arrivals = 0, pending = 0, bytes = 0, phase = 0;
  void end_phase() {
    if (pending == 0 && bytes == 0) pending = arrivals, phase ^= 1;
  }
};
inline std::map<const void*, Count> counts;

// A thread's products, in order: at once, or with a later one, the last with the wait.
inline void finish() {
  auto& mine = state().products[self.index];
  for (auto& product : mine) product();
  mine.clear();
}
inline void start(std::function<void()> product) {
  state().products[self.index].push_back(std::move(product));
  if (state().random() % 2) finish();
}

// Some of what the copy engine has to do, in no order. Whether there is anything.
inline bool copy_some() {
  bool busy = false;
  for (State& each : states) {
    if (each.block < 0 || each.copies.empty()) continue;
    busy = true;
    if (each.random() % 2) continue;
    std::swap(each.copies[each.random() % each.copies.size()], each.copies.back());
    const auto copy = std::move(each.copies.back());
    each.copies.pop_back();
    copy();
  }
  return busy;
}

}  // namespace emulation

// ---- memory

inline void store_word(void* p, uint32_t x) { memcpy(__builtin_assume_aligned(p, 4), &x, 4); }
inline void store_floats(float* p, float x, float y) {
  const float both[2] = {x, y};
  memcpy(__builtin_assume_aligned(p, 8), both, 8);
}

inline uint32_t shared_address(const void* p) {
  const std::byte* first = emulation::state().shared.data();
  return uint32_t(static_cast<const std::byte*>(p) - first) + kSharedBase;
}
template <class T>
T& aligned_shared() {
  static_assert(sizeof(T) <= sizeof(emulation::State::shared));
  return *reinterpret_cast<T*>(emulation::state().shared.data());
}
inline void fence_proxy() {}

// ---- threads

inline int warp_index() { return thread_index() / 32; }
inline void sync_warp() {
  kexue::emulation::Block& block = *emulation::self.block;
  block.wait(block.warps[emulation::self.index / 32].barrier);
}
inline bool any_of_warp(bool x) { return ballot(x) != 0; }
template <int N>
void give_registers() {}
template <int N>
void take_registers() {}
inline void sync_some(int id, int threads) {
  auto& barrier = emulation::state().barriers[id];
  if (barrier.arrived == 0) barrier.count = threads;
  if (barrier.count != threads) emulation::fail("a barrier with two counts");
  emulation::self.block->wait(barrier);
}

// ---- barriers

using Barrier = uint64_t;

inline void init_barrier(Barrier& barrier, int arrivals) {
  emulation::counts[&barrier] = {arrivals, arrivals, 0, 0};
}
inline void publish_barriers() {}
inline void arrive_expecting(Barrier& barrier, int bytes) {
  emulation::Count& count = emulation::counts.at(&barrier);
  if (count.pending == 0) emulation::fail("an arrival too many");
  count.bytes += bytes, --count.pending;
  count.end_phase();
}
inline void arrive(Barrier& barrier) { arrive_expecting(barrier, 0); }
inline void await(Barrier& barrier, int parity) {
  const emulation::Count& count = emulation::counts.at(&barrier);
  while (count.phase == parity) {  // the phase under way has this parity
    emulation::self.block->wait_while(count.phase, parity);
  }
}
inline void await_cluster(Barrier& barrier, int parity) { await(barrier, parity); }

// ---- clusters

namespace emulation {

constexpr int kRankBits = 24;  // above which an address in a cluster has its block's rank + 1

inline std::byte* locate(uint32_t address) {
  const int rank = int(address >> kRankBits) - 1;
  const uint32_t offset = (address & ((1u << kRankBits) - 1)) - kSharedBase;
  if (rank < 0 || rank >= cluster) fail("an address without a block of the cluster");
  if (offset >= sizeof(State::shared)) fail("an address outside shared memory");
  if (states[rank].block < 0) fail("a block that has not begun, or has ended, is touched");
  return states[rank].shared.data() + offset;
}
inline void finish_stores() {
  auto& mine = state().stores[self.index];
  for (auto& store : mine) store();
  mine.clear();
}
template <class T>
void store(uint32_t address, T x) {
  if (address % sizeof x) fail("a store to an unaligned address");
  std::byte* to = locate(address);
  state().stores[self.index].push_back([=] {
    locate(address);
    memcpy(to, &x, sizeof x);
  });
  if (state().random() % 2) finish_stores();
}

}  // namespace emulation

inline int cluster_size() { return emulation::cluster; }
inline int cluster_rank() { return int(block_index() % emulation::cluster); }
inline int cluster_index() { return int(block_index() / emulation::cluster); }
inline int cluster_count() { return int(emulation::clusters); }
inline void sync_cluster() { emulation::self.block->wait(emulation::cluster_barrier); }

inline uint32_t address_in(uint32_t address, int rank) {
  if (rank < 0 || rank >= emulation::cluster) emulation::fail("no such block in the cluster");
  return address | uint32_t(rank + 1) << emulation::kRankBits;
}
inline void store_remote(uint32_t address, Pack x) { emulation::store(address, x); }
inline void store_remote(uint32_t address, uint32_t low, uint32_t high) {
  emulation::store(address, uint64_t(high) << 32 | low);
}
inline void fence_cluster() { emulation::finish_stores(); }
inline void arrive_remote(uint32_t barrier) {
  arrive(*reinterpret_cast<Barrier*>(emulation::locate(barrier)));
}

// ---- the copy engine

struct TensorMap {
  const uint16_t* data;
  int64_t sizes[3], strides[2];  // bytes
  int box_rows, box_channels;
};

inline TensorMap tensor_map(const char* op, const void* data, DType, const uint64_t (&sizes)[3],
                            const uint64_t (&strides)[2], uint32_t box_rows,
                            uint32_t box_channels) {
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides[0] % 16 == 0 &&
                       strides[1] % 16 == 0;
  if (!aligned || box_rows > 256 || box_channels * 2 > 128) {
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled would refuse");
  }
  return {static_cast<const uint16_t*>(data),
          {int64_t(sizes[0]), int64_t(sizes[1]), int64_t(sizes[2])},
          {int64_t(strides[0]), int64_t(strides[1])},
          int(box_rows),
          int(box_channels)};
}

inline void load_box(void* to, const TensorMap& map, int channel, int row, int page,
                     Barrier& barrier) {
  const uint32_t address = shared_address(to);
  if (address % 128) emulation::fail("a copy to an unaligned address");
  emulation::State& own = emulation::state();
  own.copies.push_back([=, &own, &map, &barrier] {
    for (int r = 0; r < map.box_rows; ++r) {
      for (int c = 0; c < map.box_channels; ++c) {
        const bool inside = row + r < map.sizes[1] && channel + c < map.sizes[0] &&
                            page < map.sizes[2] && row >= 0 && page >= 0;
        if (!inside && !emulation::zeros_outside) emulation::fail("a copy from outside the array");
        const int64_t at = (page * map.strides[1] + (row + r) * map.strides[0]) / 2 + channel + c;
        emulation::half_at(own, address + r * 128 + c * 2) = inside ? map.data[at] : 0;
      }
    }
    emulation::Count& count = emulation::counts.at(&barrier);
    count.bytes -= map.box_rows * map.box_channels * 2;
    count.end_phase();
  });
}

inline void prefetch_box(const TensorMap&, int, int, int) {}

// ---- matrix instructions

inline void begin_products() {}
inline void commit_products() {}
inline void await_products() {  // of the warp (.sync.aligned); some wait long
  if (emulation::state().random() % 64 == 0) {
    for (int turns = emulation::state().random() % 256; turns > 0; --turns) pause();
  }
  emulation::finish();
  sync_warp();
}
template <int N>
void pin(float (&)[N]) {}

template <DType T>
struct Products {
  static float number(uint16_t x) {
    return T == DType::bf16 ? float_of_bits(uint32_t(x) << 16) : float_of_half(x);
  }
  static int lane() { return emulation::self.index % 32; }
  static int row() { return emulation::self.index % 128 / 32 * 16 + lane() / 4; }

  // "Matrix fragments for wgmma.m64nNk16": of D, this thread has rows row() and row() + 8 and in
  // every 8 columns the two at lane() % 4 * 2.
  template <int N, class A, class B>
  static void accumulate(float* d, A a, B b) {
    float rows[2][16];
    for (int k = 0; k < 16; ++k) rows[0][k] = a(0, k), rows[1][k] = a(1, k);
    for (int eight = 0; eight < N / 8; ++eight) {
      for (int j = 0; j < 2; ++j) {
        float sum[2] = {};
        for (int k = 0; k < 16; ++k) {
          const float x = b(eight * 8 + lane() % 4 * 2 + j, k);
          sum[0] += rows[0][k] * x, sum[1] += rows[1][k] * x;
        }
        d[eight * 4 + j] += sum[0], d[eight * 4 + 2 + j] += sum[1];
      }
    }
  }
  static auto of_rows(uint64_t descriptor) {
    return [a = emulation::Operand(descriptor)](int which, int k) {
      return number(a.k_major(row() + which * 8, k));
    };
  }

  template <int N>
  static void multiply_k_major(float* d, uint64_t a, uint64_t b, int add) {
    emulation::start([=] {
      if (!add) std::fill_n(d, N / 2, 0.0f);
      accumulate<N>(d, of_rows(a), [b = emulation::Operand(b)](int n, int k) {
        return number(b.k_major(n, k));
      });
    });
  }
  static void multiply(float (&d)[16], uint64_t a, uint64_t b, int add) {
    multiply_k_major<32>(d, a, b, add);
  }
  static void multiply(float (&d)[20], uint64_t a, uint64_t b, int add) {
    multiply_k_major<40>(d, a, b, add);
  }
  static void scores(float (&d)[32], uint64_t a, uint64_t b, int add) {
    multiply_k_major<64>(d, a, b, add);
  }
  static auto columns(uint64_t descriptor) {
    return [b = emulation::Operand(descriptor)](int n, int k) { return number(b.mn_major(n, k)); };
  }
  static void values(float (&d)[128], uint64_t a, uint64_t b) {
    emulation::start([=, d = &d[0]] { accumulate<256>(d, of_rows(a), columns(b)); });
  }
  // A's fragments: registers 0 to 3 have (row, k), (row + 8, k), (row, k + 8) and (row + 8, k + 8),
  // two of k each.
  static void values(float (&d)[128], const uint32_t (&a)[4], uint64_t b) {
    const std::array<uint32_t, 4> mine = {a[0], a[1], a[2], a[3]};
    using Rows = std::array<std::array<float, 16>, 2>;
    const Rows rows = kexue::emulation::exchange(mine, [](auto of) {
      Rows found;
      for (int k = 0; k < 16; ++k) {
        const auto words = of(lane() / 4 * 4 + k % 8 / 2);
        for (int which = 0; which < 2; ++which) {
          found[which][k] = number(words[which + k / 8 * 2] >> (k % 2 * 16) & 0xffff);
        }
      }
      return found;
    });
    emulation::start([=, d = &d[0]] {
      accumulate<256>(d, [&](int which, int k) { return rows[which][k]; }, columns(b));
    });
  }
};

// ---- host

constexpr int kAlignment = 1024;

template <class Args>
void launch_large(const char*, void (*kernel)(Args), int64_t blocks, int threads, int, void*,
                  const Args& args) {
  const int at_once = std::exchange(kexue::emulation::schedule.blocks_at_once, 1);
  emulation::begin_launch(1);
  const auto body = [&] {
    emulation::begin_thread();
    kernel(args);
  };
  kexue::emulation::run_blocks(blocks, threads, body, emulation::copy_some);
  kexue::emulation::schedule.blocks_at_once = at_once;
}

// One cluster after the other, their blocks in turns; three clusters at most share the work.
template <class Args>
void launch_clusters(const char* op, void (*kernel)(Args), int64_t most, int size, int threads,
                     int shared_bytes, void*, const Args& args) {
  using kexue::emulation::Block;
  if (size_t(shared_bytes) + kAlignment > sizeof(emulation::State::shared)) {
    throw std::invalid_argument(std::string(op) + ": more shared memory than there is");
  }
  constexpr int kSleep = 5000;
  emulation::clusters = std::min<int64_t>(most, 3);
  std::mt19937_64 random(kexue::emulation::schedule.seed);
  const std::function<void()> body = [&] {
    emulation::begin_thread();
    kernel(args);
  };
  for (int64_t first = 0; first < emulation::clusters * size; first += size) {
    emulation::begin_launch(size);
    emulation::cluster_barrier = {size * threads};
    std::vector<std::unique_ptr<Block>> under_way;
    for (int rank = 0; rank < size; ++rank) {
      under_way.push_back(std::make_unique<Block>(threads, body));
      under_way.back()->start(first + rank, 1 << random() % 4);
      under_way.back()->asleep = random() % kSleep;
    }
    kexue::emulation::Turns turns(random, emulation::copy_some, kSleep);
    while (!under_way.empty()) {
      turns.round(under_way);
      std::erase_if(under_way, [&](const auto& block) {
        if (block->done()) emulation::states[block->index % size].block = -1;
        return block->done();
      });
    }
  }
}

}  // namespace kexue::hopper

#pragma GCC pop_options
