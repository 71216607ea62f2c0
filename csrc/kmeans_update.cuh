// Sums of rows by cluster in a fixed order: no atomics, the same bits every time.
//
// A cluster's rows are cut into pieces of at most 256. A block sums one piece; then a block sums one cluster's pieces. A
// large cluster is so shared by many blocks. All sums are float64's: the rows come from memory more slowly than they are
// added, and the mean of equal rows is that row.
#pragma once

#include "device.cuh"

namespace ccl_fast {

constexpr int kPieceRows = 256;
constexpr int kUpdateThreads = 128;

template <class T>
__global__ void __launch_bounds__(kUpdateThreads)
    sum_pieces_kernel(const T* __restrict__ x, int64_t clusters, int64_t d, const int64_t* __restrict__ order,
                      const int64_t* __restrict__ offsets, const int64_t* __restrict__ piece_offsets,
                      const float* __restrict__ weights, double* __restrict__ partial, double* __restrict__ partial_weight) {
  const int64_t piece = blockIdx.x;
  if (piece >= piece_offsets[clusters]) return;
  int64_t cluster = 0;  // the last one that begins at or before this piece
  for (int64_t low = 0, high = clusters; low < high;) {
    const int64_t middle = (low + high) / 2;
    if (piece_offsets[middle + 1] <= piece) low = cluster = middle + 1;
    else high = middle;
  }
  const int64_t begin = offsets[cluster] + (piece - piece_offsets[cluster]) * kPieceRows;
  const int64_t end = begin + kPieceRows < offsets[cluster + 1] ? begin + kPieceRows : offsets[cluster + 1];
  for (int64_t j = threadIdx.x; j < d; j += kUpdateThreads) {
    double sum = 0.0;
#pragma unroll 4
    for (int64_t i = begin; i < end; ++i) {
      const double value = double(to_float(x[order[i] * d + j]));
      sum += weights ? double(weights[order[i]]) * value : value;
    }
    partial[piece * d + j] = sum;
  }
  if (threadIdx.x == 0) {
    double weight = double(end - begin);
    if (weights) {
      weight = 0.0;
      for (int64_t i = begin; i < end; ++i) weight += double(weights[order[i]]);
    }
    partial_weight[piece] = weight;
  }
}

__global__ void __launch_bounds__(kUpdateThreads)
    sum_clusters_kernel(int64_t d, const int64_t* __restrict__ piece_offsets, const double* __restrict__ partial,
                        const double* __restrict__ partial_weight, double* __restrict__ sums,
                        double* __restrict__ total_weight) {
  const int64_t cluster = blockIdx.x;
  const int64_t begin = piece_offsets[cluster], end = piece_offsets[cluster + 1];
  for (int64_t j = threadIdx.x; j < d; j += kUpdateThreads) {
    double sum = 0.0;
    for (int64_t piece = begin; piece < end; ++piece) sum += partial[piece * d + j];
    sums[cluster * d + j] = sum;
  }
  if (threadIdx.x == 0) {
    double weight = 0.0;
    for (int64_t piece = begin; piece < end; ++piece) weight += partial_weight[piece];
    total_weight[cluster] = weight;
  }
}

}  // namespace ccl_fast
