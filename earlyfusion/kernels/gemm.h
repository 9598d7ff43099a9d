// GEMM of a step: which kernel multiplies an input with a weight matrix, and the kernels that are
// left to every processor.
//
// Weights are fp32, bf16, int8 (one scale per row) or int4 (one bf16 scale per 32 columns), with
// columns padded with zeros to a multiple of 64. On one processor, all kinds of kernels give the
// same results to the bit (operands.h has the order of their sums; AMX has its own for bf16):
//
// - streamed: the sums of a tile stay in registers while whole rows of weights are read; for few
//   rows of input, and on AVX-512 for short rows of weights;
// - blocked: all rows of input are multiplied with one block of columns of four rows of weights
//   before the next; for some rows of input;
// - tiled: up to eight rows of input are multiplied with a panel of weights before the next ones;
//   for some rows of input on AVX-512;
// - packed: panels of weights are packed for a microkernel, as in GotoBLAS; for many rows of input;
// - AMX: tiles of weights, read in place, are multiplied with packed tiles of input; for any number
//   of rows of bf16 and int8 weights, and for many rows of int4 weights.
//
// AVX-512 has all in gemm_avx512.h; AVX2 has blocked and packed ones in gemm_avx2_*.h. The streamed
// kernels below are for one to three rows of input on AVX2, for other processors, and for bf16
// weights where AVX-512 cannot multiply bf16.

#pragma once

#include "gemm_amx.h"
#include "gemm_avx2_blocked.h"
#include "gemm_avx2_int16.h"
#include "gemm_avx2_packed.h"
#include "gemm_avx512.h"
#include "operands.h"

namespace {

// The prefetch distance within rows of weights: the same columns of the next four rows where rows
// are too short for the hardware prefetcher, else `bytes`.
inline int64_t prefetch_distance(int64_t row_bytes, int64_t bytes) {
#if defined(USE_AVX2)
  return 4 * row_bytes;
#else
  return row_bytes <= 4096 ? 4 * row_bytes : bytes;
#endif
}

#if defined(USE_AVX2)
// `streamed_microkernel` on AVX2. A vector of 16 columns has a low and a high half. With MR > 1 the
// sums of both do not fit into the registers, so each block of columns is read once per half.
template <int MR, class W, class A>
inline floats16 streamed_microkernel_avx2(const W* w, int64_t stride, const A* input,
                                          int64_t input_stride, int64_t distance) {
  const int64_t block = 512;
  const int halves = MR == 1 ? 2 : 1;  // halves at once
  __m256 sums[MR][2][4];               // [row of input][half][row of weights]
  for (int i = 0; i < MR; i++)
    for (int r = 0; r < 4; r++) sums[i][0][r] = sums[i][1][r] = _mm256_setzero_ps();
  for (int64_t first = 0; first < stride; first += block) {
    const int64_t last = std::min(stride, first + block);
    for (int half = 0; half < 2; half += halves) {
      __m256 a[MR][halves][4];  // `sums` of these halves, in registers
      for (int i = 0; i < MR; i++)
        for (int h = 0; h < halves; h++)
          for (int r = 0; r < 4; r++) a[i][h][r] = sums[i][half + h][r];
      for (int64_t c = first + 8 * half; c < last; c += 16)
#pragma GCC unroll 2
        for (int h = 0; h < halves; h++) {
          __m256 x[MR];
#pragma GCC unroll 4
          for (int i = 0; i < MR; i++) x[i] = load8(input + i * input_stride + c + 8 * h);
#pragma GCC unroll 4
          for (int r = 0; r < 4; r++) {
            if (distance) prefetch(w + r * stride + c, distance);
            __m256 v = load8(w + r * stride + c + 8 * h);
            if (MR > 1) keep_in_register(v);
#pragma GCC unroll 4
            for (int i = 0; i < MR; i++) a[i][h][r] = _mm256_fmadd_ps(v, x[i], a[i][h][r]);
          }
        }
      for (int i = 0; i < MR; i++)
        for (int h = 0; h < halves; h++)
          for (int r = 0; r < 4; r++) sums[i][half + h][r] = a[i][h][r];
    }
  }
  float out[16] = {};
  for (int i = 0; i < MR; i++) _mm_storeu_ps(out + 4 * i, horizontal_sums4(sums[i][0], sums[i][1]));
  return load(out);
}
#endif

// x [MR, columns] . w [4, columns]: elements 4 * i to 4 * i + 3 of the result are those of row i of
// the input. Each vector of weights is used MR times. The order of a sum does not depend on MR, so
// a row does not depend on the rows beside it.
template <int MR, class W, class A>
floats16 streamed_microkernel(const W* w, int64_t stride, const A* input, int64_t input_stride,
                              int64_t distance) {
#if defined(USE_AVX2)
  return streamed_microkernel_avx2<MR>(w, stride, input, input_stride, distance);
#else
  floats16 sums[4 * MR] = {};
  for (int64_t c = 0; c < stride; c += 16) {
    floats16 x[MR];
    for (int i = 0; i < MR; i++) x[i] = load(input + i * input_stride + c);
    for (int r = 0; r < 4; r++) {
      if (distance) prefetch(w + r * stride + c, distance);
      const floats16 v = load(w + r * stride + c);
      for (int i = 0; i < MR; i++) sums[4 * i + r] = fmadd(v, x[i], sums[4 * i + r]);
    }
  }
  return horizontal_sums<4 * MR>(sums);
#endif
}

// The same with four rows of fp32, int8 or bf16 weights, and the input that these take.
template <int MR>
floats16 multiply_rows4(const float* w, int64_t stride, const Input& in, int64_t row) {
  const int64_t distance = MR > 1 ? prefetch_distance(4 * stride, 1024) : 0;
  return streamed_microkernel<MR>(w, stride, in.fp32 + row * in.stride, in.stride, distance);
}

template <int MR>
floats16 multiply_rows4(const int8_t* w, const float* scale, int64_t stride, const Input& in,
                        int64_t row) {
  const float* input = in.fp32 + row * in.stride;
  floats16 scales;  // of the four rows, repeated for each row of input
  for (int i = 0; i < 16; i++) scales[i] = scale[i % 4];
  return streamed_microkernel<MR>(w, stride, input, in.stride, prefetch_distance(stride, 1024)) *
         scales;
}

template <int MR>
floats16 multiply_rows4(const uint16_t* w, int64_t stride, const Input& in, int64_t row) {
  return streamed_microkernel<MR>(w, stride, in.bf16 + row * in.stride, in.stride,
                                  prefetch_distance(2 * stride, 1024));
}

// Rows n to n + 3 of a matrix in any format, times MR rows of input. `dequantised` holds them as
// floats if they are int4: a level times its scale is exact in fp32.
template <int MR>
floats16 streamed_rows4(const Matrix& m, int64_t n, const Input& in, int64_t row,
                        const float* dequantised) {
  const int64_t at = n * m.stride;
  if (dequantised)
    return streamed_microkernel<MR>(dequantised, m.stride, in.bf16 + row * in.stride, in.stride, 0);
  switch (m.format) {
    case FP32: return multiply_rows4<MR>(static_cast<const float*>(m.data) + at, m.stride, in, row);
    case BF16:
      return multiply_rows4<MR>(static_cast<const uint16_t*>(m.data) + at, m.stride, in, row);
    default:
      return multiply_rows4<MR>(static_cast<const int8_t*>(m.data) + at,
                                static_cast<const float*>(m.scales) + n, m.stride, in, row);
  }
}

template <int MR>
void store_rows4(const Matrix& m, int64_t n, const Input& in, int64_t row, const float* dequantised,
                 float* y, int64_t y_stride) {
  float out[16];
  store(out, streamed_rows4<MR>(m, n, in, row, dequantised));
  for (int x = 0; x < MR; x++) std::memcpy(y + (row + x) * y_stride + n, out + 4 * x, 16);
}

// Rows of input of a tile, whose sums fit into the registers.
#if defined(USE_AVX2)
const int64_t STREAMED_MR = 3;
#else
const int64_t STREAMED_MR = 4;
#endif

// Columns n to n + 3 of y, for at most STREAMED_MR rows of input from `row` on.
void streamed_tile(const Matrix& m, int64_t n, const Input& in, int64_t row, int64_t R,
                   const float* dequantised, float* y, int64_t y_stride) {
  switch (std::min(STREAMED_MR, R - row)) {
    case 1: return store_rows4<1>(m, n, in, row, dequantised, y, y_stride);
    case 2: return store_rows4<2>(m, n, in, row, dequantised, y, y_stride);
    case 3: return store_rows4<3>(m, n, in, row, dequantised, y, y_stride);
    default: return store_rows4<4>(m, n, in, row, dequantised, y, y_stride);
  }
}

// How many rows of weights are multiplied with all rows of input before the next ones: four while
// the input stays in the L1 cache, else what fits into 128 KB, half of an L2 cache, so that the
// input is read less often.
int64_t streamed_panel_rows(const Matrix& m, int64_t R) {
  return R <= 16 || m.format == INT4
             ? 4
             : std::max<int64_t>(4, (int64_t(1) << 17) / row_bytes(m) / 4 * 4);
}

#if defined(USE_AVX2)
bool uses_int16(const Matrix& m) { return m.format == INT8 || m.format == INT4; }
#endif

// R rows of input, quantised or packed for the kernel that multiplies them with matrices like `m`.
// A thread has one at a time, as all use the same workspaces.
class Gemm {
 public:
  Gemm(const Matrix& m, const Input& in, int64_t R) : in_(in), R_(R) {
#if defined(USE_AMX)
    static thread_local Workspace tiles;
    if (uses_amx(m, R)) {
      if (m.format == BF16)
        amx_bf16_.emplace(in, R);
      else
        amx_integer_.emplace(m, in, R, tiles);
      return;
    }
#endif
#if defined(USE_AVX512)
    static thread_local Workspace packed, scratch;
    if (has_avx512_kernel(m)) avx512_.emplace(m, in, R, packed, scratch);
#endif
#if defined(USE_AVX2)
    if (uses_int16(m)) {
      static thread_local Workspace packed;
      packed_ = packed.reserve(QuantisedInput::size_in_floats(R, m.stride));
      const QuantisedInput quantised(packed_, R, m.stride);
      m.format == INT8 ? quantised.quantise<INT8>(in.fp32, in.stride, m.stride)
                       : quantised.quantise<INT4>(in.fp32, in.stride, m.stride);
      return;
    }
    if (R < BLOCKED_MIN_ROWS) return;
    const float* x = takes_bf16_input(m) ? in.bf16 : in.fp32;
    static thread_local Workspace packed;
    packed_ = packed.reserve(R * m.stride);
    if (R < PACKED_MIN_ROWS)
      pack_input_blocks(x, in.stride, R, m.stride, packed_);
    else
      packed_input(m).pack(x, in.stride);
#endif
  }

  // y[row, n] = x[row] . m[n] for all rows of input and the n of the range.
  void multiply(const Matrix& m, Range range, float* y, int64_t y_stride) const {
#if defined(USE_AMX)
    static thread_local Workspace sums, copy;
    if (amx_bf16_) return amx_bf16_->multiply(m, range, sums, copy, y, y_stride);
    if (amx_integer_) return amx_integer_->multiply(m, range, sums, copy, y, y_stride);
#endif
#if defined(USE_AVX512)
    static thread_local Workspace workspace;
    if (avx512_) return avx512_->multiply(m, range, workspace, y, y_stride);
#endif
#if defined(USE_AVX2)
    static thread_local Workspace workspace;
    if (uses_int16(m)) {
      const int64_t width = R_ >= WIDE_MIN_ROWS ? NR : 4;
      const QuantisedInput quantised(packed_, R_, m.stride);
      return (m.format == INT8 ? gemm_int16<INT8> : gemm_int16<INT4>)(m, range, quantised, width,
                                                                      workspace, y, y_stride);
    }
    if (R_ >= PACKED_MIN_ROWS)
      return gemm_packed(m, range, packed_input(m), workspace, y, y_stride);
    if (R_ >= BLOCKED_MIN_ROWS) return gemm_blocked(m, range, packed_, R_, workspace, y, y_stride);
#endif
    const int64_t width = streamed_panel_rows(m, R_);
    const bool is_int4 = m.format == INT4;
    AlignedVector<float> dequantised(is_int4 ? 4 * m.stride : 0);
    for (int64_t first = range.begin; first < range.end; first += width) {
      const int64_t last = std::min(first + width, range.end), at = first * m.stride;
      if (is_int4)
        dequantise_int4(static_cast<const uint8_t*>(m.data) + at / 2,
                        static_cast<const uint16_t*>(m.scales) + at / 32, 4 * m.stride,
                        dequantised.data());
      for (int64_t row = 0; row < R_; row += STREAMED_MR)
        for (int64_t n = first; n < last; n += 4)
          streamed_tile(m, n, in_, row, R_, is_int4 ? dequantised.data() : nullptr, y, y_stride);
    }
  }

  // inner = silu(x gate^T) * (x up^T), for the columns of the range; if `takes_tiles`.
  void multiply_swiglu(const Matrix& gate, const Matrix& up, Range range,
                       const Input& inner) const {
#if defined(USE_AMX)
    static thread_local Workspace sums, gate_copy, up_copy;
    amx_bf16_->multiply_swiglu(gate, up, range, sums, gate_copy, up_copy, inner);
#endif
  }

 private:
#if defined(USE_AMX)
  std::optional<AmxBf16Gemm> amx_bf16_;
  std::optional<AmxIntegerGemm> amx_integer_;
#endif
#if defined(USE_AVX512)
  std::optional<Avx512Gemm> avx512_;
#endif
#if defined(USE_AVX2)
  PackedInput packed_input(const Matrix& m) const {
    return {Tiles(R_), m.stride / PARTIALS, packed_};
  }
  float* packed_ = nullptr;
#endif
  const Input& in_;
  int64_t R_;
};

// Partitions the rows of a matrix among threads, for a product with R rows of input: into panels
// for packed kernels, else into multiples of four rows, at least four chunks per thread if there
// are enough.
RowPartition partition(const Matrix& m, int64_t R, int64_t threads) {
  int64_t chunk = std::max<int64_t>(4, std::min<int64_t>(64, m.rows / threads / 4 / 4 * 4));
#if defined(USE_AMX)
  if (uses_amx(m, R)) {
    const int64_t panel = m.format == BF16 ? panel_rows(R) : AMX_INTEGER_NR;
    chunk = std::min(panel, m.rows / threads / 4);
    return RowPartition(m.rows, std::max(TILE, chunk / TILE * TILE), threads);
  }
#endif
#if defined(USE_AVX512)
  if (has_avx512_kernel(m)) {
    const Algorithm algorithm = algorithm_for(m, R);
    if (algorithm == PACKED) chunk = NR;
    if (algorithm == TILED) chunk = std::min(chunk, tiled_panel_rows(m));
  }
#endif
#if defined(USE_AVX2)
  if (uses_int16(m) ? R >= WIDE_MIN_ROWS : R >= PACKED_MIN_ROWS) chunk = NR;
#endif
  return RowPartition(m.rows, chunk, threads);
}

}  // namespace
