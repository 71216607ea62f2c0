// Nearest centre by tensor cores: a tile of scores at a time, of which only each row's three lowest bounds live on.
//
// The score of row x and centre c is |c|^2 / 2 - <x, c>, which orders centres as |x - c| does (for the cosine, with unit
// vectors, - <x, c> alone). It is computed from rows rounded to float16 (x^ = x - d, c^ = c - e) and summed in float32, so
// it is off by at most
//
//   |d| (|c^| + |e|) + |x^| (|e| + gamma |c^|) + rho |c|^2 / 2,
//
// of which the kernel takes the largest over the centres of a tile. So every score has a lower and an upper bound. The
// nearest centre is the one with the lowest lower bound if the next lower bound is above some centre's upper bound. The
// other rows are in doubt: they are listed with the centre of the second lower bound, its rival, and with the third
// lower bound, which is one of all other centres; kmeans_runoff.cuh goes on from there.
#pragma once

#include "device.cuh"

namespace ccl_fast {

constexpr int kTile = 128;     // rows and centres of a tile
constexpr int kStep = 64;      // columns of a step: rows of 128 bytes in shared memory
constexpr int kStages = 3;     // steps in flight
constexpr int kTileBytes = kTile * kStep * 2;
constexpr int kThreads = 256;  // 8 warps, 4 x 2 of them over the tile, each 32 x 64
// The shared memory of these GPUs holds one block, so it may have all registers; that of the others holds two.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ == 1200)
constexpr int kBlocks = 1;
#else
constexpr int kBlocks = 2;
#endif
constexpr int kWarpRows = 32, kWarpCenters = 64;
constexpr int kSlots = 4;      // rows whose scores one thread holds
constexpr int kScores = 16;    // scores of such a row that it holds
constexpr uint32_t kIndexBits = kScores - 1;  // of a score's bits, those that its index takes the place of
constexpr float kLeastError = 1e-37f;  // what float32 may lose below its normal numbers
constexpr float kMostScore = 3e38f;    // a score beyond float32's range is above this

// Shared rows of 128 bytes hold 8 chunks of 16; a row's chunks are permuted so that 8 rows meet no bank twice.
__device__ __forceinline__ char* chunk_address(char* tile, int row, int chunk) {
  return tile + row * (kStep * 2) + ((chunk ^ (row & 7)) << 4);
}

// One step's columns of 128 rows, of which `count` exist; the others are zero.
__device__ __forceinline__ void load_tile(char* tile, const half_t* rows, int count, int64_t padded_d, int step) {
  constexpr int at_once = kThreads / 8;  // rows; a multiple of 8, so a thread's chunks are permuted alike
  const int row = threadIdx.x / 8, chunk = threadIdx.x % 8;
  char* target = chunk_address(tile, row, chunk);
  const half_t* source = rows + row * padded_d + step * kStep + chunk * 8;
#pragma unroll
  for (int i = 0; i < kTile / at_once; ++i) {
    cp_async_16(target + i * at_once * kStep * 2, source, row + i * at_once < count);
    source += at_once * padded_d;
  }
}

// What is known of one row's centres so far: the three lowest of the scores' lower bounds, whose centres the lower two
// are, and the lowest upper bound. What is not a number is passed over, as infinity is.
struct Nearest {
  float first = INFINITY, second = INFINITY, third = INFINITY;
  float upper = INFINITY;
  int label = 0, rival = 0;

  __device__ __forceinline__ void add(float bound, int index) {
    // Selections rather than branches: these take fewer registers.
    const bool nearest = bound < first, near = bound < second;
    third = near ? second : fminf(third, bound);
    rival = nearest ? label : near ? index : rival;
    second = nearest ? first : near ? bound : second;
    label = nearest ? index : label;
    first = nearest ? bound : first;
  }

  __device__ __forceinline__ void merge(const Nearest& other) {
    add(other.first, other.label);
    add(other.second, other.rival);
    third = fminf(third, other.third);
    upper = fminf(upper, other.upper);
  }

  // Of a row in another thread.
  __device__ __forceinline__ Nearest shuffled(int mask) const {
    Nearest other;
    other.first = shuffle_xor(first, mask);
    other.second = shuffle_xor(second, mask);
    other.third = shuffle_xor(third, mask);
    other.upper = shuffle_xor(upper, mask);
    other.label = shuffle_xor(label, mask);
    other.rival = shuffle_xor(rival, mask);
    return other;
  }
};

// Resident: the row tile stays in shared memory, which then holds all its steps, and only centres are streamed.
template <bool Resident>
__global__ void __launch_bounds__(kThreads, kBlocks)
    assign_kernel(const half_t* __restrict__ x, const float* __restrict__ x_norm, const float* __restrict__ x_residue,
                  const half_t* __restrict__ centers, const float* __restrict__ half_square,
                  const float* __restrict__ tile_norm, const float* __restrict__ tile_residue, int64_t rows,
                  int64_t padded_clusters, int64_t padded_d, float gamma, float rho, int64_t* __restrict__ labels,
                  int32_t* __restrict__ unsure, int32_t* __restrict__ rivals, float* __restrict__ others,
                  int32_t* __restrict__ unsure_count) {
  const int64_t problem = blockIdx.y, first = int64_t(blockIdx.x) * kTile;
  const int steps = int(padded_d / kStep), tiles = int(padded_clusters / kTile);
  x += (problem * rows + first) * padded_d;
  centers += problem * padded_clusters * padded_d;
  const int last_row = int(min(rows - first, int64_t(kTile))) - 1;

  char* const memory = shared_memory();
  char* const stages = Resident ? memory + steps * kTileBytes : memory;
  constexpr int stage_bytes = Resident ? kTileBytes : 2 * kTileBytes;
  int next_tile = 0, next_step = 0;  // to be loaded
  auto load_next = [&](int stage) {
    if (next_tile < tiles) {
      char* target = stages + stage * stage_bytes;
      load_tile(target, centers + next_tile * kTile * padded_d, kTile, padded_d, next_step);
      if (!Resident) load_tile(target + kTileBytes, x, last_row + 1, padded_d, next_step);
      if (++next_step == steps) next_step = 0, ++next_tile;
    }
    cp_async_commit();  // an empty group at the end keeps the count of groups in flight
  };
  if (Resident)
    for (int step = 0; step < steps; ++step) load_tile(memory + step * kTileBytes, x, last_row + 1, padded_d, step);
  for (int stage = 0; stage < kStages - 1; ++stage) load_next(stage);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp / 2 * kWarpRows, warp_center = warp % 2 * kWarpCenters;
  Nearest nearest[kSlots];
  float scores[2][8][4];  // the tile's inner products: [16 rows][8 centres][fragment]
  for (int tile = 0, step = 0, stage = 0; tile < tiles;) {
    cp_async_wait<kStages - 2>();
    barrier();  // this step has arrived for everyone, and everyone is done with the one before
    load_next((stage + kStages - 1) % kStages);
    if (step == 0)
      for (auto& sixteen : scores)
        for (auto& eight : sixteen)
          for (float& score : eight) score = 0.0f;

    char* const center_tile = stages + stage * stage_bytes;
    char* const row_tile = Resident ? memory + step * kTileBytes : center_tile + kTileBytes;
#pragma unroll 2
    for (int depth = 0; depth < kStep / 16; ++depth) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        ldmatrix_x4(a[i], chunk_address(row_tile, warp_row + i * 16 + lane % 16, depth * 2 + lane / 16));
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        uint32_t b[4];  // two fragments of 8 centres
        ldmatrix_x4(b, chunk_address(center_tile, warp_center + j * 8 + lane % 8 + lane / 16 * 8, depth * 2 + lane / 8 % 2));
        const uint32_t(&low)[2] = reinterpret_cast<const uint32_t(&)[2]>(b[0]);
        const uint32_t(&high)[2] = reinterpret_cast<const uint32_t(&)[2]>(b[2]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_m16n8k16(scores[i][j], a[i], low);
          mma_m16n8k16(scores[i][j + 1], a[i], high);
        }
      }
    }
    stage = (stage + 1) % kStages;
    if (++step < steps) continue;
    step = 0;

    // Fragment layout: thread `lane` holds rows lane / 4 (+ 8) and centres 2 (lane % 4) (+ 1) of each 16 x 8.
    // What follows is addressed anew for every tile: registers are scarce, and arithmetic here is not.
    const int first_center = tile * kTile + warp_center + lane % 4 * 2;
    const float* const starts = half_square + blockIdx.y * padded_clusters + first_center;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        const float h = starts[j * 8 + odd];
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) {
          float& score = scores[slot / 2][j][slot % 2 * 2 + odd];
          score = h - score;
        }
      }
    const float centers_norm = tile_norm[int64_t(blockIdx.y) * tiles + tile];
    const float centers_residue = tile_residue[int64_t(blockIdx.y) * tiles + tile];
    const float relative = centers_residue + gamma * centers_norm;
    const float absolute = 0.5f * rho * centers_norm * centers_norm + kLeastError;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      auto score_of = [&](int i) { return scores[slot / 2][i / 2][slot % 2 * 2 + i % 2]; };
      float lowest = INFINITY;
#pragma unroll
      for (int i = 0; i < kScores; ++i) lowest = fminf(lowest, score_of(i));
      const int64_t row = blockIdx.y * rows + first + min(warp_row + slot * 8 + lane / 4, last_row);
      const float error = x_residue[row] * centers_norm + x_norm[row] * relative + absolute;
      Nearest& so_far = nearest[slot];
      so_far.upper = fminf(so_far.upper, lowest + error);
      if (lowest - error < so_far.second) {  // rare after the first tiles
        // The three lowest, with their indices in the last bits, which `error` allows for. Infinity may so become a NaN,
        // which fminf and fmaxf pass over.
        float low = INFINITY, middle = INFINITY, high = INFINITY;
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          const float score = from_bits((to_bits(score_of(i)) & ~kIndexBits) | i);
          high = fmaxf(middle, fminf(high, score));
          middle = fmaxf(low, fminf(middle, score));
          low = fminf(low, score);
        }
        auto center_of = [&](float score) {
          const int i = to_bits(score) & kIndexBits;
          return first_center + i / 2 * 8 + i % 2;
        };
        so_far.add(low - error, center_of(low));
        so_far.add(middle - error, center_of(middle));
        so_far.third = fminf(so_far.third, high - error);
      } else {
        so_far.third = fminf(so_far.third, lowest - error);
      }
    }
    ++tile;
  }

  // Over the four threads of a row, then over the two warps.
  cp_async_wait<0>();
  barrier();
  Nearest* const shared = reinterpret_cast<Nearest*>(memory);
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    Nearest& mine = nearest[slot];
    for (int mask = 1; mask < 4; mask *= 2) mine.merge(mine.shuffled(mask));
    if (warp % 2 == 1 && lane % 4 == 0) shared[warp_row + slot * 8 + lane / 4] = mine;
  }
  barrier();
  if (warp % 2 == 1 || lane % 4 != 0) return;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    const int local = warp_row + slot * 8 + lane / 4;
    if (first + local >= rows) continue;
    Nearest& mine = nearest[slot];
    mine.merge(shared[local]);
    const int64_t row = problem * rows + first + local;
    labels[row] = mine.label;
    if (mine.second > mine.upper && mine.upper < kMostScore) continue;
    const int listed = atomic_add(unsure_count, 1);
    unsure[listed] = int32_t(row);
    rivals[listed] = mine.rival;
    others[listed] = mine.third;
  }
}

}  // namespace ccl_fast
