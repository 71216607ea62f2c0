// Scores in float64, and the better of two centres by them.
#pragma once

#include "device.cuh"
#include "kmeans_pack.cuh"

namespace ccl_fast {

// Float64 score of a row and a centre: |x - c|^2, or -<x, c> / |c| for the cosine (0 for a zero centre). One warp; the
// order of the sum depends on d alone, so equal centres have equal scores.
template <class T>
__device__ double exact_score(const T* x, const float* center, int64_t d, bool cosine) {
  double sum = 0.0, square = 0.0;
  for (int64_t j = threadIdx.x % 32; j < d; j += 32) {
    const double value = to_float(x[j]), c = center[j];
    sum += cosine ? value * c : (value - c) * (value - c);
    square += c * c;
  }
  sum = warp_sum(sum);
  if (!cosine) return sum;
  square = warp_sum(square);
  return square > 0.0 ? -sum / sqrt(square) : 0.0;
}

struct Exact {
  double score;
  int64_t label;

  __device__ __forceinline__ void merge(double other, int64_t index) {
    if (other < score || (other == score && index < label)) score = other, label = index;
  }
};

}  // namespace ccl_fast
