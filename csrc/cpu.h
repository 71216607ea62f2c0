// What the CPU extension computes: C++ without torch, compiled once for every width of vectors.
#pragma once

#include <cstdint>

namespace ccl_fast {

// What one instruction set brings. All rows are [n, d] with `stride` entries from one to the next.
struct Cpu {
  int bytes;  // of a vector
  bool (*runs_here)();
  // How many rows and centres a panel has.
  int rows;
  int centers;

  // Rows less the origin (none is 0) and times the scale as panels [n / width, rounded up][d][width]; what is missing from
  // the last one is 0. And their lengths [n], unless that is null.
  void (*pack)(const float* x, int64_t stride, int64_t n, int64_t d, const float* origin, float scale, int64_t width,
               float* panels, float* length);

  // Of rows in panels the nearest of the k centres in panels, by the lowest half_square - <row, center>, whose centres are
  // negative already. Writes labels [n], and to `unsure` [n] the numbers of those rows that have a second score within
  // their margin [n] of the lowest, or no lowest score, as with NaN; returns how many these are. `state` [3 * n, rounded
  // up to whole panels] is working memory.
  int64_t (*nearest)(const float* rows, int64_t n, int64_t d, const float* centers, const float* half_square, int64_t k,
                     const float* margin, float* state, int64_t* labels, int32_t* unsure);

  // Of those rows whose numbers these are, `count`, the nearest of the centres [k, d] in float64, the first of several: by
  // |x - c|^2, or for the cosine by -<x, c> / |c|, 0 for a zero centre.
  void (*decide)(const float* x, int64_t stride, const int32_t* numbers, int64_t count, int64_t d, const float* centers,
                 int64_t k, bool cosine, int64_t* labels);

  // Adds row after row, times its weight [n] (none is 1), to the sum [k, d] of its label [n].
  void (*add)(const float* x, int64_t stride, int64_t n, int64_t d, const float* weights, const int64_t* labels,
              double* sums);

  // The squared distance of every row to the centre [k, d] of its label.
  void (*distance)(const float* x, int64_t stride, int64_t n, int64_t d, const float* centers, const int64_t* labels,
                   float* distances);

  // Rows [n, d] of length 1, or 0 for rows of zeros, and 1 / length [n], 0 for rows of zeros. Of a row whose largest entry,
  // rounded down to a power of two, is below 1 / the largest inverse, the length is as if that power were.
  void (*unit_rows)(const float* x, int64_t stride, int64_t n, int64_t d, double largest_inverse, float* unit,
                    float* inverse);

  // (g - <g, u> u) / length, the gradient [n, d] of rows, given that of their unit rows and the inverses.
  void (*unit_rows_gradient)(const float* gradient, int64_t stride, int64_t n, int64_t d, const float* unit,
                             const float* inverse, float* result);
};

extern const Cpu cpu_512, cpu_256, cpu_128;  // the first two on x86-64 alone

}  // namespace ccl_fast
