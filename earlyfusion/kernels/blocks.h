// Products of a few rows of input with fp32 and bf16 weights, for processors whose registers hold eight floats (AVX2
// with FMA), in the order of sums of products.h.
//
// All rows of input pass by one block of columns of four rows of weights, which stays as floats in the
// first-level cache, and the next block is fetched meanwhile: so reading memory and computing overlap.

#pragma once

#include "operands.h"

#if defined(VECTORS_OF_EIGHT)

namespace {

const int64_t TILE = 3;     // rows of input whose sums fit into the registers: 3 * 4 of 16
const int64_t FEW = 4;      // rows of input from which on this pays
const int64_t BLOCK = 512;  // columns that all rows of input pass by before the next ones are read

// Four rows of packed weights that are read next, fetched line by line.
class Following4 {
 public:
  Following4(const char* const* row, int64_t bytes) : lines_((bytes + 63) / 64) {
    for (int r = 0; r < 4; r++) row_[r] = row[r];
  }

  // Fetches `each` / 256 lines more.
  inline __attribute__((always_inline)) void fetch(int64_t each) {
    for (due_ += each; due_ >= 256; due_ -= 256) {
      _mm_prefetch(row_[r_] + 64 * line_, _MM_HINT_T0);
      if (++line_ == lines_) line_ = 0, r_ = (r_ + 1) % 4;
    }
  }

 private:
  const char* row_[4];
  int64_t lines_, line_ = 0, r_ = 0, due_ = 0;
};

// Adds the products of X rows of input with four rows of weights, in one block of columns, to their sums
// [X, side, row of weights, 8]; at the `beginning` these are nothing. Meanwhile it fetches `each` / 256 lines of
// the `next` weights per 64 columns and side. Weights of bf16 are left in `unpacked` as floats, for the tiles
// after this one.
template <int X, class T>
inline void block4(const T* w, int64_t stride, float* unpacked, const float* x, int64_t columns, bool beginning,
                   Following4& next, int64_t each, float* sums) {
  for (int side = 0; side < 2; side++) {
    __m256 sum[X][4];
    float* kept = sums + 32 * side;
#pragma GCC unroll 3
    for (int i = 0; i < X; i++)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++)
        sum[i][r] = beginning ? _mm256_setzero_ps() : _mm256_load_ps(kept + 64 * i + 8 * r);
    for (int64_t begin = 8 * side; begin < columns; begin += 64) {
      next.fetch(each);
#pragma GCC unroll 4
      for (int64_t c = begin; c < begin + 64; c += 16) {
        __m256 entries[X];
#pragma GCC unroll 3
        for (int i = 0; i < X; i++) hold(entries[i] = eight(x + i * columns + c));
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
          __m256 v = eight(w + r * stride + c);
          hold(v);
          if (!std::is_same_v<T, float>) _mm256_store_ps(unpacked + r * BLOCK + c, v);
#pragma GCC unroll 3
          for (int i = 0; i < X; i++) sum[i][r] = _mm256_fmadd_ps(v, entries[i], sum[i][r]);
        }
      }
    }
#pragma GCC unroll 3
    for (int i = 0; i < X; i++)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) _mm256_store_ps(kept + 64 * i + 8 * r, sum[i][r]);
  }
}

// Four rows of weights from row `n` on, and one block of their columns.
template <Format F>
struct Block4 {
  static const int64_t bits = F == FP32 ? 32 : F == BF16 ? 16 : F == INT8 ? 8 : 4;
  const Matrix& m;
  const int64_t n, first;
  const char* row[4];

  Block4(const Matrix& matrix, int64_t n, int64_t first) : m(matrix), n(n), first(first) {
    for (int r = 0; r < 4; r++)
      row[r] = static_cast<const char*>(m.data) + ((n + r) * m.stride + first) * bits / 8;
  }
};

// The input, block by block: rows far apart would push each other out of the cache.
void order_blocks(const float* x, int64_t x_stride, int64_t R, int64_t stride, float* blocks) {
  for (int64_t first = 0; first < stride; first += BLOCK) {
    const int64_t columns = std::min(BLOCK, stride - first);
    for (int64_t row = 0; row < R; row++)
      std::memcpy(blocks + R * first + row * columns, x + row * x_stride + first, 4 * columns);
  }
}

// `multiply` for few rows of input, in `blocks`; `memory` is room for sums and unpacked weights.
template <Format F>
void put_few(const Matrix& m, Range mine, const float* blocks, int64_t R, Room& memory, float* y,
             int64_t y_stride) {
  const int64_t tiles = (R + TILE - 1) / TILE;
  float *sums = memory.of(R * 64 + 4 * BLOCK), *unpacked = sums + R * 64;
  for (int64_t n = mine.first; n < mine.last; n += 4) {
    for (int64_t first = 0; first < m.stride; first += BLOCK) {
      const int64_t columns = std::min(BLOCK, m.stride - first);
      const bool ends = first + BLOCK >= m.stride;
      const Block4<F> here(m, n, first);
      const Block4<F> next(m, ends ? std::min(n + 4, m.rows - 4) : n, ends ? 0 : first + BLOCK);
      const float* w = F == FP32 ? reinterpret_cast<const float*>(here.row[0]) : unpacked;
      const int64_t stride = F == FP32 ? m.stride : BLOCK;
      // Each tile makes two passes, one for each side, in which the next block is fetched evenly.
      Following4 following(next.row, columns * here.bits / 8);
      const int64_t each = 128 * here.bits / (2 * tiles);
      int64_t row = 0;
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t X = (R - row + tiles - t - 1) / (tiles - t);  // 2 or 3, as even as possible
        const float* block = blocks + R * first + row * columns;
        float* out = sums + row * 64;
        if (F == BF16 && t == 0) {
          const auto pass = X == 2 ? block4<2, uint16_t> : block4<3, uint16_t>;
          pass(reinterpret_cast<const uint16_t*>(here.row[0]), m.stride, unpacked, block, columns, first == 0,
               following, each, out);
        } else {
          const auto pass = X == 2 ? block4<2, float> : block4<3, float>;
          pass(w, stride, nullptr, block, columns, first == 0, following, each, out);
        }
        row += X;
      }
    }
    for (int64_t row = 0; row < R; row++) {
      __m256 all[2][4];
      for (int i = 0; i < 8; i++) all[i / 4][i % 4] = _mm256_load_ps(sums + 64 * row + 8 * i);
      _mm_storeu_ps(y + row * y_stride + n, four_sums(all[0], all[1]));
    }
  }
}

void put_few(const Matrix& m, Range mine, const float* blocks, int64_t R, Room& memory, float* y,
             int64_t y_stride) {
  const auto put = m.format == FP32 ? put_few<FP32> : put_few<BF16>;
  put(m, mine, blocks, R, memory, y, y_stride);
}

}  // namespace

#endif
