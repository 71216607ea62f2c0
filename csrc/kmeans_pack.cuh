// Packing of float rows into float16 for the tensor cores, with what is needed to bound the error of doing so.
#pragma once

#include "device.cuh"

namespace ccl_fast {

constexpr double kFloatUnit = 1.0 / (1 << 24);   // unit roundoff of float32
constexpr float kLargestHalf = 65504.0f;
constexpr double kMostResidue = 1e30;
constexpr double kRoundUp = 1.0 + 1.0 / (1 << 20);  // covers the rounding of a bound to float32

__device__ __forceinline__ double warp_sum(double value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// One warp packs one row.
template <class T>
__global__ void __launch_bounds__(256) pack_kernel(const T* __restrict__ x, int64_t rows, int64_t d, bool cosine,
                                                   const float* __restrict__ origin, const float* __restrict__ scale,
                                                   int64_t padded_rows, int64_t padded_d, half_t* __restrict__ packed,
                                                   float* __restrict__ norm, float* __restrict__ residue,
                                                   float* __restrict__ half_square) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t problem = blockIdx.y;
  if (row >= padded_rows) return;
  const int64_t out = problem * padded_rows + row;
  packed += out * padded_d;
  if (row >= rows) {
    for (int64_t j = lane; j < padded_d; j += 32) packed[j] = to_half(0.0f);
    if (lane == 0) {
      norm[out] = residue[out] = 0.0f;
      half_square[out] = INFINITY;
    }
    return;
  }
  x += (problem * rows + row) * d;
  if (origin) origin += problem * d;

  double length = 1.0;
  if (cosine) {
    double square = 0.0;
    for (int64_t j = lane; j < d; j += 32) square += double(to_float(x[j])) * double(to_float(x[j]));
    square = warp_sum(square);
    length = square > 0.0 ? sqrt(square) : 1.0;
  }
  double packed_square = 0.0, residue_square = 0.0, exact_square = 0.0;
  for (int64_t j = lane; j < padded_d; j += 32) {
    double exact = 0.0;
    if (j < d) {
      const double value = double(to_float(x[j])) - (origin ? double(origin[j]) : 0.0);
      exact = value / length * double(scale[problem]);
    }
    const float clipped = fminf(fmaxf(float(exact), -kLargestHalf), kLargestHalf);
    const half_t rounded = to_half(clipped);
    const double kept = double(to_float(rounded));
    packed[j] = rounded;
    packed_square += kept * kept;
    residue_square += (exact - kept) * (exact - kept);
    exact_square += exact * exact;
  }
  packed_square = warp_sum(packed_square);
  residue_square = warp_sum(residue_square);
  exact_square = warp_sum(exact_square);
  if (lane == 0) {
    norm[out] = float(sqrt(packed_square) * kRoundUp);
    // The exact row is itself known to float64 only. Finite, so that no bound becomes 0 * infinity: a centre so far away
    // is nearest to nothing, and its half_square is infinite.
    residue[out] = float(fmin((sqrt(residue_square) + 1e-12 * sqrt(exact_square)) * kRoundUp, kMostResidue));
    half_square[out] = cosine ? 0.0f : float(0.5 * exact_square);
  }
}

}  // namespace ccl_fast
