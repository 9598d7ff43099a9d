// Products of many rows of input with fp32 and bf16 weights, for processors whose registers hold eight floats (AVX2
// with FMA).
//
// products.h adds up each output in sixteen sums: of the columns 0, 16, 32 ..., of 1, 17, 33 ..., and so
// on, a lane of a vector for each. That reads weights at the speed of the memory, but for many rows it
// is bound by loading. Here a lane is another output: a vector holds one column of eight rows of
// weights and is multiplied with an entry of the input. The sixteen sums of an output are kept apart
// and are added up in the same order, so that it does not depend, to the bit, on which way is taken.
//
// Weights lie by rows, as the model stores them. PANEL rows are turned around into a panel of floats, which stays
// in the second-level cache while all rows of input pass by; the part of one or some sums, in the first-level
// cache, passes GROUP tiles of input. Meanwhile the weights of the next panel are fetched from memory.

#pragma once

#include "operands.h"

#if defined(VECTORS_OF_EIGHT)

namespace {

const int64_t PANEL = 16;  // rows of weights of a panel
const int64_t ROWS = 6;    // rows of input, a tile, whose sums fit into the registers: 2 * 6 of 16
const int64_t GROUP = 8;   // tiles
const int64_t FETCH = 32;  // steps after which weights are fetched ahead

const int64_t MANY = 22;  // rows of input from which on this pays

// Eight rows of a matrix. Behind the last row of the matrix it is repeated; nobody uses the results.
struct Eight {
  const char* row[8];

  Eight(const Matrix& m, int64_t first) {
    const int64_t bytes = row_bytes(m);
    for (int64_t r = 0; r < 8; r++) {
      const int64_t number = std::min(first + r, m.rows - 1);
      row[r] = static_cast<const char*>(m.data) + number * bytes;
    }
  }

  // `count` rows of floats; the last one stands for those that are missing.
  Eight(const float* first, int64_t stride, int64_t count) {
    for (int64_t r = 0; r < 8; r++)
      row[r] = reinterpret_cast<const char*>(first + std::min(r, count - 1) * stride);
  }
};

// 16 bytes of rows r and r + 4, side by side.
INLINE __m256 two(const Eight& w, int r, int64_t at) {
  const __m128 low = _mm_loadu_ps(reinterpret_cast<const float*>(w.row[r] + at));
  const __m128 high = _mm_loadu_ps(reinterpret_cast<const float*>(w.row[r + 4] + at));
  return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}

// 32 bytes of eight rows, from `at` bytes on, turned around by groups of four bytes: each result has
// one group of all eight rows.
INLINE void turned(const Eight& w, int64_t at, __m256i* out) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    __m256 v[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) v[r] = two(w, r, at + 16 * half);
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
    out[4 * half] = _mm256_castpd_si256(_mm256_unpacklo_pd(a, c));
    out[4 * half + 1] = _mm256_castpd_si256(_mm256_unpackhi_pd(a, c));
    out[4 * half + 2] = _mm256_castpd_si256(_mm256_unpacklo_pd(b, d));
    out[4 * half + 3] = _mm256_castpd_si256(_mm256_unpackhi_pd(b, d));
  }
}

// `take(k, column)` for the columns of a unit from column c on, k = 0, 1, ... in order: as many as 32
// bytes of a row hold. A column is that of eight rows.
template <Format F>
struct Unit;

template <>
struct Unit<FP32> {
  static const int64_t columns = 8;
  template <class Take>
  static INLINE void each(const Eight& w, int64_t c, Take take) {
    __m256i v[8];
    turned(w, 4 * c, v);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) take(i, _mm256_castsi256_ps(v[i]));
  }
};

template <>
struct Unit<BF16> {
  static const int64_t columns = 16;
  template <class Take>
  static INLINE void each(const Eight& w, int64_t c, Take take) {
    __m256i v[8];
    turned(w, 2 * c, v);
    const __m256i upper = _mm256_set1_epi32(int32_t(0xffff0000u));
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      take(2 * i, _mm256_castsi256_ps(_mm256_slli_epi32(v[i], 16)));
      take(2 * i + 1, _mm256_castsi256_ps(_mm256_and_si256(v[i], upper)));
    }
  }
};

// Where the columns of the k-th sum begin in a panel of whole rows. A line is left free between sums, as the caches
// have few places for addresses that differ by a power of two.
INLINE int64_t place(int64_t k, int64_t steps) { return k * (steps + 1) * PANEL; }

// Rows n to n + 15 of a matrix, turned around: [SUMS, steps + 1, PANEL].
template <Format F>
void pack(const Matrix& m, int64_t n, float* panel) {
  const int64_t steps = m.stride / SUMS;
  for (int g = 0; g < 2; g++) {
    const Eight weights(m, n + 8 * g);
    float* sums[SUMS];
    for (int sum = 0; sum < SUMS; sum++) sums[sum] = panel + place(ORDER[sum], steps) + 8 * g;
    for (int64_t c = 0; c < m.stride; c += Unit<F>::columns) {
      float* const* out = sums + c % SUMS;
      const int64_t at = c / SUMS * PANEL;
      Unit<F>::each(weights, c, [&](int k, __m256 column) __attribute__((always_inline)) {
        _mm256_store_ps(out[k % SUMS] + at + k / SUMS * PANEL, column);
      });
    }
  }
}

typedef TilesOf<ROWS> Tiles;  // of five or six rows, as there are at least twenty

// How many sums are computed at a time, so that their weights and the input of a tile stay in the first-level cache.
inline int sums_together(int64_t steps) { return steps <= 16 ? SUMS : steps <= 64 ? 4 : steps <= 128 ? 2 : 1; }

// The input turned around as the panels are.
struct Turned {
  Tiles tiles;
  int64_t steps;
  float* data;
  PlacesOf<Tiles, GROUP> places{tiles, steps, sums_together(steps)};

  void fill(const float* x, int64_t x_stride) const {
    for (int64_t tile = 0; tile < tiles.count; tile++) {
      const int64_t row = tiles.first(tile), X = tiles.rows(tile);
      for (int64_t sum = 0; sum < SUMS; sum += 8) {
        float* out[8];
        for (int i = 0; i < 8; i++) out[i] = data + places.of_sum(tile, sum + i);
        const float* from = x + row * x_stride + sum;
        (X == 6 ? columns<6> : columns<5>)(from, x_stride, steps, out);
      }
    }
  }

  // Eight columns of X rows, sixteen apart at each step; the rows of a column come together.
  template <int X>
  static void columns(const float* x, int64_t x_stride, int64_t steps, float* const* out) {
    for (int64_t step = 0; step < steps; step++, x += SUMS) {
      __m256 v[8], a[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++) v[i] = i < X ? _mm256_loadu_ps(x + i * x_stride) : _mm256_setzero_ps();
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) {  // of columns 0 1 4 5 and 2 3 6 7
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        const __m256d even = _mm256_castps_pd(a[i]), odd = _mm256_castps_pd(a[i + 2]);
        v[2 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(even, odd));  // four rows of columns 2 i and 2 i + 4
        v[2 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd));
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const __m256 rest = a[4 + k / 2];  // of two rows
        const __m128 low = _mm256_castps256_ps128(rest), high = _mm256_extractf128_ps(rest, 1);
        put<X>(out[k] + step * X, _mm256_castps256_ps128(v[k]), k % 2 ? _mm_movehl_ps(low, low) : low);
        put<X>(out[k + 4] + step * X, _mm256_extractf128_ps(v[k], 1), k % 2 ? _mm_movehl_ps(high, high) : high);
      }
    }
  }

  template <int X>
  static INLINE void put(float* at, __m128 four, __m128 two) {
    _mm_storeu_ps(at, four);
    if (X == 6)
      _mm_storel_pi(reinterpret_cast<__m64*>(at + 4), two);
    else
      _mm_store_ss(at + 4, two);
  }
};

// `count` sums, from the k-th one on, of the products of X rows of input and a panel. `kept` holds sums of sums,
// [level, X, PANEL]; level 4 is the whole. After FETCH steps `each` lines are fetched `ahead`.
template <int X>
void tile(const float* panel, int64_t steps, const float* input, int k, int count, float* kept, Ahead& ahead,
          int64_t each) {
  for (const int last = k + count; k < last; k++) {
    __m256 sum[X][2];
#pragma GCC unroll 6
    for (int i = 0; i < X; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    const float* w = panel + place(k, steps);
    for (int64_t step = 0; step < steps; step += 4, w += 4 * PANEL, input += 4 * X) {
      if (step % FETCH == 0) ahead.fetch(each);
#pragma GCC unroll 4
      for (int s = 0; s < 4; s++) {
        __m256 low = _mm256_load_ps(w + s * PANEL), high = _mm256_load_ps(w + s * PANEL + 8);
        hold(low);
        hold(high);
#pragma GCC unroll 6
        for (int i = 0; i < X; i++) {
          const __m256 entry = _mm256_broadcast_ss(input + s * X + i);
          sum[i][0] = _mm256_fmadd_ps(low, entry, sum[i][0]);
          sum[i][1] = _mm256_fmadd_ps(high, entry, sum[i][1]);
        }
      }
    }
    float* level = kept;
    for (int ones = k; ones % 2; ones /= 2, level += X * PANEL)
#pragma GCC unroll 6
      for (int i = 0; i < X; i++)
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++)
          sum[i][g] = _mm256_add_ps(_mm256_load_ps(level + i * PANEL + 8 * g), sum[i][g]);
#pragma GCC unroll 6
    for (int i = 0; i < X; i++)
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) _mm256_store_ps(level + i * PANEL + 8 * g, sum[i][g]);
  }
}

// Outputs n to n + count - 1 of all rows of input; `memory` is room for a panel and for sums.
template <Format F>
void put_panel(const Matrix& m, int64_t n, int64_t count, const Turned& input, Room& memory, float* y,
               int64_t y_stride) {
  const int64_t steps = input.steps, size = place(SUMS, steps), levels = 5 * ROWS * PANEL;
  float *panel = memory.of(size + GROUP * levels), *kept = panel + size;
  pack<F>(m, n, panel);
  const int64_t bytes = row_bytes(m), next = std::max<int64_t>(0, std::min(PANEL, m.rows - n - PANEL));
  Ahead ahead{static_cast<const char*>(m.data) + (n + PANEL) * bytes, next * bytes / 64};
  const Tiles& tiles = input.tiles;
  const int64_t times = tiles.count * SUMS * ((steps + FETCH - 1) / FETCH), each = (ahead.left + times - 1) / times;
  for (int64_t group = 0; group < tiles.count; group += GROUP) {
    const int64_t end = std::min(group + GROUP, tiles.count);
    const int together = input.places.together;
    for (int k = 0; k < SUMS; k += together)
      for (int64_t t = group; t < end; t++) {
        const bool six = tiles.rows(t) == 6;
        (six ? tile<6> : tile<5>)(panel, steps, input.data + input.places.at(group, t, k), k, together,
                                  kept + (t - group) * levels, ahead, each);
      }
    for (int64_t t = group; t < end; t++) {
      const int64_t row = tiles.first(t), X = tiles.rows(t);
      const float* out = kept + (t - group) * levels + 4 * X * PANEL;
      for (int64_t i = 0; i < X; i++)
        std::memcpy(y + (row + i) * y_stride + n, out + i * PANEL, count * sizeof(float));
    }
  }
}

// y[row, n] = in[row] . m[n] for all rows and the n of `mine`.
void put_panels(const Matrix& m, Range mine, const Turned& input, Room& memory, float* y, int64_t y_stride) {
  const auto put = m.format == FP32 ? put_panel<FP32> : put_panel<BF16>;
  for (int64_t n = mine.first; n < mine.last; n += PANEL)
    put(m, n, std::min(PANEL, mine.last - n), input, memory, y, y_stride);
}

}  // namespace

#endif
