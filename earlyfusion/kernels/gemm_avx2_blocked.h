// GEMM with fp32 and bf16 weights for a few rows of input on AVX2, blocked over columns.
//
// A block of KC columns of four rows of weights is multiplied with all rows of input before the
// next block. It stays in the L1 cache as floats, and the next block is prefetched meanwhile, so
// that computing hides the time of memory. Each output is added up as described in operands.h.

#pragma once

#include "operands.h"

#if defined(USE_AVX2)

namespace {

const int64_t BLOCKED_MR = 3;        // rows of input of a tile: its sums take 3 * 4 of 16 registers
const int64_t BLOCKED_MIN_ROWS = 4;  // of input: with fewer, `streamed_microkernel` is faster
const int64_t KC = 512;              // columns of a block

// Prefetches a block of four rows of weights, cache line by cache line.
class RowsPrefetch {
 public:
  RowsPrefetch(const char* const* row, int64_t bytes) : lines_((bytes + 63) / 64) {
    for (int r = 0; r < 4; r++) row_[r] = row[r];
  }

  // Prefetches the next `rate` / 256 cache lines.
  ALWAYS_INLINE void prefetch(int64_t rate) {
    for (due_ += rate; due_ >= 256; due_ -= 256) {
      _mm_prefetch(row_[r_] + 64 * line_, _MM_HINT_T0);
      if (++line_ == lines_) line_ = 0, r_ = (r_ + 1) % 4;
    }
  }

 private:
  const char* row_[4];
  int64_t lines_, line_ = 0, r_ = 0, due_ = 0;
};

// sums [MR, half, row of weights, 8] += x [MR, columns] . w [4, columns], for one block of columns;
// the `first_block` overwrites them. A vector of 16 columns has two halves, which are computed one
// after the other. Weights of bf16 are also stored as floats in `converted` [4, KC], for the tiles
// after this one. For each 64 columns and half, `rate` / 256 cache lines of the `next` weights are
// prefetched.
template <int MR, class T>
inline void blocked_microkernel(const T* w, int64_t stride, float* converted, const float* x,
                                int64_t columns, bool first_block, RowsPrefetch& next, int64_t rate,
                                float* sums) {
  for (int half = 0; half < 2; half++) {
    __m256 sum[MR][4];
    float* stored = sums + 32 * half;
#pragma GCC unroll 3
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++)
        sum[i][r] = first_block ? _mm256_setzero_ps() : _mm256_load_ps(stored + 64 * i + 8 * r);
    for (int64_t begin = 8 * half; begin < columns; begin += 64) {
      next.prefetch(rate);
#pragma GCC unroll 4
      for (int64_t c = begin; c < begin + 64; c += 16) {
        __m256 inputs[MR];
#pragma GCC unroll 3
        for (int i = 0; i < MR; i++) keep_in_register(inputs[i] = load8(x + i * columns + c));
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
          __m256 v = load8(w + r * stride + c);
          keep_in_register(v);
          if (!std::is_same_v<T, float>) _mm256_store_ps(converted + r * KC + c, v);
#pragma GCC unroll 3
          for (int i = 0; i < MR; i++) sum[i][r] = _mm256_fmadd_ps(v, inputs[i], sum[i][r]);
        }
      }
    }
#pragma GCC unroll 3
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) _mm256_store_ps(stored + 64 * i + 8 * r, sum[i][r]);
  }
}

// A block of columns, from column `k0` on, of the four rows of weights from row n on.
template <Format F>
struct WeightBlock {
  static const int64_t bits = F == FP32 ? 32 : F == BF16 ? 16 : F == INT8 ? 8 : 4;
  const Matrix& m;
  const int64_t n, k0;
  const char* row[4];

  WeightBlock(const Matrix& matrix, int64_t n, int64_t k0) : m(matrix), n(n), k0(k0) {
    for (int r = 0; r < 4; r++)
      row[r] = static_cast<const char*>(m.data) + ((n + r) * m.stride + k0) * bits / 8;
  }
};

// Stores the input as one array [R, columns of the block] per block of columns: rows that lie
// further apart would evict each other from the cache.
void pack_input_blocks(const float* x, int64_t x_stride, int64_t R, int64_t stride, float* blocks) {
  for (int64_t k0 = 0; k0 < stride; k0 += KC) {
    const int64_t columns = std::min(KC, stride - k0);
    for (int64_t row = 0; row < R; row++)
      std::memcpy(blocks + R * k0 + row * columns, x + row * x_stride + k0, 4 * columns);
  }
}

// y[row, n] = x[row] . m[n] for all rows of input and the n of the range. `blocks` is the input as
// `pack_input_blocks` leaves it.
template <Format F>
void gemm_blocked(const Matrix& m, Range range, const float* blocks, int64_t R,
                  Workspace& workspace, float* y, int64_t y_stride) {
  const int64_t tiles = (R + BLOCKED_MR - 1) / BLOCKED_MR;
  float *sums = workspace.reserve(R * 64 + 4 * KC), *converted = sums + R * 64;
  for (int64_t n = range.begin; n < range.end; n += 4) {
    for (int64_t k0 = 0; k0 < m.stride; k0 += KC) {
      const int64_t columns = std::min(KC, m.stride - k0);
      const bool last_block = k0 + KC >= m.stride;
      const WeightBlock<F> weights(m, n, k0);
      const WeightBlock<F> next(m, last_block ? std::min(n + 4, m.rows - 4) : n,
                                last_block ? 0 : k0 + KC);
      const float* w = F == FP32 ? reinterpret_cast<const float*>(weights.row[0]) : converted;
      const int64_t stride = F == FP32 ? m.stride : KC;
      // The next block is prefetched evenly over both halves of all tiles.
      RowsPrefetch next_block(next.row, columns * weights.bits / 8);
      const int64_t rate = 128 * weights.bits / (2 * tiles);
      int64_t row = 0;
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t mr = (R - row + tiles - t - 1) / (tiles - t);  // 2 or 3, as even as possible
        const float* block = blocks + R * k0 + row * columns;
        float* out = sums + row * 64;
        if (F == BF16 && t == 0) {
          const auto kernel =
              mr == 2 ? blocked_microkernel<2, uint16_t> : blocked_microkernel<3, uint16_t>;
          kernel(reinterpret_cast<const uint16_t*>(weights.row[0]), m.stride, converted, block,
                 columns, k0 == 0, next_block, rate, out);
        } else {
          const auto kernel =
              mr == 2 ? blocked_microkernel<2, float> : blocked_microkernel<3, float>;
          kernel(w, stride, nullptr, block, columns, k0 == 0, next_block, rate, out);
        }
        row += mr;
      }
    }
    for (int64_t row = 0; row < R; row++) {
      __m256 all[2][4];
      for (int i = 0; i < 8; i++) all[i / 4][i % 4] = _mm256_load_ps(sums + 64 * row + 8 * i);
      _mm_storeu_ps(y + row * y_stride + n, horizontal_sums4(all[0], all[1]));
    }
  }
}

void gemm_blocked(const Matrix& m, Range range, const float* blocks, int64_t R,
                  Workspace& workspace, float* y, int64_t y_stride) {
  const auto gemm = m.format == FP32 ? gemm_blocked<FP32> : gemm_blocked<BF16>;
  gemm(m, range, blocks, R, workspace, y, y_stride);
}

}  // namespace

#endif
