// monarch_matmul in one kernel, on Hopper: a cluster of thread blocks keeps both factors in its
// shared memory and takes tile after tile of rows. x is read once and y written once; z goes from
// block to block through shared memory, where it lies as the second product wants it: the
// permutation is a matter of addresses.
//
// In each thread block two walkers (warp groups), each with tiles of its own, so that while one
// multiplies the other stores or waits; and for each a loader (one thread), which brings x in, as
// boxes of [32 rows, 64 channels], by the copy engine. A walker, for each tile:
//
//   z^T = w1 x^T, eight adjacent blocks of w1 at a time: [8, 64 outputs, 32 rows] float32 fill
//         its registers. For one output and row the eight are a unit of 16 bytes, which goes to
//         the block that multiplies it.
//   y^T = w2 z^T, eight adjacent blocks of w2 at a time, [8, 64 outputs, 32 rows]: for one output
//         and row 16 bytes of y.
//
// What goes round:
//
//   full[walker][stage]   copy engine -> walker: the box has arrived
//   empty[walker][stage]  walker -> loader: may be overwritten
//   ready[walker]         the cluster's blocks -> each: their parts of z lie here
//   taken[walker]         the cluster's blocks -> each: theirs may be overwritten
#pragma once

#include "monarch/monarch_matmul_parts.cuh"

namespace kexue::monarch::resident {

constexpr int kRows = kResidentRows;

// What each thread block of the cluster has at the same addresses. After it: w1, w2, and z of each
// walker, by units (hopper::unit_offset).
struct alignas(1024) Shared {
  uint8_t x[kWalkers][kStages][kBoxBytes];
  Barrier full[kWalkers][kStages], empty[kWalkers][kStages];
  Barrier ready[kWalkers], taken[kWalkers];  // z: written by, read in all blocks of the cluster

  KEXUE_DEVICE uint8_t* w1() { return reinterpret_cast<uint8_t*>(this + 1); }
  KEXUE_DEVICE uint8_t* w2(const ClusterSizes& sizes) { return w1() + sizes.w1_bytes(); }
  KEXUE_DEVICE uint8_t* z(const ClusterSizes& sizes, int walker) {
    return w2(sizes) + sizes.w2_bytes() + walker * sizes.z_bytes(kRows);
  }
};
static_assert(sizeof(Shared) == kWalkers * kStages * kBoxBytes + kHeadBytes);

KEXUE_DEVICE void init_barriers(Shared& shared, int blocks) {
  for (int walker = 0; walker < kWalkers; ++walker) {
    for (Barrier& barrier : shared.full[walker]) hopper::init_barrier(barrier, 1);
    for (Barrier& barrier : shared.empty[walker]) hopper::init_barrier(barrier, kGroupWarps);
    hopper::init_barrier(shared.ready[walker], blocks);
    hopper::init_barrier(shared.taken[walker], blocks);
  }
  hopper::publish_barriers();
}

// Tiles are dealt to walkers in turn: this one's first, and how far apart they are.
KEXUE_DEVICE int first_tile(int walker) { return hopper::cluster_index() * kWalkers + walker; }
KEXUE_DEVICE int tile_step() { return hopper::cluster_count() * kWalkers; }

// ---- factors, once

KEXUE_DEVICE void load_first_factor(const ClusterArgs& args, uint8_t* to, int rank) {
  const ClusterSizes& sizes = args.sizes;
  const int q = sizes.q, p = sizes.p, units = p / kTogether, blocks = sizes.firsts();
  const uint16_t* from = static_cast<const uint16_t*>(args.w1) + int64_t(rank) * blocks * q * p;
  for (int n = thread_index(); n < blocks * units * q; n += kClusterThreads) {
    const int a = n % q, unit = n / q % units, i = n / q / units;
    store_pack(to + i * q * p * 2 + hopper::unit_offset(q, a, unit),
               load_pack(from + (i * q + a) * p + unit * kTogether));
  }
}

KEXUE_DEVICE Pack every_mth(const uint16_t* row, int unit, int m) {
  Pack x;
#pragma unroll
  for (int word = 0; word < kTogether / 2; ++word) {
    const uint32_t low = row[input_of_unit(unit, word * 2, m)];
    const uint32_t high = row[input_of_unit(unit, word * 2 + 1, m)];
    x.word[word] = high << 16 | low;
  }
  return x;
}

KEXUE_DEVICE void load_second_factor(const ClusterArgs& args, uint8_t* to, int rank) {
  const ClusterSizes& sizes = args.sizes;
  const int s = sizes.s, r = sizes.r, units = r / kTogether, blocks = sizes.seconds();
  const int m = sizes.q / sizes.l;
  const uint16_t* from = static_cast<const uint16_t*>(args.w2) + int64_t(rank) * blocks * s * r;
  for (int n = thread_index(); n < blocks * units * s; n += kClusterThreads) {
    const int e = n % s, unit = n / s % units, j = n / s / units;
    const uint16_t* row = from + (j * s + e) * r;
    store_pack(to + j * s * r * 2 + hopper::unit_offset(s, e, unit),
               m == 1 ? load_pack(row + unit * kTogether) : every_mth(row, unit, m));
  }
}

// ---- rows: one thread for each walker

KEXUE_DEVICE void load_rows(const ClusterArgs& args, Shared& shared, int walker) {
  const ClusterSizes& sizes = args.sizes;
  const int own = sizes.firsts() * sizes.p, first = hopper::cluster_rank() * own;
  const int together = kTogether * sizes.p, step = tile_step();
  int box = 0;
  for (int tile = first_tile(walker); tile < sizes.tiles(kRows); tile += step) {
    for (int group = 0; group < own; group += together) {
      for (int a = 0; a < sizes.q; a += kTileRows) {
        for (int c = 0; c < together; c += kTileChannels, ++box) {
          const int channel = first + group + c;
          Barrier& full = shared.full[walker][stage_of<kStages>(box)];
          hopper::await(shared.empty[walker][stage_of<kStages>(box)], parity_of<kStages>(box) ^ 1);
          hopper::arrive_expecting(full, kBoxBytes);
          hopper::load_box(shared.x[walker][stage_of<kStages>(box)], args.x, channel,
                           tile * kRows, 0, full);
          if (a == 0 && tile + step < sizes.tiles(kRows)) {
            hopper::prefetch_box(args.x, channel, (tile + step) * kRows, 0);
          }
        }
      }
    }
  }
}

// ---- the first product

// Of eight blocks of w1, from `w1` on, and the boxes of x from `box` on, in each of which there are
// kBlocks blocks' channels (or a part of one's: p is 64 or more).
template <DType T, int kBlocks>
KEXUE_DEVICE void multiply_rows(Sums<kRows>& sums, const ClusterSizes& sizes, Shared& shared,
                                int walker, uint32_t w1, int& box) {
  constexpr int kSteps = hopper::kSteps / kBlocks;  // of a block in a box
  const int block_bytes = sizes.q * sizes.p * 2;
  pin(sums);
#pragma unroll
  for (int j = 0; j < kTogether; j += kBlocks) {
    int first = 0;  // step
    do {
      const int stage = stage_of<kStages>(box);
      hopper::await(shared.full[walker][stage], parity_of<kStages>(box));
      const uint32_t x = hopper::shared_address(shared.x[walker][stage]);
      hopper::begin_products();
#pragma unroll
      for (int step = 0; step < hopper::kSteps; ++step) {
        const int block = j + step / kSteps, within = first + step % kSteps;
        hopper::Products<T>::multiply(
            sums[block], hopper::across_units(w1 + block * block_bytes, sizes.q, within),
            hopper::across_channels(x, step), within > 0);
      }
      hopper::commit_products();
      hopper::await_products();
      release(shared.empty[walker][stage]);
      ++box, first += kSteps;
    } while (kBlocks == 1 && first * hopper::kDepth < sizes.p);
  }
  pin(sums);
}

// Sums of eight blocks of w1, whose first is the group's `group`-th and outputs from a0 on, to z.
// Odd rows of a warp's eight store the odd tokens first, so that its units lie in all banks.
template <DType T>
KEXUE_DEVICE void hand_over(const Sums<kRows>& sums, const ClusterSizes& sizes, uint32_t z,
                            int group, int a0) {
  const int thread = thread_index() % kGroup, odd = thread / 4 % 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int a = a0 + hopper::fragment_row(thread, half * 2);
    if (a >= sizes.q) continue;
    const int unit = group * (sizes.q / sizes.l) + a / sizes.l, block = a % sizes.l;
    const uint32_t to = hopper::address_in(z, block / sizes.seconds()) +
                        block % sizes.seconds() * sizes.z_block(kRows) +
                        hopper::unit_offset(kRows, 0, unit);
#pragma unroll
    for (int i = half * 2; i < kRows / 2; i += 4) {
      Pack first, second;
#pragma unroll
      for (int word = 0; word < kTogether / 2; ++word) {
        const int j = word * 2;
        const uint32_t even = halves<T>(sums[j][i], sums[j + 1][i]);
        const uint32_t next = halves<T>(sums[j][i + 1], sums[j + 1][i + 1]);
        first.word[word] = odd ? next : even;
        second.word[word] = odd ? even : next;
      }
      const uint32_t row = hopper::fragment_column(thread, i);
      hopper::store_remote(to + (row + odd) * kUnitBytes, first);
      hopper::store_remote(to + (row + 1 - odd) * kUnitBytes, second);
    }
  }
}

// ---- the second product

// Of eight blocks of w2, from `w2` on, with z's from `z` on.
template <DType T>
KEXUE_DEVICE void multiply_hidden(Sums<kRows>& sums, const ClusterSizes& sizes, uint32_t w2,
                                  uint32_t z) {
  pin(sums);
  int step = 0;
  do {
    hopper::begin_products();
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      hopper::Products<T>::multiply(
          sums[j], hopper::across_units(w2 + j * sizes.s * sizes.r * 2, sizes.s, step),
          hopper::across_units(z + j * sizes.z_block(kRows), kRows, step), step > 0);
    }
    hopper::commit_products();
    hopper::await_products();
  } while (++step * hopper::kDepth < sizes.r);
  pin(sums);
}

// ---- a walker

template <DType T, int kBlocks>
KEXUE_DEVICE void walk(const ClusterArgs& args, Shared& shared, int walker) {
  const ClusterSizes& sizes = args.sizes;
  const int rank = hopper::cluster_rank(), firsts = sizes.firsts(), seconds = sizes.seconds();
  const uint32_t w1 = hopper::shared_address(shared.w1());
  const uint32_t w2 = hopper::shared_address(shared.w2(sizes));
  const uint32_t z = hopper::shared_address(shared.z(sizes, walker));
  Sums<kRows> sums;
  int box = 0, parity = 0;
  for (int tile = first_tile(walker); tile < sizes.tiles(kRows); tile += tile_step(), parity ^= 1) {
    for (int i = 0; i < firsts; i += kTogether) {
      for (int a = 0; a < sizes.q; a += kTileRows) {
        const uint32_t blocks = w1 + i * sizes.q * sizes.p * 2 + hopper::unit_offset(sizes.q, a, 0);
        multiply_rows<T, kBlocks>(sums, sizes, shared, walker, blocks, box);
        if (i == 0 && a == 0) hopper::await_cluster(shared.taken[walker], parity ^ 1);
        hand_over<T>(sums, sizes, z, (rank * firsts + i) / kTogether, a);
      }
    }
    hopper::fence_cluster();
    tell_cluster(shared.ready[walker], walker, sizes.blocks);
    hopper::await_cluster(shared.ready[walker], parity);
    hopper::fence_proxy();
    for (int j = 0; j < seconds; j += kTogether) {
      for (int e = 0; e < sizes.s; e += kTileRows) {
        const uint32_t blocks = w2 + j * sizes.s * sizes.r * 2 + hopper::unit_offset(sizes.s, e, 0);
        multiply_hidden<T>(sums, sizes, blocks, z + j * sizes.z_block(kRows));
        if (j + kTogether >= seconds && e + kTileRows >= sizes.s) {
          tell_cluster(shared.taken[walker], walker, sizes.blocks);
        }
        store_rows<T, kRows>(sums, args, tile * kRows, rank * seconds + j, e);
      }
    }
  }
}

template <DType T, int kBlocks>
__global__ void __launch_bounds__(kClusterThreads, 1)
    monarch_matmul_resident_hopper_kernel(const __grid_constant__ ClusterArgs args) {
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Shared& shared = hopper::aligned_shared<Shared>();
  const int rank = hopper::cluster_rank();
  if (thread_index() == 0) init_barriers(shared, args.sizes.blocks);
  load_first_factor(args, shared.w1(), rank);
  load_second_factor(args, shared.w2(args.sizes), rank);
  hopper::fence_proxy();
  hopper::sync_cluster();  // factors and barriers are there, in every block
  const int warp = hopper::warp_index(), group = warp / kGroupWarps;
  if (group == kWalkers) {
    hopper::give_registers<kLoaderRegisters>();
    const int walker = warp % kGroupWarps;
    if (walker < kWalkers && thread_index() % 32 == 0) load_rows(args, shared, walker);
  } else {
    hopper::take_registers<kWalkerRegisters>();
    walk<T, kBlocks>(args, shared, group);
  }
  hopper::sync_cluster();  // no block ends while others may store to it
#elif defined(__CUDA_ARCH__)
  __trap();  // of other architectures: never launched
#endif
}

}  // namespace kexue::monarch::resident
