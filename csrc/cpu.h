// What the CPU extension computes: C++ without torch, compiled once for every width of vectors.
#pragma once

#include <cstdint>

namespace ccl_fast {

// Centres [k, d], and the same as `aim` makes them.
struct Centers {
  const float* plain;
  int64_t k;
  bool cosine;
  const float *aimed, *bias;
  float length;  // the largest
  // What scores of float32 are off by at most, in units of |c| (|x| + |c| / 2), and twice those of float64, in units of
  // (|x| + |c|)^2, as above rows and centres moved and scaled.
  float rounding, exact_rounding;
};

// What one instruction set brings. All rows are [n, d] with `stride` entries from one to the next.
struct Cpu {
  int bytes;  // of a vector
  bool (*runs_here)();
  // How many rows and centres a panel has.
  int rows;
  int centers;

  // Rows less the origin (none is 0) and times the scale as panels [n / rows, rounded up][d][rows]; what is missing from
  // the last one is 0. And their lengths [n].
  void (*pack)(const float* x, int64_t stride, int64_t n, int64_t d, const float* origin, float scale, float* panels,
               float* length);

  // Minus the centres [k, d] likewise, in panels of `centers`, and what their scores begin with, `bias` [k, rounded up to
  // whole panels]: half of their squares, or 0 for the cosine. Returns the largest length, NaN if one is.
  float (*aim)(const float* centers, int64_t k, int64_t d, const float* origin, float scale, bool cosine, float* panels,
               float* bias);

  // The labels [n] of rows that are packed too: the nearest of the centres, first by the lowest bias - <row, center>. Rows
  // that have a second score within the rounding of the lowest, or no lowest score, as with NaN, are decided in float64:
  // by the lowest |x - c|^2, or for the cosine -<x, c> / |c|, 0 for a zero centre, the first of several. Returns how many
  // these are. `state` [4 * n, rounded up to whole panels] is working memory.
  int64_t (*nearest)(const float* x, int64_t stride, int64_t n, int64_t d, const float* panels, const float* length,
                     const Centers& centers, float* state, int64_t* labels);

  // Adds row after row, times its weight [n] (none is 1), to the sum [k, d] of its label [n], and the weight to the
  // label's total [k].
  void (*add)(const float* x, int64_t stride, int64_t n, int64_t d, const float* weights, const int64_t* labels,
              double* sums, double* totals);

  // The squared distance of every row to the centre [k, d] of its label.
  void (*distance)(const float* x, int64_t stride, int64_t n, int64_t d, const float* centers, const int64_t* labels,
                   float* distances);

  // Rows [n, d] of length 1, or 0 for rows of zeros, and 1 / length [n], 0 for rows of zeros. Of a row whose largest entry,
  // rounded down to a power of two, is below 1 / the largest inverse, the length is as if that power were.
  void (*unit_rows)(const float* x, int64_t stride, int64_t n, int64_t d, double largest_inverse, float* unit,
                    float* inverse);

  // Of logits [n, n], within -80 and 80, the sum of losses and, in their place, its derivatives. Row i is contrasted with
  // column (i + shift) mod n, its positive, among all columns, but for column i if shift is not 0: then rows meet rows, and
  // the derivative at a pair is that by both of its logits. If it is 0, `both` also contrasts columns with rows. `state`
  // [4 * n] is working memory.
  double (*contrast)(float* logits, int64_t n, int64_t shift, bool both, float* state);

  // The same of rows and centres, logits [n, m], m >= n: the positives of row i are the other rows of its group [n] and,
  // unless `center` [n] is below 0, that column, with a weight. Their mean is taken of the logits, or with `inside` of the
  // exponentials. A row that has no positive has no loss; `present` counts the others. `state` [2 * n].
  double (*supervised)(float* logits, int64_t n, int64_t m, const int32_t* group, const int32_t* center,
                       float center_weight, bool inside, float* state, int64_t* present);

  // (g - <g, u> u) / length, the gradient [n, d] of rows, given that of their unit rows and the inverses.
  void (*unit_rows_gradient)(const float* gradient, int64_t stride, int64_t n, int64_t d, const float* unit,
                             const float* inverse, float* result);
};

extern const Cpu cpu_512, cpu_256, cpu_128;  // the first two on x86-64 alone

}  // namespace ccl_fast
