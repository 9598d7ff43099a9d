// Dequantises packed weights to fp32 or bf16, row by row: `unpack` of model/quantise.py, which
// describes the layout.

#include "simd.h"

namespace {

inline void store_as(float value, float* out) { *out = value; }
inline void store_as(float value, uint16_t* out) { *out = float_to_bf16(value); }

template <typename Out>
void dequantise_int8_row(const int8_t* data, float scale, int64_t columns, Out* out) {
  for (int64_t i = 0; i < columns; ++i) store_as(data[i] * scale, out + i);
}

// 32 bytes hold 64 columns as levels plus 8: the first 32 in the low nibbles, the next 32 in the
// high ones.
template <typename Out>
void dequantise_int4_row(const uint8_t* data, const uint16_t* scales, int64_t columns, Out* out) {
  for (int64_t start = 0; start < columns; start += 32) {
    const uint8_t* bytes = data + start / 64 * 32;
    const int shift = start / 32 % 2 * 4;
    const float scale = bf16_to_float(scales[start / 32]);
    const int64_t count = columns - start < 32 ? columns - start : 32;
    for (int64_t i = 0; i < count; ++i)
      store_as(((bytes[i] >> shift & 15) - 8) * scale, out + start + i);
  }
}

template <typename Out>
void dequantise(const uint8_t* data, const void* scales, int64_t bits, int64_t rows,
                int64_t columns, int64_t padded, Out* out, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    if (bits == 8)
      dequantise_int8_row(reinterpret_cast<const int8_t*>(data) + row * padded,
                          static_cast<const float*>(scales)[row], columns, out + row * columns);
    else
      dequantise_int4_row(data + row * padded / 2,
                          static_cast<const uint16_t*>(scales) + row * padded / 32, columns,
                          out + row * columns);
  }
}

}  // namespace

// `data` has `padded` columns, of which `columns` are wanted; `to_bf16` is 1 for bf16, 0 for fp32.
extern "C" void earlyfusion_unpack(const uint8_t* data, const void* scales, int64_t bits,
                                   int64_t rows, int64_t columns, int64_t padded, void* out,
                                   int64_t to_bf16, int64_t threads) {
  if (to_bf16)
    dequantise(data, scales, bits, rows, columns, padded, static_cast<uint16_t*>(out), threads);
  else
    dequantise(data, scales, bits, rows, columns, padded, static_cast<float*>(out), threads);
}
