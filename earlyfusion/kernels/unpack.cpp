// Rounded weights back to fp32 or bf16, row by row; model/quantise.py has the layout and the reasons.

#include "simd.h"

namespace {

inline void put(float value, float* out) { *out = value; }
inline void put(float value, uint16_t* out) { *out = as_bf16(value); }

template <typename Out>
void row8(const int8_t* data, float scale, int64_t columns, Out* out) {
  for (int64_t i = 0; i < columns; ++i) put(data[i] * scale, out + i);
}

// 32 bytes hold 64 columns: the first 32 in the low nibbles, the next 32 in the high ones. Levels are
// stored plus 8.
template <typename Out>
void row4(const uint8_t* data, const uint16_t* scales, int64_t columns, Out* out) {
  for (int64_t start = 0; start < columns; start += 32) {
    const uint8_t* bytes = data + start / 64 * 32;
    const int shift = start / 32 % 2 * 4;
    const float scale = as_float(scales[start / 32]);
    const int64_t count = columns - start < 32 ? columns - start : 32;
    for (int64_t i = 0; i < count; ++i) put(((bytes[i] >> shift & 15) - 8) * scale, out + start + i);
  }
}

template <typename Out>
void unpack(const uint8_t* data, const void* scales, int64_t bits, int64_t rows, int64_t columns,
            int64_t padded, Out* out, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    if (bits == 8)
      row8(reinterpret_cast<const int8_t*>(data) + row * padded,
           static_cast<const float*>(scales)[row], columns, out + row * columns);
    else
      row4(data + row * padded / 2, static_cast<const uint16_t*>(scales) + row * padded / 32,
           columns, out + row * columns);
  }
}

}  // namespace

// `data` has `padded` columns, of which `columns` are wanted; `to_bf16` is 1 for bf16, 0 for fp32.
extern "C" void earlyfusion_unpack(const uint8_t* data, const void* scales, int64_t bits,
                                   int64_t rows, int64_t columns, int64_t padded, void* out,
                                   int64_t to_bf16, int64_t threads) {
  if (to_bf16)
    unpack(data, scales, bits, rows, columns, padded, static_cast<uint16_t*>(out), threads);
  else
    unpack(data, scales, bits, rows, columns, padded, static_cast<float*>(out), threads);
}
