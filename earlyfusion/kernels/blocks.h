// Products of a few rows of input for processors whose registers hold eight floats (AVX2 with FMA), in the
// order of sums of products.h.
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
// the `next` weights per 64 columns and side. Weights of bf16 or int8 are left in `unpacked` as floats, for the
// tiles after this one.
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

  // Weights of int4 as floats, BLOCK of room for each row.
  void unpack(int64_t columns, float* out) const {
    const uint16_t* scales = static_cast<const uint16_t*>(m.scales) + (n * m.stride + first) / 32;
    for (int r = 0; r < 4; r++)
      unpack_int4(reinterpret_cast<const uint8_t*>(row[r]), scales + r * m.stride / 32, columns, out + r * BLOCK);
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
  typedef std::conditional_t<F == BF16, uint16_t, int8_t> Packed;
  const int64_t tiles = (R + TILE - 1) / TILE;
  float *sums = memory.of(R * 64 + 4 * BLOCK), *unpacked = sums + R * 64;
  for (int64_t n = mine.first; n < mine.last; n += 4) {
    for (int64_t first = 0; first < m.stride; first += BLOCK) {
      const int64_t columns = std::min(BLOCK, m.stride - first);
      const bool ends = first + BLOCK >= m.stride;
      const Block4<F> here(m, n, first);
      const Block4<F> next(m, ends ? std::min(n + 4, m.rows - 4) : n, ends ? 0 : first + BLOCK);
      if (F == INT4) here.unpack(columns, unpacked);
      const float* w = F == FP32 ? reinterpret_cast<const float*>(here.row[0]) : unpacked;
      const int64_t stride = F == FP32 ? m.stride : BLOCK;
      // Each tile makes two passes, one for each side. Many bytes are fetched evenly in all of them; few are fetched
      // in the first ones, as the last would be too late for the memory's latency.
      Following4 following(next.row, columns * here.bits / 8);
      const int64_t each = 128 * here.bits / (here.bits > 8 ? 2 * tiles : tiles < 4 ? 4 : 8);
      int64_t row = 0;
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t X = (R - row + tiles - t - 1) / (tiles - t);  // 2 or 3, as even as possible
        const float* block = blocks + R * first + row * columns;
        float* out = sums + row * 64;
        if ((F == BF16 || F == INT8) && t == 0) {
          const auto pass = X == 2 ? block4<2, Packed> : block4<3, Packed>;
          pass(reinterpret_cast<const Packed*>(here.row[0]), m.stride, unpacked, block, columns, first == 0,
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
      __m128 out = four_sums(all[0], all[1]);
      if (F == INT8) out = _mm_mul_ps(out, _mm_loadu_ps(static_cast<const float*>(m.scales) + n));
      _mm_storeu_ps(y + row * y_stride + n, out);
    }
  }
}

void put_few(const Matrix& m, Range mine, const float* blocks, int64_t R, Room& memory, float* y,
             int64_t y_stride) {
  const auto put = m.format == FP32   ? put_few<FP32>
                   : m.format == BF16 ? put_few<BF16>
                   : m.format == INT8 ? put_few<INT8>
                                      : put_few<INT4>;
  put(m, mine, blocks, R, memory, y, y_stride);
}

}  // namespace

#endif
