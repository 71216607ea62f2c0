// K-means on the device: the C interface. Pointers are device memory, sizes count elements, and every function runs on
// `stream` of `device` without waiting for it. They return 0, or an error code for ccl_error_string.
//
// A batch holds `problems` independent clusterings: x [problems, rows, d], centers [problems, clusters, d], row-major.
#pragma once

#include <cstdint>

extern "C" {

enum ccl_dtype { CCL_FLOAT32 = 0, CCL_FLOAT16 = 1, CCL_BFLOAT16 = 2 };
enum ccl_metric { CCL_EUCLIDEAN = 0, CCL_COSINE = 1 };

// Rows are packed for the tensor cores to a multiple of this many columns, centres to a multiple of this many rows.
enum ccl_padding { CCL_PAD_COLUMNS = 64, CCL_PAD_CENTERS = 128 };

// packed [problems, padded_rows, padded_d]: float16 of scale * (x - origin), or of scale * x / |x| for the cosine.
// norm, residue [problems, padded_rows]: upper bounds of |packed row| and of its distance from the exact scaled row.
// half_square [problems, padded_rows]: what a centre's score starts from, half the squared length of the exact scaled
// row, or 0 for the cosine; infinite in rows beyond `rows`, which are zero in packed. origin [problems, d] and scale [problems], a power of two.
int ccl_kmeans_pack(const void* x, int dtype, int64_t problems, int64_t rows, int64_t d, int metric, const float* origin,
                    const float* scale, int64_t padded_rows, int64_t padded_d, void* packed, float* norm, float* residue,
                    float* half_square, int device, void* stream);

// Nearest centre of packed rows. tile_norm, tile_residue [problems, padded_clusters / 128]: the largest norm + residue,
// and the largest residue, of the centres of a tile. Writes every label; rows whose label rounding could have changed
// are listed in `unsure` (their index in the whole batch) and counted in `unsure_count`, which the caller has set to 0.
// Beside each stands in `rivals` the one centre that is most likely to be nearer than its label, and in `others` a lower
// bound of |c|^2 / 2 - <x, c>, in the units of the packed row, of all centres but these two. padded_d is at most 2^20.
int ccl_kmeans_assign(const void* x, const float* x_norm, const float* x_residue, const void* centers,
                      const float* half_square, const float* tile_norm, const float* tile_residue, int64_t problems,
                      int64_t rows, int64_t padded_clusters, int64_t padded_d, int64_t* labels, int32_t* unsure,
                      int32_t* rivals, float* others, int32_t* unsure_count, int device, void* stream);

// The nearer, in float64, of the label and the rival of every row that ccl_kmeans_assign has listed; lowest index on ties.
// Rows where `others` does not exclude all other centres by then are listed in `open` and counted in `open_count`, which
// the caller has set to 0. origin and scale are those of ccl_kmeans_pack. `blocks` blocks share the list.
int ccl_kmeans_runoff(const void* x, int dtype, const float* centers, int64_t rows, int64_t clusters, int64_t d, int metric,
                      const float* origin, const float* scale, const int32_t* unsure, const int32_t* rivals,
                      const float* others, const int32_t* unsure_count, int64_t* labels, int32_t* open, int32_t* open_count,
                      int64_t blocks, int device, void* stream);

// The exact arg-min of the listed rows, lowest index on ties: float32 with an error bound, float64 where it decides.
// Starts from the labels that are there. `blocks` blocks share the list.
int ccl_kmeans_recheck(const void* x, int dtype, const float* centers, int64_t rows, int64_t clusters, int64_t d,
                       int metric, const int32_t* open, const int32_t* open_count, int64_t* labels, int64_t blocks,
                       int device, void* stream);

// Sums of rows by cluster. order [rows]: row numbers sorted by cluster; offsets [clusters + 1]: where each begins;
// piece_offsets [clusters + 1]: the same in pieces of at most 256 rows; weights [rows] or null;
// partial float64 [pieces, d] and partial_weight float64 [pieces]: work space for `pieces` of them, at least the last
// entry of piece_offsets. Writes sums [clusters, d] and total_weight [clusters].
int ccl_kmeans_update(const void* x, int dtype, int64_t clusters, int64_t d, const int64_t* order, const int64_t* offsets,
                      const int64_t* piece_offsets, int64_t pieces, const float* weights, double* partial,
                      double* partial_weight, double* sums, double* total_weight, int device, void* stream);

// distance [problems, rows]: |x - c|^2, or 1 - cos(x, c) (1 if either is zero), to the centre of the row's label.
int ccl_kmeans_distance(const void* x, int dtype, const float* centers, const int64_t* labels, int64_t problems,
                        int64_t rows, int64_t clusters, int64_t d, int metric, float* distance, int device, void* stream);

const char* ccl_error_string(int code);
}
