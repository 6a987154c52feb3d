// monarch_matmul in one kernel, on Hopper, where the factors are larger than a cluster's shared
// memory: they come from L2 for every tile of rows. x is read once and y written once; z goes from
// block to block through shared memory, as in monarch_matmul_resident.cuh.
//
// In each thread block a loader (one thread) brings in pieces, by the copy engine: of x boxes of
// [80 rows, 64 channels], of w1 and w2 tiles of [64 outputs, 64 channels]. Two walkers (warp
// groups), each with 40 of the rows, multiply every piece:
//
//   z^T = w1 x^T, four adjacent blocks of w1 at a time with all 128 outputs: for one output and
//         row half a unit of z.
//   y^T = w2 z^T, eight adjacent blocks of w2 at a time, [8, 64 outputs, 40 rows].
//
// The pieces of a tile follow those of the one before at once, whatever the walkers wait for.
//
//   full[piece]     copy engine -> walkers: it has arrived
//   empty[piece]    walkers -> loader: may be overwritten
//   ready[walker]   the cluster's blocks -> each: their parts of z lie here
//   taken[walker]   the cluster's blocks -> each: theirs may be overwritten
#pragma once

#include "monarch/monarch_matmul_parts.cuh"

namespace kexue::monarch::streamed {

struct StreamArgs {
  ClusterArgs of;
  hopper::TensorMap w1, w2;  // [k, q, p] and [l, s, r], loaded in tiles of [64, 64]
};

// What each thread block of the cluster has at the same addresses. After it: z of each walker, by
// units (hopper::unit_offset).
struct alignas(1024) Shared {
  uint8_t piece[kPieces][kPieceBytes];
  Barrier full[kPieces], empty[kPieces], ready[kWalkers], taken[kWalkers];

  KEXUE_DEVICE uint8_t* z(const ClusterSizes& sizes, int walker) {
    return reinterpret_cast<uint8_t*>(this + 1) + walker * sizes.z_bytes(kStreamRows);
  }
};
static_assert(sizeof(Shared) == kPieces * kPieceBytes + kHeadBytes);

KEXUE_DEVICE void init_barriers(Shared& shared, int blocks) {
  for (Barrier& barrier : shared.full) hopper::init_barrier(barrier, 1);
  for (Barrier& barrier : shared.empty) hopper::init_barrier(barrier, kWalkers * kGroupWarps);
  for (Barrier& barrier : shared.ready) hopper::init_barrier(barrier, blocks);
  for (Barrier& barrier : shared.taken) hopper::init_barrier(barrier, blocks);
  hopper::publish_barriers();
}

constexpr int kTile = kWalkers * kStreamRows;  // rows

// ---- the loader

KEXUE_DEVICE void load_piece(Shared& shared, const hopper::TensorMap& map, int channel, int row,
                             int page, int bytes, int& piece) {
  const int stage = stage_of<kPieces>(piece);
  hopper::await(shared.empty[stage], parity_of<kPieces>(piece) ^ 1);
  hopper::arrive_expecting(shared.full[stage], bytes);
  hopper::load_box(shared.piece[stage], map, channel, row, page, shared.full[stage]);
  ++piece;
}

KEXUE_DEVICE void load_first(const StreamArgs& args, Shared& shared, int tile, int& piece) {
  const ClusterSizes& sizes = args.of.sizes;
  const int first = hopper::cluster_rank() * sizes.firsts();
  const int next = tile + hopper::cluster_count();
  for (int i = first; i < first + sizes.firsts(); ++i) {
    for (int c = 0; c < sizes.p; c += kTileChannels) {
      const int channel = i * sizes.p + c;
      load_piece(shared, args.of.x, channel, tile * kTile, 0, kPieceBytes, piece);
      if (next < sizes.tiles(kTile)) hopper::prefetch_box(args.of.x, channel, next * kTile, 0);
      for (int a = 0; a < kStreamOutputs; a += kTileRows) {
        load_piece(shared, args.w1, c, a, i, kTileBytes, piece);
      }
    }
  }
}

KEXUE_DEVICE void load_second(const StreamArgs& args, Shared& shared, int& piece) {
  const ClusterSizes& sizes = args.of.sizes;
  const int first = hopper::cluster_rank() * sizes.seconds();
  for (int j0 = first; j0 < first + sizes.seconds(); j0 += kTogether) {
    for (int e = 0; e < sizes.s; e += kTileRows) {
      for (int j = j0; j < j0 + kTogether; ++j) {
        for (int c = 0; c < sizes.r; c += kTileChannels) {
          load_piece(shared, args.w2, c, e, j, kTileBytes, piece);
        }
      }
    }
  }
}

// ---- the first product

// Of four blocks of w1: sums[2 j + 1] are outputs 64 to 127 of block j.
template <DType T>
KEXUE_DEVICE void multiply_rows(Sums<kStreamRows>& sums, const ClusterSizes& sizes, Shared& shared,
                                int walker, int& piece) {
  pin(sums);
#pragma unroll
  for (int j = 0; j < kQuarter; ++j) {
    int c = 0;
    do {
      const int box = stage_of<kPieces>(piece);
      hopper::await(shared.full[box], parity_of<kPieces>(piece));
      const uint32_t x = hopper::shared_address(shared.piece[box]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int tile = stage_of<kPieces>(++piece);
        hopper::await(shared.full[tile], parity_of<kPieces>(piece));
        const uint32_t w = hopper::shared_address(shared.piece[tile]);
        hopper::begin_products();
#pragma unroll
        for (int step = 0; step < hopper::kSteps; ++step) {
          hopper::Products<T>::multiply(
              sums[2 * j + half], hopper::across_channels(w, step),
              hopper::across_channels(x + walker * kStreamRows * hopper::kRowBytes, step),
              c + step > 0);
        }
        hopper::commit_products();
        hopper::await_products();
        release(shared.empty[tile]);
      }
      release(shared.empty[box]);
      ++piece, c += kTileChannels;
    } while (c < sizes.p);
  }
  pin(sums);
}

// Those sums, of blocks i0 to i0 + 3 of w1, to z: half a unit of each output and row.
template <DType T>
KEXUE_DEVICE void hand_over(const Sums<kStreamRows>& sums, const ClusterSizes& sizes, uint32_t z,
                            int i0) {
  const int thread = thread_index() % kGroup;
  const uint32_t at = hopper::unit_offset(kStreamRows, 0, i0 / kTogether) + i0 % kTogether * 2;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int a = tile * kTileRows + hopper::fragment_row(thread, half * 2);
      const uint32_t to = hopper::address_in(z, a / sizes.seconds()) +
                          a % sizes.seconds() * sizes.z_block(kStreamRows) + at;
#pragma unroll
      for (int i = 0; i < kStreamRows / 2; ++i) {
        if (i / 2 % 2 != half) continue;
        hopper::store_remote(to + hopper::fragment_column(thread, i) * kUnitBytes,
                             halves<T>(sums[tile][i], sums[2 + tile][i]),
                             halves<T>(sums[4 + tile][i], sums[6 + tile][i]));
      }
    }
  }
}

// ---- the second product

// Of eight blocks of w2, with z's from `z` on.
template <DType T>
KEXUE_DEVICE void multiply_hidden(Sums<kStreamRows>& sums, const ClusterSizes& sizes,
                                  Shared& shared, uint32_t z, int& piece) {
  pin(sums);
#pragma unroll
  for (int j = 0; j < kTogether; ++j) {
    int first = 0;  // step
    do {
      const int tile = stage_of<kPieces>(piece);
      hopper::await(shared.full[tile], parity_of<kPieces>(piece));
      const uint32_t w = hopper::shared_address(shared.piece[tile]);
      hopper::begin_products();
#pragma unroll
      for (int step = 0; step < hopper::kSteps; ++step) {
        hopper::Products<T>::multiply(
            sums[j], hopper::across_channels(w, step),
            hopper::across_units(z + j * sizes.z_block(kStreamRows), kStreamRows, first + step),
            first + step > 0);
      }
      hopper::commit_products();
      hopper::await_products();
      release(shared.empty[tile]);
      ++piece, first += hopper::kSteps;
    } while (first * hopper::kDepth < sizes.r);
  }
  pin(sums);
}

// ---- a walker

template <DType T>
KEXUE_DEVICE void walk(const StreamArgs& args, Shared& shared, int walker) {
  const ClusterSizes& sizes = args.of.sizes;
  const int rank = hopper::cluster_rank(), firsts = sizes.firsts(), seconds = sizes.seconds();
  const uint32_t z = hopper::shared_address(shared.z(sizes, walker));
  Sums<kStreamRows> sums;
  int piece = 0, parity = 0;
  for (int tile = hopper::cluster_index(); tile < sizes.tiles(kTile);
       tile += hopper::cluster_count(), parity ^= 1) {
    for (int i = 0; i < firsts; i += kQuarter) {
      multiply_rows<T>(sums, sizes, shared, walker, piece);
      if (i == 0) hopper::await_cluster(shared.taken[walker], parity ^ 1);
      hand_over<T>(sums, sizes, z, rank * firsts + i);
    }
    hopper::fence_cluster();
    tell_cluster(shared.ready[walker], walker, sizes.blocks);
    hopper::await_cluster(shared.ready[walker], parity);
    hopper::fence_proxy();
    for (int j = 0; j < seconds; j += kTogether) {
      for (int e = 0; e < sizes.s; e += kTileRows) {
        multiply_hidden<T>(sums, sizes, shared, z + j * sizes.z_block(kStreamRows), piece);
        if (j + kTogether >= seconds && e + kTileRows >= sizes.s) {
          tell_cluster(shared.taken[walker], walker, sizes.blocks);
        }
        store_rows<T, kStreamRows>(sums, args.of, tile * kTile + walker * kStreamRows,
                                   rank * seconds + j, e);
      }
    }
  }
}

template <DType T>
__global__ void __launch_bounds__(kClusterThreads, 1)
    monarch_matmul_streamed_hopper_kernel(const __grid_constant__ StreamArgs args) {
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  Shared& shared = hopper::aligned_shared<Shared>();
  if (thread_index() == 0) init_barriers(shared, args.of.sizes.blocks);
  hopper::sync_cluster();  // barriers are there, in every block
  const int warp = hopper::warp_index(), group = warp / kGroupWarps;
  if (group == kWalkers) {
    hopper::give_registers<kLoaderRegisters>();
    if (thread_index() == kWalkers * kGroup) {
      int piece = 0;
      for (int tile = hopper::cluster_index(); tile < args.of.sizes.tiles(kTile);
           tile += hopper::cluster_count()) {
        load_first(args, shared, tile, piece);
        load_second(args, shared, piece);
      }
    }
  } else {
    hopper::take_registers<kWalkerRegisters>();
    walk<T>(args, shared, group);
  }
  hopper::sync_cluster();  // no block ends while others may store to it
#elif defined(__CUDA_ARCH__)
  __trap();  // of other architectures: never launched
#endif
}

}  // namespace kexue::monarch::streamed
