// GEMM with int8 and int4 weights on AVX2, in int16: one instruction (vpmaddwd) multiplies 16 pairs
// and adds up neighbouring products, for which floats need two.
//
// Input: quantised with one scale for each KC columns of a row, to 16 bits beside int8 weights and
// to 15 beside int4. Weights: int8 is converted; int4 is requantised to 12 bits with one scale for
// each KC columns of a row. Both errors are far below that of the weights' own quantisation.
//
// Integer sums over a block are exact. The sums of blocks are floats, added up in one order, so
// that an output does not depend on the rows beside it.
//
// A block of KC columns of four rows of weights is unpacked into the L1 cache and multiplied with
// all rows of input before the next block.

#pragma once

#include <cmath>

#include "gemm_avx2_blocked.h"

#if defined(USE_AVX2)

namespace {

// With that many rows of input, panels of 16 rows of weights are unpacked, otherwise of 4.
const int64_t WIDE_MIN_ROWS = 32;
const int64_t INPUT_ROWS_IN_L1 = 8;  // that stay in the L1 cache beside a panel of weights

// The largest quantised input. A 32-bit lane adds up 64 products of a block: for int4 they are at
// most 16,000 * 2,048 each.
template <Format F>
const float MAX_INPUT = F == INT8 ? 32000 : 16000;

inline float horizontal_max(__m256 v) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// The quantised input: for each block of columns [R, columns of the block], and scales [blocks, R].
struct QuantisedInput {
  int16_t* data;
  float* scales;
  int64_t R;

  static int64_t size_in_floats(int64_t R, int64_t stride) {
    return R * stride / 2 + R * ((stride + KC - 1) / KC);
  }

  QuantisedInput(float* buffer, int64_t R, int64_t stride)
      : data(reinterpret_cast<int16_t*>(buffer)), scales(buffer + R * stride / 2), R(R) {}

  template <Format F>
  void quantise(const float* x, int64_t x_stride, int64_t stride) const {
    for (int64_t k0 = 0; k0 < stride; k0 += KC) {
      const int64_t columns = std::min(KC, stride - k0);
      for (int64_t row = 0; row < R; row++) {
        int16_t* out = data + R * k0 + row * columns;
        scales[k0 / KC * R + row] =
            quantise_block(x + row * x_stride + k0, columns, MAX_INPUT<F>, out);
        deinterleave(out, columns);
      }
    }
  }

 private:
  // Returns the scale: infinite or NaN if an element is, and then so is each result.
  static float quantise_block(const float* x, int64_t columns, float max_level, int16_t* out) {
    // Bits of floats without their sign are in the order of absolute values, and NaN is the
    // largest.
    const __m256i unsigned_bits = _mm256_set1_epi32(0x7fffffff);
    __m256i max_bits = _mm256_setzero_si256();
    for (int64_t c = 0; c < columns; c += 8) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + c));
      max_bits = _mm256_max_epi32(max_bits, _mm256_and_si256(bits, unsigned_bits));
    }
    int32_t lanes[8];
    store_vector(lanes, max_bits);
    float largest;
    std::memcpy(&largest, std::max_element(lanes, lanes + 8), sizeof(largest));
    const __m256 factor = _mm256_set1_ps(largest > 1e-30f ? max_level / largest : 0);
    for (int64_t c = 0; c < columns; c += 16) {
      const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(load8(x + c), factor));
      const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(load8(x + c + 8), factor));
      // packs interleaves the 128-bit halves of both; the permutation restores the order of
      // columns.
      store_vector(out + c, _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8));
    }
    return largest / max_level;
  }

  // The order of `Int16Block::unpack`: of each 32 columns the even ones first.
  static void deinterleave(int16_t* x, int64_t columns) {
    for (int64_t c = 0; c < columns; c += 32) {
      int16_t columns_in_order[32];
      std::memcpy(columns_in_order, x + c, sizeof(columns_in_order));
      for (int i = 0; i < 16; i++)
        x[c + i] = columns_in_order[2 * i], x[c + 16 + i] = columns_in_order[2 * i + 1];
    }
  }
};

// A block of columns of four rows of weights, for unpacking to int16. An int4 weight becomes its
// level times its scale relative to the largest scale of this row and block.
template <Format F>
struct Int16Block {
  const char* row[4];
  int32_t factors[4][KC / 32];  // int4: relative scales, in both 16-bit halves
  float scales[4];

  Int16Block(const Matrix& m, int64_t n, int64_t k0, int64_t columns) {
    const WeightBlock<F> block(m, n, k0);
    for (int r = 0; r < 4; r++) {
      row[r] = block.row[r];
      if (F == INT8)
        scales[r] = static_cast<const float*>(m.scales)[n + r];
      else
        scales[r] =
            requantise(static_cast<const uint16_t*>(m.scales) + ((n + r) * m.stride + k0) / 32,
                       columns / 32, factors[r]);
    }
  }

  // Computes the relative scales of a row, at most 16; returns the scale of its int16 weights.
  static float requantise(const uint16_t* scales, int64_t count, int32_t* factors) {
    uint16_t padded_scales[16] = {};
    if (count < 16) std::memcpy(padded_scales, scales, count * sizeof(uint16_t));
    const uint16_t* sixteen_scales = count < 16 ? padded_scales : scales;
    const __m256 low = load8(sixteen_scales), high = load8(sixteen_scales + 8),
                 sign = _mm256_set1_ps(-0.0f);
    const __m256 max_magnitude =
        _mm256_max_ps(_mm256_andnot_ps(sign, low), _mm256_andnot_ps(sign, high));
    const float largest = horizontal_max(max_magnitude);
    const __m256 factor = _mm256_set1_ps(largest > 0 ? 2047 / largest : 0);
    for (int half = 0; half < 2; half++) {
      const __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(half ? high : low, factor));
      store_vector(factors + 8 * half,
                   _mm256_blend_epi16(rounded, _mm256_slli_epi32(rounded, 16), 0xaa));
    }
    return largest * 8 / 2047;
  }

  // Unpacks columns c to c + 63 of row r, 16 per vector: of each 32 the even ones first, as each 16
  // bits of int8 weights hold two columns.
  ALWAYS_INLINE void unpack(int r, int64_t c, __m256i* out) const {
    if (F == INT8) {
#pragma GCC unroll 2
      for (int j = 0; j < 4; j += 2) {
        const __m256i raw = load_vector<__m256i>(row[r] + c + 16 * j);
        out[j] = _mm256_srai_epi16(_mm256_slli_epi16(raw, 8), 8);
        out[j + 1] = _mm256_srai_epi16(raw, 8);
      }
      return;
    }
    // A nibble in the upper 4 of 16 bits, its first bit flipped, is the level times 4,096. mulhrs
    // divides the product with the factor by 32,768. Low nibbles are columns 0 to 31, high ones 32
    // to 63.
    const __m256i raw = load_vector<__m256i>(row[r] + c / 2),
                  sign = _mm256_set1_epi16(int16_t(0x8000));
    const __m256i low_factor = _mm256_set1_epi32(factors[r][c / 32]),
                  high_factor = _mm256_set1_epi32(factors[r][c / 32 + 1]);
    const __m256i upper = _mm256_set1_epi16(int16_t(0xf000));
    out[0] = _mm256_slli_epi16(raw, 12);
    out[1] = _mm256_and_si256(_mm256_slli_epi16(raw, 4), upper);
    out[2] = _mm256_and_si256(_mm256_slli_epi16(raw, 8), upper);
    out[3] = _mm256_and_si256(raw, upper);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      out[j] =
          _mm256_mulhrs_epi16(_mm256_xor_si256(out[j], sign), j < 2 ? low_factor : high_factor);
  }
};

inline __m256i load16(const int16_t* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}

// Reduces and dequantises the int32 sums of a block for MR rows of input and four rows of weights,
// and adds them to `sums` [MR, 4], whose rows are `sums_stride` apart.
template <int MR>
ALWAYS_INLINE void dequantise_add(__m256i (&sum)[MR][4], const float* scales, const float* x_scales,
                                  float* sums, int64_t sums_stride) {
  const __m128 scale = _mm_loadu_ps(scales);
#pragma GCC unroll 2
  for (int i = 0; i < MR; i++) {
    __m256 lanes[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) lanes[r] = _mm256_cvtepi32_ps(sum[i][r]);
    const __m128 combined_scale = _mm_mul_ps(scale, _mm_set1_ps(x_scales[i]));
    float* to = sums + i * sums_stride;
    _mm_store_ps(to, _mm_fmadd_ps(horizontal_sums4(lanes), combined_scale, _mm_load_ps(to)));
  }
}

// sums += x . w for one block of columns and the first MR rows of input. It unpacks the weights
// and, with STORE, leaves them in `unpacked` [4, KC] for the other rows. It prefetches the weights
// that lie `distance` bytes further on.
template <Format F, int MR, bool STORE>
inline void unpacking_microkernel(const Int16Block<F>& block, int16_t* unpacked, const int16_t* x,
                                  int64_t columns, const float* x_scales, int64_t distance,
                                  float* sums, int64_t sums_stride) {
  __m256i sum[MR][4];
#pragma GCC unroll 2
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) sum[i][r] = _mm256_setzero_si256();
  for (int64_t c = 0; c < columns; c += 64) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      __m256i v[4];
      prefetch(block.row[r] + c * WeightBlock<F>::bits / 8, distance);
      block.unpack(r, c, v);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        keep_in_register(v[j]);
        if (STORE) store_vector(unpacked + r * KC + c + 16 * j, v[j]);
#pragma GCC unroll 2
        for (int i = 0; i < MR; i++)
          keep_in_register(
              sum[i][r] = _mm256_add_epi32(
                  sum[i][r], _mm256_madd_epi16(v[j], load16(x + i * columns + c + 16 * j))));
      }
    }
  }
  dequantise_add<MR>(sum, block.scales, x_scales, sums, sums_stride);
}

// The same with weights that are unpacked already.
template <int MR>
ALWAYS_INLINE void microkernel(const int16_t* unpacked, const int16_t* x, int64_t columns,
                               const float* scales, const float* x_scales, float* sums,
                               int64_t sums_stride) {
  __m256i sum[MR][4];
#pragma GCC unroll 2
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) sum[i][r] = _mm256_setzero_si256();
  for (int64_t c = 0; c < columns; c += 64)
#pragma GCC unroll 4
    for (int64_t j = c; j < c + 64; j += 16) {
      __m256i inputs[MR];
#pragma GCC unroll 2
      for (int i = 0; i < MR; i++) keep_in_register(inputs[i] = load16(x + i * columns + j));
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        __m256i v = load16(unpacked + r * KC + j);
        keep_in_register(v);
#pragma GCC unroll 2
        for (int i = 0; i < MR; i++)
          keep_in_register(sum[i][r] =
                               _mm256_add_epi32(sum[i][r], _mm256_madd_epi16(v, inputs[i])));
      }
    }
  dequantise_add<MR>(sum, scales, x_scales, sums, sums_stride);
}

// The same for `count` rows of input.
void multiply_unpacked(const int16_t* unpacked, const int16_t* x, int64_t columns, int64_t count,
                       const float* scales, const float* x_scales, float* sums,
                       int64_t sums_stride) {
  int64_t row = 0;
  for (; row + 2 <= count; row += 2)
    microkernel<2>(unpacked, x + row * columns, columns, scales, x_scales + row,
                   sums + row * sums_stride, sums_stride);
  if (row < count)
    microkernel<1>(unpacked, x + row * columns, columns, scales, x_scales + row,
                   sums + row * sums_stride, sums_stride);
}

// y[row, n] = x[row] . m[n] for all rows of input and the n of the range, in panels of `width` rows
// of weights.
template <Format F>
void gemm_int16(const Matrix& m, Range range, const QuantisedInput& input, int64_t width,
                Workspace& workspace, float* y, int64_t y_stride) {
  const int64_t R = input.R;
  float* buffer = workspace.reserve(width * (KC / 2 + R));
  int16_t* unpacked = reinterpret_cast<int16_t*>(buffer);
  float* sums = buffer + width * KC / 2;
  const int64_t bytes = m.stride * WeightBlock<F>::bits / 8, distance = 4 * bytes;
  const auto first_kernel = R == 1   ? unpacking_microkernel<F, 1, false>
                            : R == 2 ? unpacking_microkernel<F, 2, false>
                                     : unpacking_microkernel<F, 2, true>;
  for (int64_t n = range.begin; n < range.end; n += width) {
    const int64_t width_here = std::min(width, range.end - n);
    std::fill_n(sums, R * width, 0.0f);
    for (int64_t k0 = 0; k0 < m.stride; k0 += KC) {
      const int64_t columns = std::min(KC, m.stride - k0);
      const int16_t* x = input.data + R * k0;
      const float* x_scales = input.scales + k0 / KC * R;
      float scales[16];
      for (int64_t r = 0; r < width_here; r += 4) {
        const Int16Block<F> block(m, n + r, k0, columns);
        std::memcpy(scales + r, block.scales, sizeof(block.scales));
        first_kernel(block, unpacked + r * KC, x, columns, x_scales, distance, sums + r, width);
      }
      for (int64_t row = 2; row < R; row += INPUT_ROWS_IN_L1)
        for (int64_t r = 0; r < width_here; r += 4)
          multiply_unpacked(unpacked + r * KC, x + row * columns, columns,
                            std::min(INPUT_ROWS_IN_L1, R - row), scales + r, x_scales + row,
                            sums + row * width + r, width);
    }
    for (int64_t row = 0; row < R; row++)
      std::memcpy(y + row * y_stride + n, sums + row * width, width_here * sizeof(float));
  }
}

}  // namespace

#endif
