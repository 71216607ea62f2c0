// Distance of every row to the centre of its label, from differences: no cancellation far from the origin.
#pragma once

#include "device.cuh"
#include "kmeans_pack.cuh"

namespace ccl_fast {

// One warp takes one row.
template <class T>
__global__ void __launch_bounds__(256)
    distance_kernel(const T* __restrict__ x, const float* __restrict__ centers, const int64_t* __restrict__ labels,
                    int64_t rows, int64_t clusters, int64_t d, bool cosine, float* __restrict__ distance) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t problem = blockIdx.y;
  if (row >= rows) return;
  const int64_t at = problem * rows + row;
  const T* const from = x + at * d;
  const float* const to = centers + (problem * clusters + labels[at]) * d;
  double sum = 0.0, x_square = 0.0, c_square = 0.0;
#pragma unroll 2
  for (int64_t j = lane; j < d; j += 32) {
    const double value = to_float(from[j]), c = to[j];
    sum += cosine ? value * c : (value - c) * (value - c);
    x_square += value * value;
    c_square += c * c;
  }
  sum = warp_sum(sum);
  if (cosine) {
    const double lengths = sqrt(warp_sum(x_square)) * sqrt(warp_sum(c_square));
    sum = lengths > 0.0 ? fmax(0.0, 1.0 - sum / lengths) : 1.0;
  }
  if (lane == 0) distance[at] = float(sum);
}

}  // namespace ccl_fast
