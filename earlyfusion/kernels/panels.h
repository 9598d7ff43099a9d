// Products of many rows of input for processors whose registers hold eight floats (AVX2 with FMA).
//
// products.h adds up each output in sixteen sums: of the columns 0, 16, 32 ..., of 1, 17, 33 ..., and so
// on, a lane of a vector for each. That reads weights at the speed of the memory, but for many rows it
// is bound by loading. Here a lane is another output: a vector holds one column of eight rows of
// weights and is multiplied with an entry of the input. The sixteen sums of an output are kept apart
// and are added up in the same order, so that it does not depend, to the bit, on which way is taken.
//
// Weights lie by rows, as the model stores them. PANEL rows and up to DEPTH columns are turned around into
// a panel of floats, which stays in the second-level cache while all rows of input pass by. Meanwhile the
// weights of the next panel are fetched from memory.

#pragma once

#include "operands.h"

#if defined(VECTORS_OF_EIGHT)

namespace {

const int64_t SUMS = 16;     // of an output
const int64_t DEPTH = 2048;  // columns of a block, at most: a panel of them takes 128 KB
const int64_t PANEL = 16;    // rows of weights of a panel
const int64_t ROWS = 6;      // rows of input whose sums fit into the registers: 2 * 6 of 16

// Rows of input from which on this pays: turning weights of fewer bits around takes longer.
inline int64_t many(const Matrix& m) { return m.format == FP32 || m.format == BF16 ? 22 : 36; }

#define INLINE inline __attribute__((always_inline))

// Eight rows of a matrix. Behind the last row of the matrix it is repeated; nobody uses the results.
struct Eight {
  const char* row[8];
  const char* scales[8];  // of int4

  Eight(const Matrix& m, int64_t first) {
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
  for (int g = 0; g < 2; g++) {
    const Eight weights(m, n + 8 * g);
    for (int64_t c = first; c < last; c += Unit<F>::columns)
      Unit<F>::each(weights, c, [&](int k, __m256 column) __attribute__((always_inline)) {
        const int64_t at = c - first + k;
        _mm256_store_ps(panel + place(at % SUMS, at / SUMS, steps) + 8 * g, column);
      });
  }
}

// X rows of input from `first` to `last`, turned around as the panels are: [SUMS, steps, X].
template <int X>
void pack_rows(const float* x, int64_t x_stride, int64_t first, int64_t last, float* out) {
  const int64_t steps = (last - first) / SUMS;
  for (int64_t step = 0; step < steps; step++)
    for (int64_t number = 0; number < SUMS; number++)
#pragma GCC unroll 6
      for (int i = 0; i < X; i++)
        out[(number * steps + step) * X + i] = x[i * x_stride + first + step * SUMS + number];
}

// Fetches a part of a matrix that is needed next into the second-level cache, one line at a time.
struct Ahead {
  const char* at;
  int64_t left, lines, skip;  // lines left in this row and of a row; from its end to the next row, in bytes
  int64_t rows;               // left

  Ahead(const Matrix& m, int64_t n, int64_t first, int64_t last) {
    const int64_t bytes = row_bytes(m), begin = bytes * first / m.stride, end = bytes * last / m.stride;
    rows = std::min(PANEL, m.rows - n);
    at = static_cast<const char*>(m.data) + n * bytes + begin;
    left = lines = (end - begin + 63) / 64;
    skip = bytes - 64 * lines;
  }

  INLINE void fetch() {
    if (rows <= 0) return;
    _mm_prefetch(at, _MM_HINT_T1);
    at += 64;
    if (--left == 0) {
      at += skip;
      left = lines;
      rows--;
    }
  }
};

// Adds the products of X rows of input with a block of weights to their sums [X, SUMS, PANEL]; at the
// `beginning` these are nothing. After every fourth step `each` lines are fetched `ahead`.
template <int X>
void tile(const float* panel, int64_t steps, const float* x, bool beginning, float* sums, Ahead& ahead,
          int64_t each) {
  for (int64_t number = 0; number < SUMS; number++) {
    const float *weights = panel + place(number, 0, steps), *input = x + number * steps * X;
    float* kept = sums + number * PANEL;
    __m256 sum[X][2];
#pragma GCC unroll 6
    for (int i = 0; i < X; i++)
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) {
        const float* before = kept + i * SUMS * PANEL + 8 * g;
        sum[i][g] = beginning ? _mm256_setzero_ps() : _mm256_load_ps(before);
      }
    for (int64_t step = 0; step < steps; step += 4) {
      for (int64_t line = 0; line < each; line++) ahead.fetch();
#pragma GCC unroll 4
      for (int64_t s = step; s < step + 4; s++) {
        const __m256 low = _mm256_load_ps(weights + s * PANEL);
        const __m256 high = _mm256_load_ps(weights + s * PANEL + 8);
#pragma GCC unroll 6
        for (int i = 0; i < X; i++) {
          const __m256 entry = _mm256_broadcast_ss(input + s * X + i);
          sum[i][0] = _mm256_fmadd_ps(low, entry, sum[i][0]);
          sum[i][1] = _mm256_fmadd_ps(high, entry, sum[i][1]);
        }
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < X; i++)
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) _mm256_store_ps(kept + i * SUMS * PANEL + 8 * g, sum[i][g]);
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

// Calls `work.run<X>(row)` for tiles of X rows.
template <class Work>
void each_tile(int64_t R, Work work) {
  for (int64_t row = 0; row < R; row += ROWS) {
    switch (std::min(ROWS, R - row)) {
      case 1: work(row, std::integral_constant<int, 1>()); break;
      case 2: work(row, std::integral_constant<int, 2>()); break;
      case 3: work(row, std::integral_constant<int, 3>()); break;
      case 4: work(row, std::integral_constant<int, 4>()); break;
      case 5: work(row, std::integral_constant<int, 5>()); break;
      default: work(row, std::integral_constant<int, 6>());
    }
  }
}

template <Format F>
void put_panels(const Matrix& m, Range mine, const Input& in, int64_t R, float* y, int64_t y_stride) {
  const float* x = F == BF16 || F == INT4 ? in.rounded : in.fp32;
  const int64_t blocks = (m.stride + DEPTH - 1) / DEPTH, depth = padded((m.stride + blocks - 1) / blocks);
  Aligned<float> panel(place(SUMS, 0, depth / SUMS)), turned(R * m.stride);
  Aligned<float> sums((blocks > 1 ? R : ROWS) * SUMS * PANEL);
  for (int64_t first = 0; first < m.stride; first += depth) {
    const int64_t last = std::min(first + depth, m.stride);
    each_tile(R, [&](int64_t row, auto X) {
      float* out = turned.data() + R * first + row * (last - first);
      pack_rows<X>(x + row * in.stride, in.stride, first, last, out);
    });
  }
  for (int64_t n = mine.first; n < mine.last; n += PANEL) {
    const int64_t count = std::min(PANEL, mine.last - n);
    for (int64_t first = 0; first < m.stride; first += depth) {
      const int64_t last = std::min(first + depth, m.stride), steps = (last - first) / SUMS;
      pack<F>(m, n, first, last, panel.data());
      const bool ends = last == m.stride;  // then the next panel begins
      const int64_t next_n = ends ? n + PANEL : n, next = ends ? 0 : last;
      Ahead ahead(m, next_n, next, std::min(next + depth, m.stride));
      if (next_n >= mine.last) ahead.rows = 0;
      const int64_t calls = (R + ROWS - 1) / ROWS * SUMS * steps / 4;
      const int64_t each = (ahead.rows * ahead.lines + calls - 1) / calls;
      each_tile(R, [&](int64_t row, auto X) {
        float* kept = sums.data() + (blocks > 1 ? row : 0) * SUMS * PANEL;
        const float* input = turned.data() + R * first + row * (last - first);
        tile<X>(panel.data(), steps, input, first == 0, kept, ahead, each);
        if (!ends) return;
        for (int64_t i = 0; i < X; i++) {
          alignas(32) float out[PANEL];
          for (int g = 0; g < 2; g++)
            _mm256_store_ps(out + 8 * g, whole(kept + i * SUMS * PANEL + 8 * g));
          for (int64_t k = 0; k < count; k++) {
            const float scale = F == INT8 ? static_cast<const float*>(m.scales)[n + k] : 1.0f;
            y[(row + i) * y_stride + n + k] = out[k] * scale;
          }
        }
      });
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
