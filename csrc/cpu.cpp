// The steps of k-means, unit rows, the losses of small batches. Scores of a panel of rows and a panel of centres stay in
// registers: the next pass over them would cost as much as the product. A vector has one entry of many rows, so that the
// lowest score of each is kept without leaving its lane.
#include "cpu.h"

// No templates of the standard library: of several copies of one the linker keeps any, which may be the widest vectors'.

#ifndef CCL_FAST_BYTES
#error "CCL_FAST_BYTES: the bytes of a vector, 16, 32 or 64"
#endif

namespace ccl_fast {
namespace {

constexpr int LANES = CCL_FAST_BYTES / 4;
// Sums in registers: VECTORS x CENTERS, of 32 registers with AVX-512 and 16 below.
constexpr int VECTORS = 3;
constexpr int ROWS = VECTORS * LANES;
constexpr int CENTERS = CCL_FAST_BYTES == 64 ? 8 : 4;
// Centres that are met by all rows before the next: they should stay in the second cache.
constexpr int64_t CACHED_BYTES = 1 << 18;
// What underflow may take of a product of float32.
constexpr float LEAST = 1.1754944e-38f;

typedef float Floats __attribute__((vector_size(CCL_FAST_BYTES)));
typedef int32_t Ints __attribute__((vector_size(CCL_FAST_BYTES)));
typedef float HalfFloats __attribute__((vector_size(CCL_FAST_BYTES / 2), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(CCL_FAST_BYTES)));
typedef Floats AnyFloats __attribute__((aligned(4), may_alias));
typedef Ints AnyInts __attribute__((aligned(4), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const AnyFloats*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<AnyFloats*>(to) = x; }
inline Doubles load_doubles(const float* from) {
  return __builtin_convertvector(*reinterpret_cast<const HalfFloats*>(from), Doubles);
}
inline Floats spread(float x) { return x - Floats{}; }

struct Lowest {
  Floats score[VECTORS], second[VECTORS];
  Ints center[VECTORS];
};

// Comparisons with NaN are false, so that it is never the lowest nor the second.
inline void meet(const float* rows, int64_t d, const float* centers, const float* bias, int32_t first,
                 Lowest& lowest) {
  Floats sum[CENTERS][VECTORS];
  for (int c = 0; c < CENTERS; ++c)
    for (int v = 0; v < VECTORS; ++v) sum[c][v] = spread(bias[c]);
  for (int64_t p = 0; p < d; ++p, rows += ROWS, centers += CENTERS) {
    Floats x[VECTORS];
    for (int v = 0; v < VECTORS; ++v) x[v] = load(rows + v * LANES);
    for (int c = 0; c < CENTERS; ++c) {
      const Floats y = spread(centers[c]);
      for (int v = 0; v < VECTORS; ++v) sum[c][v] += x[v] * y;
    }
  }
  for (int c = 0; c < CENTERS; ++c)
    for (int v = 0; v < VECTORS; ++v) {
      const Floats s = sum[c][v], before = lowest.score[v];
      const auto less = s < before;
      const Floats other = less ? before : s;
      lowest.second[v] = other < lowest.second[v] ? other : lowest.second[v];
      lowest.score[v] = less ? s : before;
      lowest.center[v] = less ? (first + c) - Ints{} : lowest.center[v];
    }
}

// The order of the sum depends on d alone, so that equal centres have equal scores.
double exact_score(const float* x, const float* center, int64_t d, bool cosine) {
  Doubles sums{}, squares{};
  double sum = 0.0, square = 0.0;
  int64_t p = 0;
  for (; p + LANES / 2 <= d; p += LANES / 2) {
    const Doubles value = load_doubles(x + p), c = load_doubles(center + p);
    sums += cosine ? value * c : (value - c) * (value - c);
    squares += c * c;
  }
  for (; p < d; ++p) {
    const double value = x[p], c = center[p];
    sum += cosine ? value * c : (value - c) * (value - c);
    square += c * c;
  }
  for (int lane = 0; lane < LANES / 2; ++lane) sum += sums[lane], square += squares[lane];
  if (!cosine) return sum;
  return square > 0.0 ? -sum / __builtin_sqrt(square) : 0.0;
}

int64_t exact_nearest(const float* x, int64_t d, const Centers& centers) {
  double lowest = __builtin_inf();
  int64_t label = 0;
  for (int64_t c = 0; c < centers.k; ++c) {
    const double score = exact_score(x, centers.plain + c * d, d, centers.cosine);
    if (score < lowest) lowest = score, label = c;
  }
  return label;
}

int64_t nearest(const float* x, int64_t stride, int64_t n, int64_t d, const float* panels, const float* length,
                const Centers& centers, float* state, int64_t* labels) {
  const int64_t row_panels = (n + ROWS - 1) / ROWS, center_panels = (centers.k + CENTERS - 1) / CENTERS;
  const int64_t padded = row_panels * ROWS;
  float *scores = state, *seconds = state + padded;
  int32_t* found = reinterpret_cast<int32_t*>(state + 2 * padded);
  int32_t* unsure = reinterpret_cast<int32_t*>(state + 3 * padded);
  for (int64_t i = 0; i < 2 * padded; ++i) state[i] = __builtin_inff();
  for (int64_t i = 0; i < padded; ++i) found[i] = 0;
  const int64_t at_once = 1 + CACHED_BYTES / (d * CENTERS * int64_t(sizeof(float)));
  for (int64_t start = 0; start < center_panels; start += at_once) {
    const int64_t end = start + at_once < center_panels ? start + at_once : center_panels;
    for (int64_t panel = 0; panel < row_panels; ++panel) {
      const int64_t row = panel * ROWS;
      Lowest lowest;
      for (int v = 0; v < VECTORS; ++v) {
        lowest.score[v] = load(scores + row + v * LANES);
        lowest.second[v] = load(seconds + row + v * LANES);
        lowest.center[v] = *reinterpret_cast<const AnyInts*>(found + row + v * LANES);
      }
      for (int64_t c = start; c < end; ++c)
        meet(panels + row * d, d, centers.aimed + c * CENTERS * d, centers.bias + c * CENTERS, int32_t(c * CENTERS),
             lowest);
      for (int v = 0; v < VECTORS; ++v) {
        store(scores + row + v * LANES, lowest.score[v]);
        store(seconds + row + v * LANES, lowest.second[v]);
        *reinterpret_cast<AnyInts*>(found + row + v * LANES) = lowest.center[v];
      }
    }
  }
  // Twice the rounding, for the largest centre, as half of its square is in its score too; and what underflow may take.
  const float fixed = centers.length * centers.length * (centers.rounding + centers.exact_rounding) + d * LEAST;
  const float per_length = 2.0f * centers.length * (centers.rounding + centers.exact_rounding);
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float margin = fixed + length[i] * (per_length + length[i] * centers.exact_rounding);
    labels[i] = found[i];
    unsure[count] = int32_t(i);
    count += !(seconds[i] > scores[i] + margin);
  }
  for (int64_t i = 0; i < count; ++i) labels[unsure[i]] = exact_nearest(x + unsure[i] * stride, d, centers);
  return count;
}

// A panel of n <= WIDTH rows, and the squares [WIDTH] of their lengths.
template <int WIDTH>
void pack_panel(const float* x, int64_t stride, int64_t n, int64_t d, const float* origin, float scale, float* panel,
                double* square) {
  for (int64_t i = 0; i < WIDTH; ++i) {
    const float* row = x + i * stride;
    for (int64_t p = 0; p < d; ++p)
      panel[p * WIDTH + i] = i >= n ? 0.0f : origin ? (row[p] - origin[p]) * scale : row[p] * scale;
  }
  // Of all rows side by side: a sum along one would wait for itself.
  for (int64_t i = 0; i < WIDTH; ++i) square[i] = 0.0;
  for (int64_t p = 0; p < d; ++p, panel += WIDTH)
    for (int64_t i = 0; i < WIDTH; ++i) square[i] += double(panel[i]) * panel[i];
}

void pack(const float* x, int64_t stride, int64_t n, int64_t d, const float* origin, float scale, float* panels,
          float* length) {
  for (int64_t first = 0; first < n; first += ROWS) {
    double square[ROWS];
    pack_panel<ROWS>(x + first * stride, stride, n - first, d, origin, scale, panels + first * d, square);
    for (int64_t i = 0; i < ROWS && first + i < n; ++i) length[first + i] = float(__builtin_sqrt(square[i]));
  }
}

float aim(const float* centers, int64_t k, int64_t d, const float* origin, float scale, bool cosine, float* panels,
          float* bias) {
  double largest = 0.0;
  for (int64_t first = 0; first < k; first += CENTERS) {
    double square[CENTERS];
    pack_panel<CENTERS>(centers + first * d, d, k - first, d, origin, -scale, panels + first * d, square);
    for (int64_t i = 0; i < CENTERS; ++i) {
      // A centre that only fills its panel is never the nearest.
      bias[first + i] = first + i >= k ? __builtin_inff() : cosine ? 0.0f : float(0.5 * square[i]);
      if (largest == largest && !(square[i] <= largest)) largest = square[i];
    }
  }
  return float(__builtin_sqrt(largest));
}

void add(const float* x, int64_t stride, int64_t n, int64_t d, const float* weights, const int64_t* labels, double* sums,
         double* totals) {
  for (int64_t i = 0; i < n; ++i, x += stride) {
    double* sum = sums + labels[i] * d;
    const double weight = weights ? weights[i] : 1.0;
    totals[labels[i]] += weight;
    for (int64_t p = 0; p < d; ++p) sum[p] += weight * x[p];
  }
}

void distance(const float* x, int64_t stride, int64_t n, int64_t d, const float* centers, const int64_t* labels,
              float* distances) {
  for (int64_t i = 0; i < n; ++i, x += stride) {
    const float* center = centers + labels[i] * d;
    Floats sum{};
    int64_t p = 0;
    for (; p + LANES <= d; p += LANES) {
      const Floats difference = load(x + p) - load(center + p);
      sum += difference * difference;
    }
    float total = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
    for (; p < d; ++p) total += (x[p] - center[p]) * (x[p] - center[p]);
    distances[i] = total;
  }
}

// Squares of float32 neither over- nor underflow in float64.
double square(const float* x, int64_t d) {
  Doubles sums{};
  double sum = 0.0;
  int64_t p = 0;
  for (; p + LANES / 2 <= d; p += LANES / 2) {
    const Doubles value = load_doubles(x + p);
    sums += value * value;
  }
  for (; p < d; ++p) sum += double(x[p]) * x[p];
  for (int lane = 0; lane < LANES / 2; ++lane) sum += sums[lane];
  return sum;
}

void unit_rows(const float* x, int64_t stride, int64_t n, int64_t d, double largest_inverse, float* unit, float* inverse) {
  for (int64_t i = 0; i < n; ++i, x += stride, unit += d) {
    const double length = __builtin_sqrt(square(x, d));
    // Of a row that holds an infinity every entry is NaN, as of one that holds NaN.
    const double factor = length == 0.0 ? 0.0 : length < __builtin_inf() ? 1.0 / length : __builtin_nan("");
    for (int64_t p = 0; p < d; ++p) unit[p] = float(x[p] * factor);
    inverse[i] = float(factor);
    if (length * largest_inverse < 2.0 * __builtin_sqrt(double(d))) {
      double largest = 0.0;
      for (int64_t p = 0; p < d; ++p) largest = x[p] > largest ? x[p] : -x[p] > largest ? -x[p] : largest;
      const double power = largest > 0.0 ? __builtin_ldexp(1.0, __builtin_ilogb(largest)) : 0.0;
      if (power * largest_inverse < 1.0) inverse[i] = float(factor * power * largest_inverse);
    }
  }
}

void unit_rows_gradient(const float* gradient, int64_t stride, int64_t n, int64_t d, const float* unit,
                        const float* inverse, float* result) {
  for (int64_t i = 0; i < n; ++i, gradient += stride, unit += d, result += d) {
    Floats sums{};
    float along = 0.0f;
    int64_t p = 0;
    for (; p + LANES <= d; p += LANES) sums += load(gradient + p) * load(unit + p);
    for (; p < d; ++p) along += gradient[p] * unit[p];
    for (int lane = 0; lane < LANES; ++lane) along += sums[lane];
    for (p = 0; p < d; ++p) result[p] = (gradient[p] - along * unit[p]) * inverse[i];
  }
}

// e^x to rounding, within -87 and 88; of NaN it is NaN.
inline Floats exponential(Floats x) {
  const Floats whole = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // of x / log 2, to the nearest
  const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = spread(1.9875691500e-4f);
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  const Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
  return p * (Floats)power;  // its bits
}

void exponentials(float* x, int64_t n) {
  int64_t p = 0;
  for (; p + LANES <= n; p += LANES) store(x + p, exponential(load(x + p)));
  float last[LANES] = {};
  for (int64_t i = p; i < n; ++i) last[i - p] = x[i];
  if (p < n) store(last, exponential(load(last)));
  for (int64_t i = p; i < n; ++i) x[i] = last[i - p];
}

// The sum of x [n], which is added to `sums` too, unless that is null.
float add_up(const float* x, int64_t n, float* sums) {
  Floats lanes{};
  int64_t p = 0;
  for (; p + LANES <= n; p += LANES) {
    const Floats value = load(x + p);
    lanes += value;
    if (sums) store(sums + p, load(sums + p) + value);
  }
  float total = 0.0f;
  for (; p < n; ++p) {
    total += x[p];
    if (sums) sums[p] += x[p];
  }
  for (int lane = 0; lane < LANES; ++lane) total += lanes[lane];
  return total;
}

double contrast(float* logits, int64_t n, int64_t shift, bool both, float* state) {
  float *share = state, *weight = state + n, *own = state + 2 * n, *column = state + 3 * n;
  double total = 0.0;
  for (int64_t i = 0; i < n; ++i) column[i] = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    float* row = logits + i * n;
    exponentials(row, n);
    // The positive is not in the sum: nothing cancels where it prevails.
    float& positive = row[(i + shift) % n];
    own[i] = positive, positive = 0.0f;
    if (shift) row[i] = 0.0f;
    const float rest = add_up(row, n, shift == 0 && both ? column : nullptr);
    share[i] = 1.0f / (rest + own[i]), weight[i] = rest * share[i];
    total += __builtin_log1pf(rest / own[i]);
  }
  if (shift == 0 && both)
    for (int64_t i = 0; i < n; ++i) {
      const float rest = column[i];
      column[i] = 1.0f / (rest + own[i]), weight[i] += rest * column[i];
      total += __builtin_log1pf(rest / own[i]);
    }
  const float* other = shift ? share : column;
  for (int64_t i = 0; i < n; ++i) {
    float* row = logits + i * n;
    const int64_t partner = (i + shift) % n;
    for (int64_t j = 0; j < n; ++j) row[j] *= share[i] + other[j];
    row[partner] = shift ? -(weight[i] + weight[partner]) : -weight[i];
  }
  return total;
}

// The sum of x [n] where the group is this one, and how many these are; or, not `same`, where it is another.
float sum_of_group(const float* x, const int32_t* group, int64_t n, int32_t own, bool same, int64_t* count) {
  Floats lanes{};
  Ints found{};
  float total = 0.0f;
  int64_t p = 0;
  for (; p + LANES <= n; p += LANES) {
    const Ints equal = *reinterpret_cast<const AnyInts*>(group + p) == own - Ints{}, chosen = same ? equal : ~equal;
    lanes += chosen ? load(x + p) : Floats{};
    found -= chosen;
  }
  *count = 0;
  for (; p < n; ++p)
    if ((group[p] == own) == same) total += x[p], ++*count;
  for (int lane = 0; lane < LANES; ++lane) total += lanes[lane], *count += found[lane];
  return total;
}

double supervised(float* logits, int64_t n, int64_t m, const int32_t* group, const int32_t* center, float center_weight,
                  bool inside, float* state, int64_t* present) {
  float *share = state, *weight = state + n;
  double total = 0.0;
  *present = 0;
  for (int64_t i = 0; i < n; ++i) {
    float* row = logits + i * m;
    float* own_center = center[i] < 0 ? nullptr : row + center[i];
    int64_t count, ignored;
    row[i] = 0.0f;
    const float positives = sum_of_group(row, group, n, group[i], true, &count);
    const float of_center = own_center ? *own_center : 0.0f;
    const float weights = float(--count) + (own_center ? center_weight : 0.0f);  // not itself
    count += own_center != nullptr;
    share[i] = weight[i] = 0.0f;
    exponentials(row, m);
    row[i] = 0.0f;
    if (count == 0) continue;
    // Of all but the positives: nothing cancels where they prevail.
    const float e_center = own_center ? *own_center : 0.0f;
    if (own_center) *own_center = 0.0f;
    const float rest = sum_of_group(row, group, n, group[i], false, &ignored) + add_up(row + n, m - n, nullptr);
    const float own = sum_of_group(row, group, n, group[i], true, &ignored) + e_center;
    const bool single = count == 1 && !inside;
    // The derivative at a single positive is minus the rest's share: its own exponential is in no sum.
    if (single)
      for (int64_t j = 0; j < n; ++j) row[j] = group[j] == group[i] ? 0.0f : row[j];
    else if (own_center)
      *own_center = e_center;
    if (inside && own == 0.0f) continue;
    share[i] = 1.0f / (rest + own);
    if (inside) {
      weight[i] = share[i] * (rest / own);
      total += __builtin_log1pf(rest / own);
    } else {
      const float mean = (positives + center_weight * of_center) / weights;
      weight[i] = (single ? rest * share[i] : 1.0f) / weights;
      total += single ? __builtin_log1pf(rest / __builtin_expf(mean)) : __builtin_logf(rest + own) - mean;
    }
    ++*present;
  }
  for (int64_t i = 0; i < n; ++i) {
    float* row = logits + i * m;
    for (int64_t j = 0; j < n; ++j) {
      const float of_pair = weight[i] + weight[j], all = row[j] * (share[i] + share[j]);
      const float positive = inside ? -row[j] * of_pair : all - of_pair;
      row[j] = group[j] == group[i] ? positive : all;
    }
    row[i] = 0.0f;
    const float e_center = center[i] < 0 ? 0.0f : row[center[i]];
    for (int64_t j = n; j < m; ++j) row[j] *= share[i];
    if (center[i] >= 0) row[center[i]] = inside ? -e_center * weight[i] : row[center[i]] - center_weight * weight[i];
  }
  return total;
}

#if CCL_FAST_BYTES == 64
#define CCL_FAST_CPU cpu_512
bool runs_here() { return __builtin_cpu_supports("avx512f"); }
#elif CCL_FAST_BYTES == 32
#define CCL_FAST_CPU cpu_256
bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
#define CCL_FAST_CPU cpu_128
bool runs_here() { return true; }
#endif

}  // namespace

const Cpu CCL_FAST_CPU = {CCL_FAST_BYTES, runs_here, ROWS, CENTERS, pack, aim, nearest, add, distance,
                          unit_rows, contrast, supervised, unit_rows_gradient};

}  // namespace ccl_fast
