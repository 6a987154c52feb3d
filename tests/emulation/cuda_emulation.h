// What csrc/scan/gpu.cuh offers, on a CPU and reproducible to the last switch: CUDA threads are
// fibers, which take turns in random order; several blocks are under way at once, at random
// paces, and start in a shuffled order; shared memory starts as garbage.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define KEXUE_DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

namespace kexue {
namespace emulation {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;

struct Schedule {
  int blocks_at_once;
  uint64_t seed;
};
inline Schedule schedule = {3, 0};

struct Barrier {
  int count, arrived = 0, phase = 0;
};

struct Warp {
  Barrier barrier{kLanes};
  std::array<std::array<std::byte, 64>, kLanes> mail;
};

struct Fiber {
  std::unique_ptr<std::byte[]> stack = std::make_unique_for_overwrite<std::byte[]>(kStackBytes);
  ucontext_t context;
  const int* awaited = nullptr;  // to become other than `value`
  int value = 0;
  bool done = false;
};

class Block;
struct Thread {
  Block* block;
  int index;
};
inline Thread self;

class Block {
 public:
  Block(int threads, const std::function<void()>& kernel)
      : fibers(threads), barrier{threads}, warps(threads / kLanes), kernel_(kernel) {}

  void start(int64_t block_index, int rounds_per_turn) {
    index = block_index, pace = rounds_per_turn;
    shared.fill(std::byte{0xee});
    for (Fiber& fiber : fibers) {
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &Block::work, 0);
      fiber.done = false;
    }
    left_.resize(fibers.size());
    std::iota(left_.begin(), left_.end(), 0);
  }

  bool done() const { return left_.empty(); }

  // Every thread that awaits nothing runs until it does. Whether there was one.
  bool turn(std::mt19937_64& random) {
    bool ran = false;
    std::shuffle(left_.begin(), left_.end(), random);
    for (const int i : left_) {
      Fiber& fiber = fibers[i];
      if (fiber.awaited && *fiber.awaited == fiber.value) continue;
      fiber.awaited = nullptr;
      self = {this, i};
      swapcontext(&scheduler_, &fiber.context);
      ran = true;
    }
    std::erase_if(left_, [&](int i) { return fibers[i].done; });
    return ran;
  }

  void end_turn() { swapcontext(&fibers[self.index].context, &scheduler_); }

  // Until what has this value has another.
  void wait_while(const int& awaited, int value) {
    fibers[self.index].awaited = &awaited;
    fibers[self.index].value = value;
    end_turn();
  }

  void wait(Barrier& at) {
    if (++at.arrived == at.count) {
      at.arrived = 0, ++at.phase;
    } else {
      wait_while(at.phase, at.phase);
    }
  }

  std::vector<Fiber> fibers;
  Barrier barrier;
  std::vector<Warp> warps;
  int64_t index = 0;
  int pace = 1;
  int64_t asleep = 0;  // turns
  alignas(16) std::array<std::byte, 100 << 10> shared;

 private:
  static void work() {
    self.block->kernel_();
    self.block->fibers[self.index].done = true;
  }

  const std::function<void()>& kernel_;
  std::vector<int> left_;  // threads
  ucontext_t scheduler_;
};

// The lanes' values, for as long as `use` runs.
template <class T, class F>
auto exchange(const T& x, F use) {
  static_assert(sizeof(T) <= 64);
  const int lane = self.index % kLanes;
  Block& block = *self.block;
  Warp& warp = block.warps[self.index / kLanes];
  memcpy(warp.mail[lane].data(), &x, sizeof x);
  block.wait(warp.barrier);
  const auto result = use([&](int other) {
    T value;
    memcpy(&value, warp.mail[other].data(), sizeof value);
    return value;
  });
  block.wait(warp.barrier);
  return result;
}

// Lets blocks take turns until each is done. `between` turns goes on what does so by itself; it
// tells whether there is anything. Blocks may fall asleep, at first and now and then, for up to
// `sleep` turns.
class Turns {
 public:
  Turns(std::mt19937_64& random, std::function<bool()> between, int sleep = 0)
      : random_(random), between_(std::move(between)), sleep_(sleep) {}

  void round(std::vector<std::unique_ptr<Block>>& under_way) {
    bool active = between_();
    for (auto& block : under_way) {
      if (block->asleep > 0) {
        --block->asleep, active = true;
      } else if (sleep_ > 0 && random_() % kWakeful == 0) {
        block->asleep = random_() % sleep_, active = true;
      } else if (random_() % block->pace == 0) {
        active |= block->turn(random_);
      }
    }
    idle_ = active ? 0 : idle_ + 1;
    if (idle_ < kPatience) return;
    fprintf(stderr, "cuda_emulation: every thread waits\n");
    abort();
  }

 private:
  static constexpr int kPatience = 10'000, kWakeful = 512;
  std::mt19937_64& random_;
  std::function<bool()> between_;
  int sleep_;
  int idle_ = 0;
};

inline void run_blocks(
    int64_t count, int threads, const std::function<void()>& kernel,
    const std::function<bool()>& between = [] { return false; }) {
  std::mt19937_64 random(schedule.seed);
  Turns turns(random, between);
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<std::unique_ptr<Block>> under_way;
  while (!order.empty() || !under_way.empty()) {
    if (!order.empty() && under_way.size() < size_t(schedule.blocks_at_once)) {
      under_way.push_back(std::make_unique<Block>(threads, kernel));
      under_way.back()->start(order.back(), 1 << random() % 4);
      order.pop_back();
    }
    turns.round(under_way);
    std::erase_if(under_way, [](const auto& block) { return block->done(); });
  }
}

}  // namespace emulation

inline Pack load_stream(const void* p) {
  Pack x;
  memcpy(&x, __builtin_assume_aligned(p, 16), sizeof x);
  return x;
}
inline void store_stream(void* p, Pack x) { memcpy(p, &x, sizeof x); }
template <class T>
T load_l2(const T* p) {
  return *p;
}
template <class T>
void store_l2(T* p, const T& value) {
  *p = value;
}
inline uint32_t load_acquire(const uint32_t* p) { return *p; }
inline void store_release(uint32_t* p, uint32_t x) { *p = x; }
inline int64_t fetch_increment(uint64_t* p) { return (*p)++; }
inline void forget(Pack&) {}
inline void pause() { emulation::self.block->end_turn(); }

template <class T>
T& block_shared() {
  static_assert(sizeof(T) <= sizeof(emulation::Block::shared));
  return *reinterpret_cast<T*>(emulation::self.block->shared.data());
}
inline int thread_index() { return emulation::self.index; }
inline int thread_count() { return emulation::self.block->barrier.count; }
inline int64_t block_index() { return emulation::self.block->index; }
inline void sync_block() {
  emulation::Block& block = *emulation::self.block;
  block.wait(block.barrier);
}
inline uint32_t ballot(bool x) {
  return emulation::exchange(x, [](auto of) {
    uint32_t votes = 0;
    for (int lane = 0; lane < emulation::kLanes; ++lane) votes |= uint32_t(of(lane)) << lane;
    return votes;
  });
}
template <class T>
T shuffle_up(const T& x, int delta) {
  const int lane = thread_index() % emulation::kLanes;
  return emulation::exchange(x, [&](auto of) { return of(lane < delta ? lane : lane - delta); });
}
inline float shuffle_xor(float x, int mask) {
  const int lane = thread_index() % emulation::kLanes;
  return emulation::exchange(x, [&](auto of) { return of(lane ^ mask); });
}
inline int64_t broadcast(int64_t x, int lane) {
  return emulation::exchange(x, [&](auto of) { return of(lane); });
}

inline void settle() {}
inline void prefetch(const void*) {}

inline float* launch_shared() {
  return reinterpret_cast<float*>(emulation::self.block->shared.data());
}
inline Pack load_pack(const void* p) { return load_stream(p); }
inline void store_pack(void* p, Pack x) {
  memcpy(__builtin_assume_aligned(p, 16), &x, sizeof x);
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float fused(float x, float y, float z) { return std::fma(x, y, z); }
inline float nearest(float x) { return std::nearbyint(x); }
inline float absolute(float x) { return std::abs(x); }
inline int count_bits(uint32_t x) { return std::popcount(x); }
inline float float_of_bits(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t bits_of_float(float x) { return std::bit_cast<uint32_t>(x); }

inline float float_of_half(uint16_t x) { return std::bit_cast<_Float16>(x); }
inline uint32_t half_of_float(float x) { return std::bit_cast<uint16_t>(_Float16(x)); }
inline uint32_t bfloat_of_float(float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void floats_of_halves(uint32_t x, float& low, float& high) {
  low = float_of_half(x & 0xffff), high = float_of_half(x >> 16);
}
inline uint32_t halves_of_floats(float low, float high) {
  return half_of_float(high) << 16 | half_of_float(low);
}
inline uint32_t bfloats_of_floats(float low, float high) {
  return bfloat_of_float(high) << 16 | bfloat_of_float(low);
}

inline void zero_async(const char*, void* data, int64_t bytes, void*) { memset(data, 0, bytes); }

template <class Args>
void launch(const char*, void (*kernel)(Args), int64_t blocks, int threads, void*,
            const Args& args) {
  emulation::run_blocks(blocks, threads, [&] { kernel(args); });
}

template <class Args>
void launch_with_shared(const char* op, void (*kernel)(Args), int64_t blocks, int threads,
                        int shared_bytes, void* stream, const Args& args) {
  if (size_t(shared_bytes) > sizeof(emulation::Block::shared)) {
    throw std::invalid_argument(std::string(op) + ": more shared memory than there is");
  }
  launch(op, kernel, blocks, threads, stream, args);
}

}  // namespace kexue
