// A weight matrix and the input of its products, for products.h, panels.h and cpu_step.cpp.

#pragma once

#include <omp.h>

#include <algorithm>

#include "simd.h"

namespace {

// A weight matrix, as in cpu_step.py.
enum Format : int64_t { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };  // of weights and of the cache

struct Matrix {
  const void* data;
  const void* scales;            // of int8 and int4
  int64_t rows, stride, format;  // stride: padded columns
};

inline int64_t row_bytes(const Matrix& m) {
  const int64_t bits[] = {32, 16, 8, 4};
  return m.stride * bits[m.format] / 8;
}

// How inputs that are rounded to bf16 are stored: where no instruction multiplies bf16, as floats.
#if defined(VECTORS_OF_EIGHT)
typedef float rounded_t;
inline float rounded(float x) { return as_float(as_bf16(x)); }
#else
typedef uint16_t rounded_t;
inline uint16_t rounded(float x) { return as_bf16(x); }
#endif

// The input of a product in fp32 and rounded to bf16, R rows, zero after the last column.
struct Input {
  float* fp32;
  rounded_t* rounded;  // null where the weights are fp32 or int8
  int64_t stride;

  void put(int64_t row, int64_t column, const float* x, int64_t n) const {
    std::memcpy(fp32 + row * stride + column, x, n * sizeof(float));
    if (rounded) round(rounded + row * stride + column, x, n);
  }

  static void round(rounded_t* __restrict y, const float* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = ::rounded(x[i]);
  }
};

struct Range {
  int64_t first, last;  // last: one past the end
};

// This thread's share of the rows of weights, in fours: matrices are padded to a multiple of four.
Range share(int64_t rows) {
  const int64_t fours = rows / 4, thread = omp_get_thread_num(), threads = omp_get_num_threads();
  return {fours * thread / threads * 4, fours * (thread + 1) / threads * 4};
}

int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

// Memory for an `Input`.
struct Buffers {
  Aligned<float> fp32;
  Aligned<rounded_t> bf16;
  int64_t stride;

  Buffers(int64_t R, int64_t columns, bool rounded)
      : fp32(R * padded(columns)),
        bf16(rounded ? R * padded(columns) : 0),
        stride(padded(columns)) {}
  Input input() { return {fp32.data(), bf16.empty() ? nullptr : bf16.data(), stride}; }
};

// Whether a product with such a matrix reads its input in bf16.
bool reads_bf16(const Matrix& m) { return m.format == BF16 || m.format == INT4; }

}  // namespace
