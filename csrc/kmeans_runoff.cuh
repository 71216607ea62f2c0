// Which of two centres the rows belong to that the tensor cores left in doubt, and whether it can be a third.
#pragma once

#include "device.cuh"
#include "kmeans_assign.cuh"
#include "kmeans_exact.cuh"

namespace ccl_fast {

constexpr double kDoubleUnit = 0x1p-53;  // unit roundoff of float64

// One warp takes one row of the list at a time: the label and its rival are compared in float64, and if the lower bound
// of all other scores is above the better one's, that is the label. Otherwise the row is appended to `open`. As the
// better score is exact by now, only the others' errors are left in the way: most rows are decided here.
template <class T>
__global__ void __launch_bounds__(256)
    runoff_kernel(const T* __restrict__ x, const float* __restrict__ centers, int64_t rows, int64_t clusters, int64_t d,
                  bool cosine, const float* __restrict__ origin, const float* __restrict__ scale,
                  const int32_t* __restrict__ unsure, const int32_t* __restrict__ rivals, const float* __restrict__ others,
                  const int32_t* __restrict__ unsure_count, int64_t* __restrict__ labels, int32_t* __restrict__ open,
                  int32_t* __restrict__ open_count) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = blockDim.x / 32, count = *unsure_count;
  // Relative error of a float64 sum of d products, twice for each of two that are compared.
  const double rounding = 4 * kDoubleUnit * double(d + 16);
  for (int64_t listed = blockIdx.x * warps + threadIdx.x / 32; listed < count; listed += gridDim.x * warps) {
    const int64_t row = unsure[listed], problem = row / rows, label = labels[row], rival = rivals[listed];
    const T* const from = x + row * d;
    const float* const to = centers + problem * clusters * d;
    Exact found = {exact_score(from, to + label * d, d, cosine), label};
    found.merge(exact_score(from, to + rival * d, d, cosine), rival);

    // The same score in the units of the bounds: of the packed row, and for |c|^2 / 2 - <x, c>.
    double square = 0.0;
    for (int64_t j = lane; j < d; j += 32) {
      const double value = double(to_float(from[j])) - (origin ? double(origin[problem * d + j]) : 0.0);
      square += value * value;
    }
    square = warp_sum(square);
    const double unit = double(scale[problem]) * double(scale[problem]);
    double score, magnitude;
    if (cosine) {
      score = square > 0.0 ? unit * (found.score / sqrt(square)) : 0.0;
      magnitude = unit;
    } else {
      score = unit * 0.5 * (found.score - square);
      magnitude = unit * 0.5 * (found.score + square);
    }
    score += rounding * magnitude;
    if (lane == 0) {
      labels[row] = found.label;
      // A centre whose score overflows float32 is in no bound.
      if (!(double(others[listed]) > score && score < double(kMostScore)))
        open[atomic_add(open_count, 1)] = int32_t(row);
    }
  }
}

}  // namespace ccl_fast
