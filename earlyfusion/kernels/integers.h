// Products with int8 and int4 weights, for processors whose registers hold eight floats (AVX2 with FMA), in whole
// numbers: one instruction multiplies sixteen pairs of 16 bits and adds up each two products, where floats need two
// instructions.
//
// The input is rounded to whole numbers with one scale for each BLOCK columns of a row: 16 bits beside int8, 15 beside
// int4. Weights of int8 are whole numbers already. Those of int4 become whole numbers of 12 bits with one scale for
// each BLOCK columns of a row. Both rounding errors are far below that of the weights' own rounding.
//
// Sums of whole numbers are exact. The sums of blocks are floats, added up in one order, so that an output does not
// depend on the rows beside it.
//
// Four rows of weights at a time are unpacked into the first-level cache, block by block, and all rows of input pass
// by.

#pragma once

#include <cmath>

#include "blocks.h"

#if defined(VECTORS_OF_EIGHT)

namespace {

const int64_t WIDE = 32;    // rows of input from which on sixteen rows of weights are unpacked at a time, not four
const int64_t PASSING = 8;  // rows of input that stay in the first-level cache beside a panel of weights

// A lane adds up 64 products in a block. In int4 they are of 16,000 and 2,048 at most: that fits into 32 bits.
template <Format F>
const float LARGEST = F == INT8 ? 32000 : 16000;

inline float largest(__m256 v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// The input as whole numbers: for each block [R, columns of the block], and the scales [blocks, R].
struct Whole {
  int16_t* entries;
  float* scales;
  int64_t R;

  static int64_t floats(int64_t R, int64_t stride) { return R * stride / 2 + R * ((stride + BLOCK - 1) / BLOCK); }

  Whole(float* room, int64_t R, int64_t stride)
      : entries(reinterpret_cast<int16_t*>(room)), scales(room + R * stride / 2), R(R) {}

  template <Format F>
  void fill(const float* x, int64_t x_stride, int64_t stride) const {
    for (int64_t first = 0; first < stride; first += BLOCK) {
      const int64_t columns = std::min(BLOCK, stride - first);
      for (int64_t row = 0; row < R; row++) {
        int16_t* out = entries + R * first + row * columns;
        scales[first / BLOCK * R + row] = round(x + row * x_stride + first, columns, LARGEST<F>, out);
        order(out, columns);
      }
    }
  }

 private:
  // Returns the scale: infinite or NaN if an entry is, and then so is each result.
  static float round(const float* x, int64_t columns, float largest, int16_t* out) {
    // Without their sign, floats are in the order of their bits, and NaN is the largest of all.
    const __m256i unsigned_bits = _mm256_set1_epi32(0x7fffffff);
    __m256i most = _mm256_setzero_si256();
    for (int64_t c = 0; c < columns; c += 8) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + c));
      most = _mm256_max_epi32(most, _mm256_and_si256(bits, unsigned_bits));
    }
    int32_t lanes[8];
    write(lanes, most);
    float top;
    std::memcpy(&top, std::max_element(lanes, lanes + 8), sizeof(top));
    const __m256 factor = _mm256_set1_ps(top > 1e-30f ? largest / top : 0);
    for (int64_t c = 0; c < columns; c += 16) {
      const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(eight(x + c), factor));
      const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(eight(x + c + 8), factor));
      // Packing takes four of the one and four of the other in turn.
      write(out + c, _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    }
    return top / largest;
  }

  // As `levels` unpacks weights: of each 32 columns the even ones first.
  static void order(int16_t* x, int64_t columns) {
    for (int64_t c = 0; c < columns; c += 32) {
      int16_t before[32];
      std::memcpy(before, x + c, sizeof(before));
      for (int i = 0; i < 16; i++) x[c + i] = before[2 * i], x[c + 16 + i] = before[2 * i + 1];
    }
  }
};

// One block of columns of four rows of weights as whole numbers. A whole number of int4 is the level times its scale,
// as a part of the largest scale of this row and block.
template <Format F>
struct WholeBlock {
  const char* row[4];
  int32_t parts[4][BLOCK / 32];  // of int4: the scales as parts of the largest, 16 bits, each two times
  float scales[4];

  WholeBlock(const Matrix& m, int64_t n, int64_t first, int64_t columns) {
    const Block4<F> block(m, n, first);
    for (int r = 0; r < 4; r++) {
      row[r] = block.row[r];
      if (F == INT8)
        scales[r] = static_cast<const float*>(m.scales)[n + r];
      else
        scales[r] = divide(static_cast<const uint16_t*>(m.scales) + ((n + r) * m.stride + first) / 32, columns / 32,
                           parts[r]);
    }
  }

  // At most sixteen scales.
  static float divide(const uint16_t* scales, int64_t count, int32_t* parts) {
    uint16_t some[16] = {};
    if (count < 16) std::memcpy(some, scales, count * sizeof(uint16_t));
    const uint16_t* all = count < 16 ? some : scales;
    const __m256 low = eight(all), high = eight(all + 8), sign = _mm256_set1_ps(-0.0f);
    const __m256 most = _mm256_max_ps(_mm256_andnot_ps(sign, low), _mm256_andnot_ps(sign, high));
    const float top = largest(most);
    const __m256 factor = _mm256_set1_ps(top > 0 ? 2047 / top : 0);
    for (int half = 0; half < 2; half++) {
      const __m256i part = _mm256_cvtps_epi32(_mm256_mul_ps(half ? high : low, factor));
      write(parts + 8 * half, _mm256_blend_epi16(part, _mm256_slli_epi32(part, 16), 0xaa));
    }
    return top * 8 / 2047;
  }

  // 64 columns of a row from column c on, sixteen a vector: of each 32 the even ones first, as two bytes lie in one
  // whole number of 16 bits.
  inline __attribute__((always_inline)) void levels(int r, int64_t c, __m256i* out) const {
    if (F == INT8) {
#pragma GCC unroll 2
      for (int j = 0; j < 4; j += 2) {
        const __m256i raw = read<__m256i>(row[r] + c + 16 * j);
        out[j] = _mm256_srai_epi16(_mm256_slli_epi16(raw, 8), 8);
        out[j + 1] = _mm256_srai_epi16(raw, 8);
      }
      return;
    }
    // A nibble in the upper bits, its first bit turned around, is a level times 4,096; the product is divided by
    // 32,768. Low nibbles are columns 0 to 31, high ones 32 to 63.
    const __m256i raw = read<__m256i>(row[r] + c / 2), sign = _mm256_set1_epi16(int16_t(0x8000));
    const __m256i first = _mm256_set1_epi32(parts[r][c / 32]), second = _mm256_set1_epi32(parts[r][c / 32 + 1]);
    const __m256i upper = _mm256_set1_epi16(int16_t(0xf000));
    out[0] = _mm256_slli_epi16(raw, 12);
    out[1] = _mm256_and_si256(_mm256_slli_epi16(raw, 4), upper);
    out[2] = _mm256_and_si256(_mm256_slli_epi16(raw, 8), upper);
    out[3] = _mm256_and_si256(raw, upper);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) out[j] = _mm256_mulhrs_epi16(_mm256_xor_si256(out[j], sign), j < 2 ? first : second);
  }
};

inline __m256i sixteen(const int16_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

// Adds the products of X rows of input with four rows of weights, in one block of columns, to `sums` [X, 4], their
// rows `sums_stride` apart.
template <int X>
inline __attribute__((always_inline)) void add_whole(__m256i (&sum)[X][4], const float* scales, const float* x_scales,
                                                     float* sums, int64_t sums_stride) {
  const __m128 scale = _mm_loadu_ps(scales);
#pragma GCC unroll 2
  for (int i = 0; i < X; i++) {
    __m256 lanes[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) lanes[r] = _mm256_cvtepi32_ps(sum[i][r]);
    const __m128 both = _mm_mul_ps(scale, _mm_set1_ps(x_scales[i]));
    float* to = sums + i * sums_stride;
    _mm_store_ps(to, _mm_fmadd_ps(four_sums(lanes), both, _mm_load_ps(to)));
  }
}

// The first rows of input: they unpack the weights, and leave them in `unpacked` [4, BLOCK] for the others (KEEP).
template <Format F, int X, bool KEEP>
inline void first_pass(const WholeBlock<F>& block, int16_t* unpacked, const int16_t* x, int64_t columns,
                       const float* x_scales, int64_t distance, float* sums, int64_t sums_stride) {
  __m256i sum[X][4];
#pragma GCC unroll 2
  for (int i = 0; i < X; i++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) sum[i][r] = _mm256_setzero_si256();
  for (int64_t c = 0; c < columns; c += 64) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      __m256i v[4];
      fetch(block.row[r] + c * Block4<F>::bits / 8, distance);
      block.levels(r, c, v);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        hold(v[j]);
        if (KEEP) write(unpacked + r * BLOCK + c + 16 * j, v[j]);
#pragma GCC unroll 2
        for (int i = 0; i < X; i++)
          hold(sum[i][r] = _mm256_add_epi32(sum[i][r], _mm256_madd_epi16(v[j], sixteen(x + i * columns + c + 16 * j))));
      }
    }
  }
  add_whole<X>(sum, block.scales, x_scales, sums, sums_stride);
}

template <int X>
inline __attribute__((always_inline)) void pass(const int16_t* unpacked, const int16_t* x, int64_t columns,
                                                const float* scales, const float* x_scales, float* sums,
                                                int64_t sums_stride) {
  __m256i sum[X][4];
#pragma GCC unroll 2
  for (int i = 0; i < X; i++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) sum[i][r] = _mm256_setzero_si256();
  for (int64_t c = 0; c < columns; c += 64)
#pragma GCC unroll 4
    for (int64_t j = c; j < c + 64; j += 16) {
      __m256i entries[X];
#pragma GCC unroll 2
      for (int i = 0; i < X; i++) hold(entries[i] = sixteen(x + i * columns + j));
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        __m256i v = sixteen(unpacked + r * BLOCK + j);
        hold(v);
#pragma GCC unroll 2
        for (int i = 0; i < X; i++)
          hold(sum[i][r] = _mm256_add_epi32(sum[i][r], _mm256_madd_epi16(v, entries[i])));
      }
    }
  add_whole<X>(sum, scales, x_scales, sums, sums_stride);
}

// The same for `count` rows of input whose weights are unpacked.
void passes(const int16_t* unpacked, const int16_t* x, int64_t columns, int64_t count, const float* scales,
            const float* x_scales, float* sums, int64_t sums_stride) {
  int64_t row = 0;
  for (; row + 2 <= count; row += 2)
    pass<2>(unpacked, x + row * columns, columns, scales, x_scales + row, sums + row * sums_stride, sums_stride);
  if (row < count)
    pass<1>(unpacked, x + row * columns, columns, scales, x_scales + row, sums + row * sums_stride, sums_stride);
}

// y[row, n] = input[row] . m[n] for all rows and the n of `mine`, in panels of `width` rows of weights; `memory` is
// room for sums and unpacked weights.
template <Format F>
void put_whole(const Matrix& m, Range mine, const Whole& input, int64_t width, Room& memory, float* y,
               int64_t y_stride) {
  const int64_t R = input.R;
  float* room = memory.of(width * (BLOCK / 2 + R));
  int16_t* unpacked = reinterpret_cast<int16_t*>(room);
  float* sums = room + width * BLOCK / 2;
  const int64_t bytes = m.stride * Block4<F>::bits / 8, distance = 4 * bytes;
  const auto begin = R == 1 ? first_pass<F, 1, false> : R == 2 ? first_pass<F, 2, false> : first_pass<F, 2, true>;
  for (int64_t n = mine.first; n < mine.last; n += width) {
    const int64_t here = std::min(width, mine.last - n);
    std::fill_n(sums, R * width, 0.0f);
    for (int64_t first = 0; first < m.stride; first += BLOCK) {
      const int64_t columns = std::min(BLOCK, m.stride - first);
      const int16_t* x = input.entries + R * first;
      const float* x_scales = input.scales + first / BLOCK * R;
      float scales[16];
      for (int64_t k = 0; k < here; k += 4) {
        const WholeBlock<F> block(m, n + k, first, columns);
        std::memcpy(scales + k, block.scales, sizeof(block.scales));
        begin(block, unpacked + k * BLOCK, x, columns, x_scales, distance, sums + k, width);
      }
      for (int64_t row = 2; row < R; row += PASSING)
        for (int64_t k = 0; k < here; k += 4)
          passes(unpacked + k * BLOCK, x + row * columns, columns, std::min(PASSING, R - row), scales + k,
                 x_scales + row, sums + row * width + k, width);
    }
    for (int64_t row = 0; row < R; row++)
      std::memcpy(y + row * y_stride + n, sums + row * width, here * sizeof(float));
  }
}

}  // namespace

#endif
