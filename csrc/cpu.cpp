// The steps of k-means. Scores of a panel of rows and a panel of centres stay in registers: the next pass over them would cost as much as the
// product. A vector has one entry of many rows, so that the lowest score of each is kept without leaving its lane.
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
                          unit_rows, unit_rows_gradient};

}  // namespace ccl_fast
