// Products of a step's inputs and weight matrices, for cpu_step.cpp.
//
// Weights are fp32, bf16, int8 (one scale per row) or int4 (one bf16 scale per 32 columns). Columns are
// padded with zeros to a multiple of 64. Processors with AVX-512 have products of their own (avx512.h), those with AVX2
// others (blocks.h, panels.h, integers.h). What is left to this file are one to three rows of input on AVX2, other
// processors, and bf16 weights where AVX-512 cannot multiply bf16.

#pragma once

#include "avx512.h"
#include "blocks.h"
#include "integers.h"
#include "operands.h"
#include "panels.h"

namespace {

// How far ahead to prefetch in a row of weights: to the same columns of the next four rows where rows
// are too short for the processor to prefetch by itself, else `bytes` further on.
inline int64_t prefetch_distance(int64_t row_bytes, int64_t bytes) {
#if defined(VECTORS_OF_EIGHT)
  return 4 * row_bytes;
#else
  return row_bytes <= 4096 ? 4 * row_bytes : bytes;
#endif
}

#if defined(VECTORS_OF_EIGHT)
// `plain4` below for registers of eight floats: X rows of input and four rows of weights. Vectors of
// sixteen have a lower and an upper side; with X > 1 the sums of both do not fit into the registers,
// so that a block of columns is passed once for each side.
template <int X, class W, class A>
inline floats16 eights4(const W* w, int64_t stride, const A* input, int64_t input_stride,
                        int64_t distance) {
  const int64_t block = 512;
  const int together = X == 1 ? 2 : 1;  // sides at once
  __m256 acc[X][2][4];  // [row of input][side][row of weights]
  for (int i = 0; i < X; i++)
    for (int r = 0; r < 4; r++) acc[i][0][r] = acc[i][1][r] = _mm256_setzero_ps();
  for (int64_t first = 0; first < stride; first += block) {
    const int64_t last = std::min(stride, first + block);
    for (int side = 0; side < 2; side += together) {
      __m256 a[X][together][4];  // `acc` of this side, in registers
      for (int i = 0; i < X; i++)
        for (int h = 0; h < together; h++)
          for (int r = 0; r < 4; r++) a[i][h][r] = acc[i][side + h][r];
      for (int64_t c = first + 8 * side; c < last; c += 16)
#pragma GCC unroll 2
        for (int h = 0; h < together; h++) {
          __m256 x[X];
#pragma GCC unroll 4
          for (int i = 0; i < X; i++) x[i] = eight(input + i * input_stride + c + 8 * h);
#pragma GCC unroll 4
          for (int r = 0; r < 4; r++) {
            if (distance) fetch(w + r * stride + c, distance);
            __m256 v = eight(w + r * stride + c + 8 * h);
            if (X > 1) hold(v);
#pragma GCC unroll 4
            for (int i = 0; i < X; i++) a[i][h][r] = _mm256_fmadd_ps(v, x[i], a[i][h][r]);
          }
        }
      for (int i = 0; i < X; i++)
        for (int h = 0; h < together; h++)
          for (int r = 0; r < 4; r++) acc[i][side + h][r] = a[i][h][r];
    }
  }
  float out[16] = {};
  for (int i = 0; i < X; i++) _mm_storeu_ps(out + 4 * i, four_sums(acc[i][0], acc[i][1]));
  return load(out);
}
#endif

// ---- products

// The products of X rows of input and four rows of weights: each vector of weights feeds X sums.
// Entries 4 * x to 4 * x + 3 of the result are those of row x. Each is added up over the columns in
// the same order whatever X is, so that a row does not depend on the rows beside it.
template <int X, class W, class A>
floats16 plain4(const W* w, int64_t stride, const A* input, int64_t input_stride, int64_t distance) {
#if defined(VECTORS_OF_EIGHT)
  return eights4<X>(w, stride, input, input_stride, distance);
#else
  floats16 acc[4 * X] = {};
  for (int64_t c = 0; c < stride; c += 16) {
    floats16 x[X];
    for (int i = 0; i < X; i++) x[i] = load(input + i * input_stride + c);
    for (int r = 0; r < 4; r++) {
      if (distance) fetch(w + r * stride + c, distance);
      const floats16 v = load(w + r * stride + c);
      for (int i = 0; i < X; i++) acc[4 * i + r] = fused(v, x[i], acc[4 * i + r]);
    }
  }
  return sums<4 * X>(acc);
#endif
}

template <int X>
floats16 dots4(const float* w, int64_t stride, const Input& in, int64_t row) {
  const int64_t distance = X > 1 ? prefetch_distance(4 * stride, 1024) : 0;
  return plain4<X>(w, stride, in.fp32 + row * in.stride, in.stride, distance);
}

template <int X>
floats16 dots4(const int8_t* w, const float* scale, int64_t stride, const Input& in, int64_t row) {
  const float* input = in.fp32 + row * in.stride;
  floats16 scales;  // of the four rows, once for each row of input
  for (int i = 0; i < 16; i++) scales[i] = scale[i % 4];
  return plain4<X>(w, stride, input, in.stride, prefetch_distance(stride, 1024)) * scales;
}

template <int X>
floats16 dots4(const uint16_t* w, int64_t stride, const Input& in, int64_t row) {
  return plain4<X>(w, stride, in.rounded + row * in.stride, in.stride, prefetch_distance(2 * stride, 1024));
}

// `unpacked` holds the four rows of an int4 matrix as floats: a level times its scale is exact in fp32.
template <int X>
floats16 four_rows(const Matrix& m, int64_t first, const Input& in, int64_t row,
                   const float* unpacked) {
  const int64_t at = first * m.stride;
  if (unpacked) return plain4<X>(unpacked, m.stride, in.rounded + row * in.stride, in.stride, 0);
  switch (m.format) {
    case FP32:
      return dots4<X>(static_cast<const float*>(m.data) + at, m.stride, in, row);
    case BF16:
      return dots4<X>(static_cast<const uint16_t*>(m.data) + at, m.stride, in, row);
    default:
      return dots4<X>(static_cast<const int8_t*>(m.data) + at,
                      static_cast<const float*>(m.scales) + first, m.stride, in, row);
  }
}

template <int X>
void put_four(const Matrix& m, int64_t first, const Input& in, int64_t row, const float* unpacked,
              float* y, int64_t y_stride) {
  float out[16];
  store(out, four_rows<X>(m, first, in, row, unpacked));
  for (int x = 0; x < X; x++) std::memcpy(y + (row + x) * y_stride + first, out + 4 * x, 16);
}

#if !defined(VECTORS_OF_EIGHT)
const int64_t TILE = 4;  // rows of input whose sums fit into the registers
#endif

// Columns first to first + 3 of y, for the tile of rows from `row` on.
void put_tile(const Matrix& m, int64_t first, const Input& in, int64_t row, int64_t R,
              const float* unpacked, float* y, int64_t y_stride) {
  switch (std::min(TILE, R - row)) {
    case 1: return put_four<1>(m, first, in, row, unpacked, y, y_stride);
    case 2: return put_four<2>(m, first, in, row, unpacked, y, y_stride);
    case 3: return put_four<3>(m, first, in, row, unpacked, y, y_stride);
    default: return put_four<4>(m, first, in, row, unpacked, y, y_stride);
  }
}

// How many rows of weights all rows of input are multiplied with at a time: four while the inputs
// stay in the first-level cache, else what fits into 128 KB, half of a second-level cache, so that
// the inputs are read less often.
int64_t panel(const Matrix& m, int64_t R) {
  return R <= 16 || m.format == INT4 ? 4 : std::max<int64_t>(4, (int64_t(1) << 17) / row_bytes(m) / 4 * 4);
}

#if defined(VECTORS_OF_EIGHT)
bool in_whole_numbers(const Matrix& m) { return m.format == INT8 || m.format == INT4; }
#endif

// R rows of input, in the order in which the products with matrices like `m` read them. A thread has one at a
// time, as they share its memory.
class Operand {
 public:
  Operand(const Matrix& m, const Input& in, int64_t R) : in_(in), R_(R) {
#if defined(VECTORS_OF_SIXTEEN)
    static thread_local Room memory, scratch;
    if (in_words(m)) words_.emplace(m, in, R, memory, scratch);
#endif
#if defined(VECTORS_OF_EIGHT)
    if (in_whole_numbers(m)) {
      static thread_local Room memory;
      ordered_ = memory.of(Whole::floats(R, m.stride));
      const Whole whole(ordered_, R, m.stride);
      m.format == INT8 ? whole.fill<INT8>(in.fp32, in.stride, m.stride)
                       : whole.fill<INT4>(in.fp32, in.stride, m.stride);
      return;
    }
    if (R < FEW) return;
    const float* x = reads_bf16(m) ? in.rounded : in.fp32;
    static thread_local Room memory;
    ordered_ = memory.of(R * m.stride);
    if (R < MANY)
      order_blocks(x, in.stride, R, m.stride, ordered_);
    else
      turned(m).fill(x, in.stride);
#endif
  }

  // y[row, n] = in[row] . m[n] for all rows and the n of `range`.
  void multiply(const Matrix& m, Range range, float* y, int64_t y_stride) const {
#if defined(VECTORS_OF_SIXTEEN)
    static thread_local Room room;
    if (words_) return words_->multiply(m, range, room, y, y_stride);
#endif
#if defined(VECTORS_OF_EIGHT)
    static thread_local Room memory;
    if (in_whole_numbers(m)) {
      const int64_t width = R_ >= WIDE ? PANEL : 4;
      const Whole whole(ordered_, R_, m.stride);
      return (m.format == INT8 ? put_whole<INT8> : put_whole<INT4>)(m, range, whole, width, memory, y, y_stride);
    }
    if (R_ >= MANY) return put_panels(m, range, turned(m), memory, y, y_stride);
    if (R_ >= FEW) return put_few(m, range, ordered_, R_, memory, y, y_stride);
#endif
    const int64_t width = panel(m, R_);
    const bool unpacks = m.format == INT4;
    Aligned<float> unpacked(unpacks ? 4 * m.stride : 0);
    for (int64_t first = range.first; first < range.last; first += width) {
      const int64_t last = std::min(first + width, range.last), at = first * m.stride;
      if (unpacks)
        unpack_int4(static_cast<const uint8_t*>(m.data) + at / 2,
                    static_cast<const uint16_t*>(m.scales) + at / 32, 4 * m.stride, unpacked.data());
      for (int64_t row = 0; row < R_; row += TILE)
        for (int64_t n = first; n < last; n += 4)
          put_tile(m, n, in_, row, R_, unpacks ? unpacked.data() : nullptr, y, y_stride);
    }
  }

 private:
#if defined(VECTORS_OF_SIXTEEN)
  std::optional<WordOperand> words_;
#endif
#if defined(VECTORS_OF_EIGHT)
  Turned turned(const Matrix& m) const { return {Tiles(R_), m.stride / SUMS, ordered_}; }
  float* ordered_ = nullptr;
#endif
  const Input& in_;
  int64_t R_;
};

// The rows of a matrix, shared among threads for a product with R rows of input: panels, or at least four parts for
// each thread, in fours, as matrices are padded to a multiple of four.
Shares shares(const Matrix& m, int64_t R, int64_t threads) {
  int64_t size = std::max<int64_t>(4, std::min<int64_t>(64, m.rows / threads / 4 / 4 * 4));
#if defined(VECTORS_OF_SIXTEEN)
  if (in_words(m) && way(m, R) == PANELS) size = PANEL;
#endif
#if defined(VECTORS_OF_EIGHT)
  if (in_whole_numbers(m) ? R >= WIDE : R >= MANY) size = PANEL;
#endif
  return Shares(m.rows, size, threads);
}

}  // namespace
