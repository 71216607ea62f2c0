// The exact arg-min of the rows that not even the comparison of two centres could decide.
#pragma once

#include "device.cuh"
#include "kmeans_exact.cuh"

namespace ccl_fast {

constexpr int kRecheckRows = 4;  // rows that share one reading of the centres
constexpr int kRecheckWarps = 8;
constexpr float kLeastSquare = 1e-30f, kMostSquare = 1e38f;  // sums of squares whose relative rounding is float32's

template <class T>
__global__ void __launch_bounds__(kRecheckWarps * 32, 2)
    recheck_kernel(const T* __restrict__ x, const float* __restrict__ centers, int64_t rows, int64_t clusters, int64_t d,
                   bool cosine, const int32_t* __restrict__ open, const int32_t* __restrict__ open_count,
                   int64_t* __restrict__ labels) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t count = *open_count;
  const float unit = float(kFloatUnit) * float(d + 16);  // relative error of a float32 sum of d products, and some more
  for (int64_t group = blockIdx.x; group * kRecheckRows < count; group += gridDim.x) {
    const T* row_of[kRecheckRows];
    const float* centers_of[kRecheckRows];
    Exact found[kRecheckRows];
    float length[kRecheckRows];
#pragma unroll
    for (int r = 0; r < kRecheckRows; ++r) {
      // The last group repeats the last row, to no harm: it finds the same label.
      const int64_t listed = group * kRecheckRows + r < count ? group * kRecheckRows + r : count - 1;
      const int64_t row = open[listed];
      row_of[r] = x + row * d;
      centers_of[r] = centers + row / rows * clusters * d;
      const int64_t guess = labels[row];
      found[r] = {exact_score(row_of[r], centers_of[r] + guess * d, d, cosine), guess};
      double square = 0.0;
      for (int64_t j = lane; j < d; j += 32) square += double(to_float(row_of[r][j])) * double(to_float(row_of[r][j]));
      length[r] = float(sqrt(warp_sum(square)));
    }
    for (int64_t k = warp; k < clusters; k += kRecheckWarps) {
      float sum[kRecheckRows] = {}, square[kRecheckRows] = {};
      for (int64_t j = lane; j < d; j += 32)
#pragma unroll
        for (int r = 0; r < kRecheckRows; ++r) {
          const float value = to_float(row_of[r][j]), c = centers_of[r][k * d + j];
          const float difference = value - c;
          sum[r] = cosine ? fmaf(value, c, sum[r]) : fmaf(difference, difference, sum[r]);
          square[r] = fmaf(c, c, square[r]);
        }
#pragma unroll
      for (int r = 0; r < kRecheckRows; ++r) {
        sum[r] = warp_sum(sum[r]);
        float lowest = sum[r] * (1.0f - unit), least = sum[r], most = sum[r];
        if (cosine) {
          const float center_square = warp_sum(square[r]), inverse = 1.0f / sqrtf(center_square);
          least = fminf(center_square, length[r] * length[r]);
          most = fmaxf(center_square, length[r] * length[r]);
          lowest = -sum[r] * inverse - unit * length[r] - float(d) * 2e-45f * inverse;  // the last for underflow
        }
        // Squares that over- or underflow float32 say nothing.
        const bool usable = least > kLeastSquare && most < kMostSquare && isfinite(lowest);
        if (!usable || !(lowest > found[r].score))
          found[r].merge(exact_score(row_of[r], centers_of[r] + k * d, d, cosine), k);
      }
    }
    Exact* const shared = reinterpret_cast<Exact*>(shared_memory());
    if (lane == 0)
#pragma unroll
      for (int r = 0; r < kRecheckRows; ++r) shared[warp * kRecheckRows + r] = found[r];
    barrier();
    if (threadIdx.x < kRecheckRows) {
      Exact best = shared[threadIdx.x];
      for (int other = 1; other < kRecheckWarps; ++other) {
        const Exact& candidate = shared[other * kRecheckRows + threadIdx.x];
        best.merge(candidate.score, candidate.label);
      }
      const int64_t listed = group * kRecheckRows + threadIdx.x;
      if (listed < count) labels[open[listed]] = best.label;
    }
    barrier();  // before the next group writes
  }
}

}  // namespace ccl_fast
