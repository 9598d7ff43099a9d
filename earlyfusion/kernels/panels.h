// Products of many rows of input for processors whose registers hold eight floats (AVX2 with FMA).
//
// products.h adds up each output in sixteen sums: of the columns 0, 16, 32 ..., of 1, 17, 33 ..., and so
// on, a lane of a vector for each. That reads weights at the speed of the memory, but for many rows it
// is bound by loading. Here a lane is another output: a vector holds one column of eight rows of
// weights and is multiplied with an entry of the input. The sixteen sums of an output are kept apart
// and are added up in the same order, so that it does not depend, to the bit, on which way is taken.
//
// Weights lie by rows, as the model stores them. PANEL rows and DEPTH columns are turned around into a
// panel of floats, which stays in the cache while all rows of input pass by.

#pragma once

#include "operands.h"

#if defined(VECTORS_OF_EIGHT)

namespace {

const int64_t MANY = 24;    // rows of input from which on this pays
const int64_t SUMS = 16;    // of an output
const int64_t DEPTH = 512;  // columns of a block
const int64_t PANEL = 16;   // rows of weights of a panel
const int64_t ROWS = 6;     // rows of input whose sums fit into the registers: 2 * 6 of 16

#define INLINE inline __attribute__((always_inline))

// Eight rows of a matrix. Behind the last row of the matrix it is repeated; nobody uses the results.
struct Eight {
  const char* row[8];
  const char* scales[8];  // of int4
  int64_t distance;       // how far ahead to prefetch, in bytes; 0: not at all

  Eight(const Matrix& m, int64_t first, int64_t ahead) : distance(ahead) {
    const int64_t bytes = row_bytes(m);
    for (int64_t r = 0; r < 8; r++) {
      const int64_t number = std::min(first + r, m.rows - 1);
      row[r] = static_cast<const char*>(m.data) + number * bytes;
      if (m.format == INT4)
        scales[r] = static_cast<const char*>(m.scales) + number * m.stride / 32 * 2;
    }
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
#pragma GCC unroll 8
  for (int r = 0; r < 8; r++)
    if (w.distance) _mm_prefetch(w.row[r] + at + w.distance, _MM_HINT_T0);
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

template <>
struct Unit<INT8> {
  static const int64_t columns = 32;
  template <class Take>
  static INLINE void each(const Eight& w, int64_t c, Take take) {
    __m256i v[8];
    turned(w, c, v);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
#pragma GCC unroll 4
      for (int b = 0; b < 4; b++) {
        const __m256i level = _mm256_srai_epi32(_mm256_slli_epi32(v[i], 24 - 8 * b), 24);
        take(4 * i + b, _mm256_cvtepi32_ps(level));
      }
  }
};

template <>
struct Unit<INT4> {
  static const int64_t columns = 64;
  template <class Take>
  static INLINE void each(const Eight& w, int64_t c, Take take) {
    __m256i v[8];
    turned(w, c / 2, v);
    const __m256i nibble = _mm256_set1_epi32(15), eight = _mm256_set1_epi32(8);
    alignas(32) int32_t pair[8];  // the scales of both halves, side by side
    for (int r = 0; r < 8; r++) std::memcpy(pair + r, w.scales[r] + c / 32 * 2, 4);
    const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(pair));
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {  // columns 0 to 31 in low nibbles, 32 to 63 in high ones
      const __m256i bits = half ? _mm256_srli_epi32(both, 16) : both;
      const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++)
#pragma GCC unroll 4
        for (int b = 0; b < 4; b++) {
          const __m256i raw = _mm256_and_si256(_mm256_srli_epi32(v[i], 8 * b + 4 * half), nibble);
          const __m256 level = _mm256_cvtepi32_ps(_mm256_sub_epi32(raw, eight));
          take(32 * half + 4 * i + b, _mm256_mul_ps(level, scale));  // exact in fp32
        }
    }
  }
};

// Where column `sum` + 16 * `step` of a block begins in a panel: the columns of a sum follow each other. A
// line is left free between sums, as the caches have few places for addresses that differ by a power of two.
INLINE int64_t place(int64_t sum, int64_t step, int64_t steps) {
  return (sum * (steps + 1) + step) * PANEL;
}

// Columns `first` to `last` of the rows n to n + 15 of a matrix.
template <Format F>
void pack(const Matrix& m, int64_t n, int64_t first, int64_t last, float* panel) {
  const int64_t steps = (last - first) / SUMS;
  // Ahead: the next block of these rows, or the first one of the next panel.
  const int64_t bytes = row_bytes(m), ahead = bytes * (last - first) / m.stride;
  const int64_t distance = last < m.stride ? ahead : PANEL * bytes - bytes * first / m.stride;
  for (int g = 0; g < 2; g++) {
    const Eight weights(m, n + 8 * g, distance);
    for (int64_t c = first; c < last; c += Unit<F>::columns)
      Unit<F>::each(weights, c, [&](int k, __m256 column) __attribute__((always_inline)) {
        const int64_t at = c - first + k;
        _mm256_store_ps(panel + place(at % SUMS, at / SUMS, steps) + 8 * g, column);
      });
  }
}

// Adds the products of X rows of input with a block of weights to their sums [X, SUMS, PANEL]; at the
// `beginning` these are nothing.
template <int X>
void tile(const float* panel, int64_t steps, const float* x, int64_t x_stride, bool beginning,
          float* sums) {
  for (int64_t number = 0; number < SUMS; number++) {
    const float *weights = panel + place(number, 0, steps), *input = x + number;
    float* kept = sums + number * PANEL;
    __m256 sum[X][2];
#pragma GCC unroll 6
    for (int i = 0; i < X; i++)
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) {
        const float* before = kept + i * SUMS * PANEL + 8 * g;
        sum[i][g] = beginning ? _mm256_setzero_ps() : _mm256_load_ps(before);
      }
    for (int64_t step = 0; step < steps; step++) {
      const __m256 low = _mm256_load_ps(weights + step * PANEL);
      const __m256 high = _mm256_load_ps(weights + step * PANEL + 8);
#pragma GCC unroll 6
      for (int i = 0; i < X; i++) {
        const __m256 entry = _mm256_broadcast_ss(input + i * x_stride + step * SUMS);
        sum[i][0] = _mm256_fmadd_ps(low, entry, sum[i][0]);
        sum[i][1] = _mm256_fmadd_ps(high, entry, sum[i][1]);
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < X; i++)
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) _mm256_store_ps(kept + i * SUMS * PANEL + 8 * g, sum[i][g]);
  }
}

void tiles(const float* panel, int64_t steps, const float* x, int64_t x_stride, bool beginning,
           int64_t R, float* sums) {
  for (int64_t row = 0; row < R; row += ROWS) {
    const float* in = x + row * x_stride;
    float* out = sums + row * SUMS * PANEL;
    switch (std::min(ROWS, R - row)) {
      case 1: tile<1>(panel, steps, in, x_stride, beginning, out); break;
      case 2: tile<2>(panel, steps, in, x_stride, beginning, out); break;
      case 3: tile<3>(panel, steps, in, x_stride, beginning, out); break;
      case 4: tile<4>(panel, steps, in, x_stride, beginning, out); break;
      case 5: tile<5>(panel, steps, in, x_stride, beginning, out); break;
      default: tile<6>(panel, steps, in, x_stride, beginning, out);
    }
  }
}

// The sum of sixteen sums, for eight outputs, in the order of `four_sums`.
INLINE __m256 whole(const float* sums) {
  __m256 v[SUMS];
#pragma GCC unroll 16
  for (int i = 0; i < SUMS; i++) v[i] = _mm256_load_ps(sums + i * PANEL);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) v[i] = _mm256_add_ps(v[i], v[i + 8]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) v[i] = _mm256_add_ps(v[i], v[i + 4]);
  return _mm256_add_ps(_mm256_add_ps(v[0], v[2]), _mm256_add_ps(v[1], v[3]));
}

template <Format F>
void put_panels(const Matrix& m, Range mine, const Input& in, int64_t R, float* y, int64_t y_stride) {
  const float* x = F == BF16 || F == INT4 ? in.rounded : in.fp32;
  Aligned<float> panel(place(SUMS, 0, std::min(DEPTH, m.stride) / SUMS)), sums(R * SUMS * PANEL);
  for (int64_t n = mine.first; n < mine.last; n += PANEL) {
    for (int64_t first = 0; first < m.stride; first += DEPTH) {
      const int64_t last = std::min(first + DEPTH, m.stride), steps = (last - first) / SUMS;
      pack<F>(m, n, first, last, panel.data());
      tiles(panel.data(), steps, x + first, in.stride, first == 0, R, sums.data());
    }
    const int64_t count = std::min(PANEL, mine.last - n);
    for (int64_t row = 0; row < R; row++) {
      alignas(32) float out[PANEL];
      for (int g = 0; g < 2; g++)
        _mm256_store_ps(out + 8 * g, whole(sums.data() + row * SUMS * PANEL + 8 * g));
      for (int64_t i = 0; i < count; i++) {
        const float scale = F == INT8 ? static_cast<const float*>(m.scales)[n + i] : 1.0f;
        y[row * y_stride + n + i] = out[i] * scale;
      }
    }
  }
}

// y[row, n] = in[row] . m[n] for all rows and the n of `mine`.
void put_panels(const Matrix& m, Range mine, const Input& in, int64_t R, float* y, int64_t y_stride) {
  switch (m.format) {
    case FP32: return put_panels<FP32>(m, mine, in, R, y, y_stride);
    case BF16: return put_panels<BF16>(m, mine, in, R, y, y_stride);
    case INT8: return put_panels<INT8>(m, mine, in, R, y, y_stride);
    default: return put_panels<INT4>(m, mine, in, R, y, y_stride);
  }
}

}  // namespace

#endif
