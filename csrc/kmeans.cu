#include "kmeans.h"

#include "device.cuh"
#include "kmeans_assign.cuh"
#include "kmeans_distance.cuh"
#include "kmeans_pack.cuh"
#include "kmeans_runoff.cuh"
#include "kmeans_recheck.cuh"
#include "kmeans_update.cuh"

using namespace ccl_fast;

namespace {

constexpr int64_t kWarpsPerBlock = 8;

dim3 grid(int64_t x, int64_t y = 1) { return dim3(unsigned(x), unsigned(y), 1); }

int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Calls f with a null pointer of the element type that `dtype` names.
template <class F>
int with_dtype(int dtype, F f) {
  switch (dtype) {
    case CCL_FLOAT32: return f(static_cast<const float*>(nullptr));
    case CCL_FLOAT16: return f(static_cast<const half_t*>(nullptr));
    default: return f(static_cast<const bfloat16_t*>(nullptr));
  }
}

}  // namespace

static_assert(CCL_PAD_COLUMNS == kStep && CCL_PAD_CENTERS == kTile, "the interface promises these paddings");

int ccl_kmeans_pack(const void* x, int dtype, int64_t problems, int64_t rows, int64_t d, int metric, const float* origin,
                    const float* scale, int64_t padded_rows, int64_t padded_d, void* packed, float* norm, float* residue,
                    float* half_square, int device, void* stream) {
  DeviceGuard guard(device);
  return with_dtype(dtype, [&](auto type) {
    return launch(pack_kernel<std::decay_t<decltype(*type)>>, grid(blocks_of(padded_rows, kWarpsPerBlock), problems), 256,
                  0, stream, static_cast<decltype(type)>(x), rows, d, metric == CCL_COSINE, origin, scale, padded_rows,
                  padded_d, static_cast<half_t*>(packed), norm, residue, half_square);
  });
}

int ccl_kmeans_assign(const void* x, const float* x_norm, const float* x_residue, const void* centers,
                      const float* half_square, const float* tile_norm, const float* tile_residue, int64_t problems,
                      int64_t rows, int64_t padded_clusters, int64_t padded_d, int64_t* labels, int32_t* unsure,
                      int32_t* rivals, float* others, int32_t* unsure_count, int device, void* stream) {
  DeviceGuard guard(device);
  // Tensor cores add 8 or 16 exact products to the sum so far, and may truncate each of these 9 or 17 numbers, or the
  // others and the result, to the digits that the largest has in float32: twice its unit roundoff. Then come the rounding
  // of half_square, that of the subtraction from it, the index in the score's last bits, and the rounding of the bound.
  constexpr double truncation = 2 * kFloatUnit, index = truncation * kScores;
  const double first_order = truncation * (9.0 / 8.0 * double(padded_d) + 2) + index;
  const float gamma = float(kRoundUp * first_order / (1 - first_order)), rho = float(2 * truncation + index);
  const int64_t steps = padded_d / kStep;
  // 96 KB fit into every GPU from sm_80 on: three steps of centres and up to three of rows, or three of both.
  const bool resident = steps <= 3;
  const size_t bytes = kTileBytes * (resident ? steps + kStages : 2 * kStages);
  auto run = [&](auto kernel) {
    return launch(kernel, grid(blocks_of(rows, kTile), problems), kThreads, bytes, stream, static_cast<const half_t*>(x),
                  x_norm, x_residue, static_cast<const half_t*>(centers), half_square, tile_norm, tile_residue, rows,
                  padded_clusters, padded_d, gamma, rho, labels, unsure, rivals, others, unsure_count);
  };
  return resident ? run(assign_kernel<true>) : run(assign_kernel<false>);
}

int ccl_kmeans_runoff(const void* x, int dtype, const float* centers, int64_t rows, int64_t clusters, int64_t d, int metric,
                      const float* origin, const float* scale, const int32_t* unsure, const int32_t* rivals,
                      const float* others, const int32_t* unsure_count, int64_t* labels, int32_t* open, int32_t* open_count,
                      int64_t blocks, int device, void* stream) {
  DeviceGuard guard(device);
  return with_dtype(dtype, [&](auto type) {
    return launch(runoff_kernel<std::decay_t<decltype(*type)>>, grid(blocks), 32 * kWarpsPerBlock, 0, stream,
                  static_cast<decltype(type)>(x), centers, rows, clusters, d, metric == CCL_COSINE, origin, scale, unsure,
                  rivals, others, unsure_count, labels, open, open_count);
  });
}

int ccl_kmeans_recheck(const void* x, int dtype, const float* centers, int64_t rows, int64_t clusters, int64_t d,
                       int metric, const int32_t* open, const int32_t* open_count, int64_t* labels, int64_t blocks,
                       int device, void* stream) {
  DeviceGuard guard(device);
  return with_dtype(dtype, [&](auto type) {
    return launch(recheck_kernel<std::decay_t<decltype(*type)>>, grid(blocks), kRecheckWarps * 32,
                  sizeof(Exact) * kRecheckWarps * kRecheckRows, stream, static_cast<decltype(type)>(x), centers, rows,
                  clusters, d, metric == CCL_COSINE, open, open_count, labels);
  });
}

int ccl_kmeans_update(const void* x, int dtype, int64_t clusters, int64_t d, const int64_t* order, const int64_t* offsets,
                      const int64_t* piece_offsets, int64_t pieces, const float* weights, double* partial,
                      double* partial_weight, double* sums, double* total_weight, int device, void* stream) {
  DeviceGuard guard(device);
  const int error = with_dtype(dtype, [&](auto type) {
    return launch(sum_pieces_kernel<std::decay_t<decltype(*type)>>, grid(pieces), kUpdateThreads, 0, stream,
                  static_cast<decltype(type)>(x), clusters, d, order, offsets, piece_offsets, weights, partial,
                  partial_weight);
  });
  if (error) return error;
  return launch(sum_clusters_kernel, grid(clusters), kUpdateThreads, 0, stream, d, piece_offsets,
                static_cast<const double*>(partial), static_cast<const double*>(partial_weight), sums, total_weight);
}

int ccl_kmeans_distance(const void* x, int dtype, const float* centers, const int64_t* labels, int64_t problems,
                        int64_t rows, int64_t clusters, int64_t d, int metric, float* distance, int device, void* stream) {
  DeviceGuard guard(device);
  return with_dtype(dtype, [&](auto type) {
    return launch(distance_kernel<std::decay_t<decltype(*type)>>, grid(blocks_of(rows, kWarpsPerBlock), problems), 256, 0,
                  stream, static_cast<decltype(type)>(x), centers, labels, rows, clusters, d, metric == CCL_COSINE,
                  distance);
  });
}

const char* ccl_error_string(int code) { return error_string(code); }
