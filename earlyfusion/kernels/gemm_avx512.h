// GEMM on AVX-512 for any number of rows of input and all formats of weights.
//
// Microkernels multiply words of 32 bits: a float, two bf16 (where the processor multiplies them),
// or two int16 for int8 and int4 weights. An output is the same to the bit in all four kinds of
// kernels (see gemm.h):
//
// Streamed (`gemm_streamed`): a lane holds one of the 16 partial sums of an output. Eight rows of
// weights are multiplied with one row of input, four with up to four, or two with up to eight, from
// their first to their last column, with the sums in registers.
//
// Blocked (`gemm_blocked`, `gemm_blocked_int16`): the same lanes, but all rows of input are
// multiplied with one block of columns of four rows of weights, which stays in the L1 cache, while
// the next four rows are prefetched evenly.
//
// Tiled (`gemm_tiled`): the same lanes and microkernel, but up to eight rows of input stay in the
// L1 cache while they are multiplied with a panel of weights in the L2 cache, and the next panel is
// prefetched evenly. Nothing is packed.
//
// Packed (`gemm_packed`, `gemm_packed_int16`): a lane is an output. NR rows of weights are packed
// into a panel, in which a vector holds one word of 16 rows. It stays in the L2 cache for all tiles
// of up to PACKED_MR rows of input. The 16 partial sums of an output are computed one after the
// other and added up in the order of `horizontal_sums`.
//
// int16: the input is quantised with one scale for each block of KC columns of a row. int8 weights
// are converted; int4 weights are requantised to at most +-800 with one scale for each block of a
// row. A sum over a block is exact and fits into 32 bits; the sums of blocks are floats.

#pragma once

#include "operands.h"

#if defined(USE_AVX512)

namespace {

const int64_t NR = 32;          // rows of weights of a panel
const int64_t PACKED_MR = 12;   // rows of input of a packed tile: 2 * 12 of 32 registers
const int64_t GROUP_TILES = 4;  // tiles multiplied with a part of a panel while it is in L1
const int64_t BLOCKED_MR = 6;   // rows of input of a blocked tile: 6 * 4 of 32 registers
const int64_t KC_WORDS = 512;   // words of a row of weights in a block
const int ROWS_FOR_ONE = 8;     // rows of weights that are read at once for one row of input

// Tiled kernels. A tile of input and four rows of weights, of 1,024 words each, take 40 KB of the
// L1 cache; a panel and the next one take less than the L2 cache.
const int64_t TILED_KC_WORDS = 1024;        // words of a row in a block
const int64_t TILED_NR = 64;                // rows of weights of a panel, at most
const int64_t TILED_PANEL_BYTES = 3 << 17;  // bytes of a panel, at most

#if defined(__AVX512VP2INTERSECT__)
const bool IS_ZEN5 = true;  // only Zen 5 and Tiger Lake have this extension
#else
const bool IS_ZEN5 = false;
#endif
#if defined(__AMX_TILE__)
const bool IS_XEON = true;  // loads and multiplies 512 bits twice per cycle
#else
const bool IS_XEON = false;
#endif

bool uses_int16(const Matrix& m) { return m.format == INT8 || m.format == INT4; }

enum Algorithm { STREAMED, BLOCKED, TILED, PACKED };

// The fastest kind of kernel for R rows of input and a matrix of this size, as measured.
inline Algorithm algorithm_for(const Matrix& m, int64_t R) {
  if (uses_int16(m)) return R < (m.format == INT4 ? 28 : 44) ? BLOCKED : PACKED;
  const int64_t words = row_bytes(m) / 4;
  if (R <= 2 || (R <= 48 && words <= 704)) return STREAMED;
  if (IS_ZEN5) {
    // Loads and multiplications of 512 bits are twice as fast as on Zen 4, so that streamed kernels
    // pay off for more rows, and packing takes a larger share of the time.
    if (words <= 704 || R <= 6 || (R <= 8 && words <= 1024)) return STREAMED;
    return R <= 48 ? TILED : PACKED;
  }
  if (R <= 6) return BLOCKED;
  if (IS_XEON && words <= TILED_KC_WORDS && (R <= 8 || R > 80)) return R <= 8 ? STREAMED : PACKED;
  // Longer rows are tiled in several blocks of columns, whose sums have to be stored in between.
  if (words <= TILED_KC_WORDS) return TILED;
  return R <= 24 ? BLOCKED : R <= 48 ? TILED : PACKED;
}

// Whether this file has kernels for this matrix on this processor.
bool has_avx512_kernel(const Matrix& m) {
#if defined(__AVX512BF16__)
  return true;
#else
  return m.format != BF16;
#endif
}

// ---- products of words

ALWAYS_INLINE __m512i load_words(const void* p) { return _mm512_loadu_si512(p); }

struct Fp32Dot {
  typedef floats16 Accumulator;
  static ALWAYS_INLINE Accumulator accumulate(Accumulator sum, __m512i w, __m512i x) {
    return floats16(_mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), __m512(sum)));
  }
};

#if defined(__AVX512BF16__)
struct Bf16Dot {
  typedef floats16 Accumulator;
  static ALWAYS_INLINE Accumulator accumulate(Accumulator sum, __m512i w, __m512i x) {
    return floats16(_mm512_dpbf16_ps(__m512(sum), __m512bh(w), __m512bh(x)));
  }
};
#else
typedef Fp32Dot Bf16Dot;  // not used
#endif

struct Int16Dot {
  typedef ints16 Accumulator;
  static ALWAYS_INLINE Accumulator accumulate(Accumulator sum, __m512i w, __m512i x) {
#if defined(__AVX512VNNI__)
    return ints16(_mm512_dpwssd_epi32(__m512i(sum), w, x));
#else
    return ints16(_mm512_add_epi32(__m512i(sum), _mm512_madd_epi16(w, x)));
#endif
  }
};

// Transposes 16 vectors of 16 words.
ALWAYS_INLINE void transpose16x16(__m512i* v) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
    // v[4 * g + c] has in its L-th quarter word 4 * L + c of rows 4 * g to 4 * g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const __m512i even_1 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);
    const __m512i odd_1 = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xdd);
    const __m512i even_2 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
    const __m512i odd_2 = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xdd);
    t[c] = _mm512_shuffle_i32x4(even_1, even_2, 0x88);
    t[4 + c] = _mm512_shuffle_i32x4(odd_1, odd_2, 0x88);
    t[8 + c] = _mm512_shuffle_i32x4(even_1, even_2, 0xdd);
    t[12 + c] = _mm512_shuffle_i32x4(odd_1, odd_2, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) v[i] = t[i];
}

// ---- int16

// A sum over a block fits into 32 bits: 127 * 16,000 for each column of int8, 800 * 2,620 of int4.
const int64_t KC = 1024;  // columns of a block
inline float max_input(int64_t format) { return format == INT8 ? 16000 : 2620; }
const float MAX_INT4_WEIGHT = 800;  // of int4 weights requantised to int16

// The largest absolute value; infinite or NaN if an element is.
inline float max_magnitude(const float* x, int64_t columns) {
  // Bits of floats without their sign are in the order of absolute values, and NaN is the largest.
  const __m512i unsigned_bits = _mm512_set1_epi32(0x7fffffff);
  __m512i max_bits = _mm512_setzero_si512();
  for (int64_t c = 0; c < columns; c += 16)
    max_bits = _mm512_max_epi32(max_bits, _mm512_and_si512(load_words(x + c), unsigned_bits));
  const int32_t bits = _mm512_reduce_max_epi32(max_bits);
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  return largest;
}

// Quantises a block of a row of input. Returns the scale: infinite or NaN if an element is, and
// then so is each result.
inline float quantise_block(const float* x, int64_t columns, float max_level, int16_t* out) {
  const float largest = max_magnitude(x, columns);
  const __m512 factor = _mm512_set1_ps(largest > 1e-30f ? max_level / largest : 0);
  for (int64_t c = 0; c < columns; c += 16) {
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + c), factor));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), _mm512_cvtsepi32_epi16(rounded));
  }
  return largest / max_level;
}

// A block of columns of one row of int8 or int4 weights, for unpacking to int16.
template <Format F>
struct Int16Row {
  const char* at;
  float scale;
  alignas(32) int16_t factors[32];  // int4: relative scales

  Int16Row() = default;
  Int16Row(const Matrix& m, int64_t n, int64_t k0, int64_t columns) {
    at = static_cast<const char*>(m.data) + (n * m.stride + k0) * (F == INT8 ? 8 : 4) / 8;
    if (F == INT8)
      scale = static_cast<const float*>(m.scales)[n];
    else
      requantise(static_cast<const uint16_t*>(m.scales) + (n * m.stride + k0) / 32, columns / 32);
  }

  // Computes the relative scales of `count` times 32 columns, and the scale of the int16 weights.
  void requantise(const uint16_t* scales, int64_t count) {
    __m512 all[2];
    for (int i = 0; i < 2; i++) {
      const int64_t left = std::min<int64_t>(16, std::max<int64_t>(0, count - 16 * i));
      const __m256i raw = _mm256_maskz_loadu_epi16(__mmask16((1u << left) - 1), scales + 16 * i);
      all[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
    const float largest =
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(all[0]), _mm512_abs_ps(all[1])));
    const __m512 factor = _mm512_set1_ps(largest > 0 ? MAX_INT4_WEIGHT / largest : 0);
    for (int i = 0; i < 2; i++) {
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(all[i], factor));
      store_vector(factors + 16 * i, _mm512_cvtsepi32_epi16(rounded));
    }
    scale = largest * 8 / MAX_INT4_WEIGHT;
  }

  // Unpacks columns c to c + 31.
  ALWAYS_INLINE __m512i unpack(int64_t c) const {
    if (F == INT8) return _mm512_cvtepi8_epi16(load_vector<__m256i>(at + c));
    // 32 bytes hold 64 columns, the first 32 in the low nibbles. A nibble in the upper 4 of 16
    // bits, its first bit flipped, is the level times 4,096; mulhrs divides the product with the
    // factor by 32,768.
    const __m512i raw = _mm512_cvtepu8_epi16(load_vector<__m256i>(at + c / 64 * 32));
    const __m512i upper = _mm512_slli_epi16(raw, c % 64 ? 8 : 12);
    const __m512i mask = _mm512_set1_epi16(int16_t(0xf000)), sign = _mm512_set1_epi16(INT16_MIN);
    const __m512i level =
        _mm512_ternarylogic_epi64(upper, mask, sign, 0x6a);  // (upper & mask) ^ sign
    return _mm512_mulhrs_epi16(level, _mm512_set1_epi16(factors[c / 32]));
  }
};

// ---- streamed and blocked kernels, for few rows of input

// Prefetches a block of rows of weights into the L2 cache, cache line by cache line.
class RowsPrefetch {
 public:
  RowsPrefetch() = default;  // prefetches nothing if the rate is 0

  // `bytes` of each of `rows` rows, which are `row_bytes` apart. After the last row, it begins with
  // the first one again.
  RowsPrefetch(const char* first, int64_t rows, int64_t row_bytes, int64_t bytes)
      : first_(first), rows_(rows), row_bytes_(row_bytes), lines_((bytes + 63) / 64) {}

  // Prefetches the next `rate` / 256 cache lines.
  ALWAYS_INLINE void prefetch(int64_t rate) {
    for (due_ += rate; due_ >= 256; due_ -= 256) {
      _mm_prefetch(first_ + r_ * row_bytes_ + 64 * line_, _MM_HINT_T1);
      if (++line_ == lines_) line_ = 0, r_ = r_ + 1 == rows_ ? 0 : r_ + 1;
    }
  }

 private:
  const char* first_ = nullptr;
  int64_t rows_ = 0, row_bytes_ = 0, lines_ = 0, line_ = 0, r_ = 0, due_ = 0;
};

// sum [MR, NW] += x [MR, 16] . w [NW, 16], in words, lane by lane. Two rows of weights are in
// registers; with four, the input is.
template <class Dot, int MR, int NW>
ALWAYS_INLINE void accumulate_words(const uint32_t* w, int64_t w_stride, const uint32_t* x,
                                    int64_t x_stride, typename Dot::Accumulator (&sum)[MR][NW]) {
  if (NW == 2) {
    __m512i weights[NW];
#pragma GCC unroll 4
    for (int r = 0; r < NW; r++) keep_in_register(weights[r] = load_words(w + r * w_stride));
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) {
      __m512i v = load_words(x + i * x_stride);
      keep_in_register(v);
#pragma GCC unroll 4
      for (int r = 0; r < NW; r++) sum[i][r] = Dot::accumulate(sum[i][r], weights[r], v);
    }
    return;
  }
  __m512i inputs[MR];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++) keep_in_register(inputs[i] = load_words(x + i * x_stride));
#pragma GCC unroll 4
  for (int r = 0; r < NW; r++) {
    __m512i v = load_words(w + r * w_stride);
    keep_in_register(v);
#pragma GCC unroll 8
    for (int i = 0; i < MR; i++) sum[i][r] = Dot::accumulate(sum[i][r], v, inputs[i]);
  }
}

// y [MR, NW] = the horizontal sums of `sum` [MR, NW].
template <int MR, int NW>
ALWAYS_INLINE void store_reduced(floats16 (&sum)[MR][NW], float* y, int64_t y_stride) {
  const int rows = 16 / NW;  // reduced at once
#pragma GCC unroll 2
  for (int first = 0; first < MR; first += rows) {
    floats16 v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      v[i] = first + i / NW < MR ? sum[std::min(first + i / NW, MR - 1)][i % NW] : floats16{};
    float out[16];
    store(out, horizontal_sums<16>(v));
    for (int i = first; i < std::min(MR, first + rows); i++)
      std::memcpy(y + i * y_stride, out + NW * (i - first), 4 * NW);
  }
}

// sums [MR, NW] += x [MR, count] . w [NW, count], in words, for one block; the `first_block`
// overwrites them. The last block has a `y`, in which it stores the results instead. For each 32
// words, `rate` / 256 cache lines of the `next` weights are prefetched.
template <class Dot, int MR, int NW = 4>
void blocked_microkernel(const uint32_t* w, int64_t w_stride, const uint32_t* x, int64_t x_stride,
                         int64_t count, bool first_block, typename Dot::Accumulator* sums,
                         RowsPrefetch& next, int64_t rate, float* y, int64_t y_stride) {
  typename Dot::Accumulator sum[MR][NW];
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int r = 0; r < NW; r++)
      sum[i][r] = first_block ? typename Dot::Accumulator{} : sums[NW * i + r];
  RowsPrefetch ahead = next;  // a local copy, which compilers keep in registers
  for (int64_t begin = 0; begin < count; begin += 32) {
    ahead.prefetch(rate);
#pragma GCC unroll 2
    for (int64_t c = begin; c < begin + 32; c += 16)
      accumulate_words<Dot>(w + c, w_stride, x + c, x_stride, sum);
  }
  next = ahead;
  if constexpr (std::is_same_v<typename Dot::Accumulator, floats16>)
    if (y) return store_reduced(sum, y, y_stride);
#pragma GCC unroll 8
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int r = 0; r < NW; r++) sums[NW * i + r] = sum[i][r];
}

template <class Dot>
using BlockedMicrokernel = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, int64_t,
                                    bool, typename Dot::Accumulator*, RowsPrefetch&, int64_t,
                                    float*, int64_t);

// For up to 6 rows of input and four rows of weights, or 7 or 8 and two.
template <class Dot>
BlockedMicrokernel<Dot> blocked_microkernel_for(int64_t mr) {
  static const BlockedMicrokernel<Dot> all[] = {
      blocked_microkernel<Dot, 1>,    blocked_microkernel<Dot, 2>,   blocked_microkernel<Dot, 3>,
      blocked_microkernel<Dot, 4>,    blocked_microkernel<Dot, 5>,   blocked_microkernel<Dot, 6>,
      blocked_microkernel<Dot, 7, 2>, blocked_microkernel<Dot, 8, 2>};
  return all[mr - 1];
}

// Reduces the sums [rows, 4] of a tile four rows at a time: calls `visit(row, results)` with the
// results [4, 4] of rows `row` to `row` + 3 of input, zeros for rows beyond the last one.
template <class Accumulator, class Visit>
ALWAYS_INLINE void reduce_rows(Accumulator* all, int64_t rows, Visit visit) {
  for (int64_t row = 0; row < rows; row += 4) {
    Accumulator v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = row + i / 4 < rows ? all[4 * row + i] : Accumulator{};
    visit(row, horizontal_sums<16>(v));
  }
}

// y[row, n] = x[row] . m[n] for all rows of input and the n of the range; fp32, or bf16 with input
// in bf16. `blocks` holds the input as one array [R, words of the block] per block.
template <class Dot>
void gemm_blocked(const Matrix& m, Range range, const uint32_t* blocks, int64_t R,
                  Workspace& workspace, float* y, int64_t y_stride) {
  const int64_t bytes = row_bytes(m), stride = bytes / 4;
  const RowTiles<BLOCKED_MR> tiles(R);
  floats16* sums = reinterpret_cast<floats16*>(workspace.reserve(R * 64));
  const char* data = static_cast<const char*>(m.data);
  for (int64_t n = range.begin; n < range.end; n += 4)
    for (int64_t k0 = 0; k0 < stride; k0 += KC_WORDS) {
      const int64_t count = std::min(KC_WORDS, stride - k0);
      const bool last_block = k0 + count == stride;
      RowsPrefetch next_rows(data + std::min(n + 4, m.rows - 4) * bytes + 4 * k0, 4, bytes,
                             4 * count);
      const uint32_t* w = reinterpret_cast<const uint32_t*>(data + n * bytes) + k0;
      const int64_t rate = 2 * 4 * 256 / tiles.count;  // 32 words of four rows are 8 cache lines
      for (int64_t t = 0; t < tiles.count; t++) {
        const int64_t row = tiles.first(t);
        blocked_microkernel_for<Dot>(tiles.rows(t))(
            w, stride, blocks + R * k0 + row * count, count, count, k0 == 0, sums + 4 * row,
            next_rows, rate, last_block ? y + row * y_stride + n : nullptr, y_stride);
      }
    }
}

// How many rows of weights are a panel of tiled kernels.
inline int64_t tiled_panel_rows(const Matrix& m) {
  return std::max<int64_t>(4, std::min(TILED_NR, TILED_PANEL_BYTES / row_bytes(m) / 4 * 4));
}

// The same as `gemm_blocked`, but x has rows of words, `x_stride` words apart.
template <class Dot>
void gemm_tiled(const Matrix& m, Range range, const uint32_t* x, int64_t x_stride, int64_t R,
                Workspace& workspace, float* y, int64_t y_stride) {
  const int64_t bytes = row_bytes(m), stride = bytes / 4, panel_rows = tiled_panel_rows(m);
  // 7 or 8 rows are one tile on Zen 5, so that weights are read once.
  const bool wide = IS_ZEN5 && R > BLOCKED_MR && R <= 8;
  const int64_t NW = wide ? 2 : 4, tile_count = wide ? 1 : RowTiles<BLOCKED_MR>(R).count;
  // Blocks of about equal size, in multiples of 32 words.
  const int64_t blocks = (stride + TILED_KC_WORDS - 1) / TILED_KC_WORDS,
                block_words = (stride / 32 + blocks - 1) / blocks * 32;
  // [tile, panel_rows / NW, rows of the tile, NW]
  floats16* sums =
      reinterpret_cast<floats16*>(workspace.reserve(blocks > 1 ? R * panel_rows * PARTIALS : 0));
  const char* data = static_cast<const char*>(m.data);
  for (int64_t begin = range.begin; begin < range.end; begin += panel_rows) {
    const int64_t end = std::min(begin + panel_rows, range.end);
    const int64_t lines = std::min(panel_rows, m.rows - end) * bytes / 64;  // of the next panel
    RowsPrefetch next_panel(data + end * bytes, 1, 0, 64 * lines);
    const int64_t rate = 256 * lines / (tile_count * ((end - begin) / NW) * (stride / 32));
    for (int64_t k0 = 0; k0 < stride; k0 += block_words) {
      const int64_t count = std::min(block_words, stride - k0);
      const bool last_block = k0 + count == stride;
      for (int64_t t = 0; t < tile_count; t++) {
        const int64_t row = R * t / tile_count, mr = R * (t + 1) / tile_count - row;
        for (int64_t n = begin; n < end; n += NW)
          blocked_microkernel_for<Dot>(mr)(
              reinterpret_cast<const uint32_t*>(data + n * bytes) + k0, stride,
              x + row * x_stride + k0, x_stride, count, k0 == 0,
              sums + row * panel_rows + (n - begin) * mr, next_panel, rate,
              last_block ? y + row * y_stride + n : nullptr, y_stride);
      }
    }
  }
}

// x [MR, bytes / 4] . w [NW, bytes / 4], in words, with the sums in registers. With PREFETCH, it
// prefetches the weights that lie `ahead` bytes further on.
template <class Dot, int MR, int NW, bool PREFETCH>
ALWAYS_INLINE void streamed_microkernel(const char* w, int64_t bytes, const uint32_t* x,
                                        int64_t x_stride, int64_t ahead, float* y,
                                        int64_t y_stride) {
  floats16 sum[NW * MR] = {};
  for (int64_t at = 0; at < bytes; at += 64, x += 16) {
    __m512i inputs[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; i++) keep_in_register(inputs[i] = load_words(x + i * x_stride));
#pragma GCC unroll 8
    for (int r = 0; r < NW; r++) {
      if (PREFETCH) _mm_prefetch(w + r * bytes + at + ahead, _MM_HINT_T1);
      __m512i v = load_words(w + r * bytes + at);
      if (MR > 1) keep_in_register(v);
#pragma GCC unroll 4
      for (int i = 0; i < MR; i++) sum[NW * i + r] = Dot::accumulate(sum[NW * i + r], v, inputs[i]);
    }
  }
  float out[16];
  store(out, horizontal_sums<NW * MR>(sum));
  for (int i = 0; i < MR; i++) std::memcpy(y + i * y_stride, out + NW * i, 4 * NW);
}

// The same for 5 to 8 rows of input and two rows of weights.
template <class Dot, int MR, bool PREFETCH>
ALWAYS_INLINE void streamed_microkernel_2(const char* w, int64_t bytes, const uint32_t* x,
                                          int64_t x_stride, int64_t ahead, float* y,
                                          int64_t y_stride) {
  floats16 sum[MR][2] = {};
  for (int64_t at = 0; at < bytes; at += 64, x += 16) {
    if (PREFETCH) {
      _mm_prefetch(w + at + ahead, _MM_HINT_T1);
      _mm_prefetch(w + bytes + at + ahead, _MM_HINT_T1);
    }
    accumulate_words<Dot>(reinterpret_cast<const uint32_t*>(w + at), bytes / 4, x, x_stride, sum);
  }
  store_reduced(sum, y, y_stride);
}

template <class Dot, int MR, bool PREFETCH>
void streamed_rows(const char* w, int64_t bytes, int64_t count, const uint32_t* x, int64_t x_stride,
                   int64_t ahead, float* y, int64_t y_stride) {
  int64_t n = 0;
  if constexpr (MR > 4)
    for (; n < count; n += 2)
      streamed_microkernel_2<Dot, MR, PREFETCH>(w + n * bytes, bytes, x, x_stride, ahead, y + n,
                                                y_stride);
  if constexpr (MR == 1)
    for (; n + ROWS_FOR_ONE <= count; n += ROWS_FOR_ONE)
      streamed_microkernel<Dot, 1, ROWS_FOR_ONE, PREFETCH>(w + n * bytes, bytes, x, x_stride, ahead,
                                                           y + n, y_stride);
  if constexpr (MR <= 4)
    for (; n < count; n += 4)
      streamed_microkernel<Dot, MR, 4, PREFETCH>(w + n * bytes, bytes, x, x_stride, ahead, y + n,
                                                 y_stride);
}

// y[row, n] = x[row] . m[n] for all rows of input and the n of the range; fp32, or bf16 with input
// in bf16.
template <class Dot>
void gemm_streamed(const Matrix& m, Range range, const uint32_t* x, int64_t x_stride, int64_t R,
                   float* y, int64_t y_stride) {
  const decltype(&streamed_rows<Dot, 1, true>) kernels[] = {
      streamed_rows<Dot, 1, false>, streamed_rows<Dot, 2, false>, streamed_rows<Dot, 3, false>,
      streamed_rows<Dot, 4, false>, streamed_rows<Dot, 5, false>, streamed_rows<Dot, 6, false>,
      streamed_rows<Dot, 7, false>, streamed_rows<Dot, 8, false>, streamed_rows<Dot, 1, true>,
      streamed_rows<Dot, 2, true>,  streamed_rows<Dot, 3, true>,  streamed_rows<Dot, 4, true>,
      streamed_rows<Dot, 5, true>,  streamed_rows<Dot, 6, true>,  streamed_rows<Dot, 7, true>,
      streamed_rows<Dot, 8, true>};
  const int64_t bytes = row_bytes(m);
  // 5 to 8 rows of input are one tile if that was measured to be faster.
  const bool one_tile = R > 4 && R <= 8 && bytes / 4 <= (R <= 6 ? 704 : 1024);
  const int64_t max_mr = one_tile ? R : 4;
  // With many rows of input, 128 KB of weights stay in the L2 cache for all of them.
  const int64_t width = R == 1    ? ROWS_FOR_ONE
                        : R <= 16 ? 4
                                  : std::max<int64_t>(4, (int64_t(1) << 17) / bytes / 4 * 4);
  for (int64_t n = range.begin; n < range.end; n += width) {
    const char* w = static_cast<const char*>(m.data) + n * bytes;
    for (int64_t row = 0; row < R; row += max_mr) {
      const int64_t mr = std::min(max_mr, R - row), prefetches = row == 0;
      kernels[8 * prefetches + mr - 1](w, bytes, std::min(width, range.end - n), x + row * x_stride,
                                    x_stride, width * bytes, y + row * y_stride + n, y_stride);
    }
  }
}

// The input of products with int8 and int4 weights, quantised to int16.
struct QuantisedInput {
  // For blocked kernels [R, columns of the block] per block of columns; for packed ones as
  // `pack_quantised_tiles` leaves it.
  int16_t* data;
  float* scales;  // [blocks, R]
  int64_t R;

  static int64_t size_in_floats(int64_t R, int64_t stride) {
    return R * stride / 2 + R * (stride / KC + 1);
  }

  QuantisedInput(float* buffer, int64_t R, int64_t stride)
      : data(reinterpret_cast<int16_t*>(buffer)), scales(buffer + R * stride / 2), R(R) {}
};

// As `blocked_microkernel`, for the first MR rows of input: it unpacks the weights and, with STORE,
// leaves them in `unpacked` [4, KC] for the other rows. It prefetches the weights that lie
// `distance` bytes further on, those of the next four rows.
template <Format F, int MR, bool STORE>
void unpacking_microkernel(const Int16Row<F>* rows, int16_t* unpacked, const int16_t* x,
                           int64_t columns, int64_t distance, ints16* sums) {
  const int64_t line = F == INT8 ? 64 : 128;  // columns in a cache line
  ints16 sum[MR][4] = {};
  for (int64_t begin = 0; begin < columns; begin += 64) {
    if (begin % line == 0)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++)
        _mm_prefetch(rows[r].at + begin * 64 / line + distance, _MM_HINT_T1);
#pragma GCC unroll 2
    for (int64_t c = begin; c < begin + 64; c += 32) {
      __m512i inputs[MR];
#pragma GCC unroll 6
      for (int i = 0; i < MR; i++) keep_in_register(inputs[i] = load_words(x + i * columns + c));
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        __m512i v = rows[r].unpack(c);
        keep_in_register(v);
        if (STORE) _mm512_storeu_si512(unpacked + r * KC + c, v);
#pragma GCC unroll 6
        for (int i = 0; i < MR; i++) sum[i][r] = Int16Dot::accumulate(sum[i][r], v, inputs[i]);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) sums[4 * i + r] = sum[i][r];
}

template <Format F, int MR>
void unpacking_microkernel_of(const Int16Row<F>* rows, int16_t* unpacked, const int16_t* x,
                              int64_t columns, int64_t distance, ints16* sums) {
  (unpacked ? unpacking_microkernel<F, MR, true>
            : unpacking_microkernel<F, MR, false>)(rows, unpacked, x, columns, distance, sums);
}

template <Format F>
void gemm_blocked_int16(const Matrix& m, Range range, const QuantisedInput& input,
                        Workspace& workspace, float* y, int64_t y_stride) {
  const decltype(&unpacking_microkernel_of<F, 1>) first_kernels[] = {
      unpacking_microkernel_of<F, 1>, unpacking_microkernel_of<F, 2>,
      unpacking_microkernel_of<F, 3>, unpacking_microkernel_of<F, 4>,
      unpacking_microkernel_of<F, 5>, unpacking_microkernel_of<F, 6>};
  const int64_t R = input.R, bytes = row_bytes(m), tiles = (R + BLOCKED_MR - 1) / BLOCKED_MR;
  float* buffer = workspace.reserve(R * 64 + R * 16 + 2 * KC);
  ints16* sums = reinterpret_cast<ints16*>(buffer);
  float* totals = buffer + R * 64;  // [R, 4]: the sums of blocks
  int16_t* unpacked = tiles > 1 ? reinterpret_cast<int16_t*>(totals + R * 16) : nullptr;
  for (int64_t n = range.begin; n < range.end; n += 4) {
    std::fill_n(totals, R * 4 + 16, 0.0f);
    for (int64_t k0 = 0; k0 < m.stride; k0 += KC) {
      const int64_t columns = std::min(KC, m.stride - k0);
      Int16Row<F> rows[4];
      for (int r = 0; r < 4; r++) rows[r] = Int16Row<F>(m, n + r, k0, columns);
      const int16_t* x = input.data + R * k0;
      RowsPrefetch nothing;
      for (int64_t t = 0, row = 0; t < tiles; t++) {
        const int64_t mr = (R - row + tiles - t - 1) / (tiles - t);
        if (t == 0)
          first_kernels[mr - 1](rows, unpacked, x, columns, 4 * bytes, sums);
        else
          blocked_microkernel_for<Int16Dot>(mr)(
              reinterpret_cast<const uint32_t*>(unpacked), KC / 2,
              reinterpret_cast<const uint32_t*>(x + row * columns), columns / 2, columns / 2, true,
              sums + 4 * row, nothing, 0, nullptr, 0);
        row += mr;
      }
      const __m512 scale =
          _mm512_setr4_ps(rows[0].scale, rows[1].scale, rows[2].scale, rows[3].scale);
      const float* x_scales = input.scales + k0 / KC * R;
      reduce_rows(sums, R, [&](int64_t row, ints16 results) {
        const __mmask16 valid = __mmask16((1u << std::min<int64_t>(4, R - row)) - 1);
        const __m512i of_row = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        const __m512 input_scales =
            _mm512_permutexvar_ps(of_row, _mm512_maskz_loadu_ps(valid, x_scales + row));
        float* to = totals + 4 * row;
        store(to, fmadd(__builtin_convertvector(results, floats16),
                        floats16(_mm512_mul_ps(scale, input_scales)), load(to)));
      });
    }
    for (int64_t row = 0; row < R; row++) std::memcpy(y + row * y_stride + n, totals + 4 * row, 16);
  }
}

// ---- packed kernels, for many rows of input

typedef RowTiles<PACKED_MR> Tiles;

// The int32 or fp32 sums of x [steps, MR] and two vectors of weights [steps, 2, 16], over all
// steps.
template <class Dot, int MR>
ALWAYS_INLINE void accumulate_tile(const uint32_t* w, const uint32_t* x, int64_t steps,
                                   typename Dot::Accumulator (&sum)[MR][2]) {
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = typename Dot::Accumulator{};
  for (int64_t step = 0; step < steps; step++, w += NR, x += MR) {
    __m512i low = load_words(w), high = load_words(w + 16);
    keep_in_register(low);
    keep_in_register(high);
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++) {
      const __m512i element = _mm512_set1_epi32(int32_t(x[i]));
      sum[i][0] = Dot::accumulate(sum[i][0], low, element);
      sum[i][1] = Dot::accumulate(sum[i][1], high, element);
    }
  }
}

// Transposes 16 words of up to 16 rows: word j of all `rows` is stored at out[j] + `to`.
ALWAYS_INLINE void transpose_rows(const uint32_t* const* row, int64_t rows, int64_t at,
                                  uint32_t* const* out, int64_t to) {
  __m512i v[16];
#pragma GCC unroll 16
  for (int64_t r = 0; r < 16; r++)
    v[r] = r < rows ? load_words(row[r] + at) : _mm512_setzero_si512();
  transpose16x16(v);
  const __mmask16 valid = __mmask16((1u << rows) - 1);
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++)
    if (rows == 16)
      _mm512_storeu_si512(out[j] + to, v[j]);
    else
      _mm512_mask_storeu_epi32(out[j] + to, valid, v[j]);
}

// How many partial sums a microkernel computes before the next tile, so that their part of the
// panel stays in the L1 cache.
inline int partials_per_pass(int64_t steps) {
  return steps <= 16 ? 8 : steps <= 32 ? 4 : steps <= 64 ? 2 : 1;
}

// Where the columns of the k-th partial sum begin in a panel. A cache line is left free after each,
// as addresses that differ by a power of two compete for the same few places of a cache.
ALWAYS_INLINE int64_t partial_offset(int64_t k, int64_t steps) { return k * (steps * NR + 16); }

// The input, packed in the order in which the microkernel reads it: see `PackedInputLayout`.
struct PackedInput {
  Tiles tiles;
  int64_t steps;
  uint32_t* data;
  PackedInputLayout<Tiles, GROUP_TILES> layout{tiles, steps, partials_per_pass(steps)};

  // x has rows of words, `stride` words apart.
  void pack(const uint32_t* x, int64_t stride) const {
    for (int64_t tile = 0; tile < tiles.count; tile++) {
      const int64_t mr = tiles.rows(tile);
      const uint32_t* row[16];
      for (int64_t i = 0; i < mr; i++) row[i] = x + (tiles.first(tile) + i) * stride;
      uint32_t* out[PARTIALS];
      for (int i = 0; i < PARTIALS; i++) out[i] = data + layout.offset_of_partial(tile, i);
      for (int64_t step = 0; step < steps; step++)
        transpose_rows(row, mr, 16 * step, out, step * mr);
    }
  }
};

// Computes `count` partial sums, from the k-th on, for MR rows of input and a panel, and adds them
// to the `subtotals` [level, MR, NR]; the last partial sum stores the outputs in y. Before each,
// `lines` cache lines are prefetched.
template <class Dot, int MR>
void packed_microkernel(const uint32_t* panel, const uint32_t* x, int64_t steps, int k, int count,
                        float* subtotals, float* y, int64_t y_stride, LinearPrefetch& ahead,
                        int64_t lines) {
  for (const int last = k + count; k < last; k++, x += steps * MR) {
    ahead.prefetch(lines);
    floats16 sum[MR][2];
    accumulate_tile<Dot, MR>(panel + partial_offset(k, steps), x, steps, sum);
    float* level = subtotals;
    for (int ones = k; ones % 2; ones /= 2, level += MR * NR)
#pragma GCC unroll 12
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) sum[i][g] = load(level + i * NR + 16 * g) + sum[i][g];
    float* to = k == PARTIALS - 1 ? y : level;
    const int64_t to_stride = k == PARTIALS - 1 ? y_stride : NR;
#pragma GCC unroll 12
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) store(to + i * to_stride + 16 * g, sum[i][g]);
  }
}

// The same for one block of int16: adds the dequantised products to `totals` [MR, NR].
template <int MR>
void packed_microkernel_int16(const uint32_t* panel, const uint32_t* x, int64_t steps,
                              const float* scales, const float* x_scales, float* totals) {
  ints16 sum[MR][2];
  accumulate_tile<Int16Dot, MR>(panel, x, steps, sum);
#pragma GCC unroll 12
  for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
      float* to = totals + i * NR + 16 * g;
      const floats16 combined_scale = load(scales + 16 * g) * broadcast(x_scales[i]);
      store(to, fmadd(__builtin_convertvector(sum[i][g], floats16), combined_scale, load(to)));
    }
}

template <class Dot>
using PackedMicrokernel = void (*)(const uint32_t*, const uint32_t*, int64_t, int, int, float*,
                                   float*, int64_t, LinearPrefetch&, int64_t);
using PackedMicrokernelInt16 = void (*)(const uint32_t*, const uint32_t*, int64_t, const float*,
                                        const float*, float*);

template <class Dot>
PackedMicrokernel<Dot> packed_microkernel_for(int64_t mr) {
  static const PackedMicrokernel<Dot> all[] = {
      packed_microkernel<Dot, 6>, packed_microkernel<Dot, 7>,  packed_microkernel<Dot, 8>,
      packed_microkernel<Dot, 9>, packed_microkernel<Dot, 10>, packed_microkernel<Dot, 11>,
      packed_microkernel<Dot, 12>};
  return all[mr - 6];
}

PackedMicrokernelInt16 packed_microkernel_int16_for(int64_t mr) {
  static const PackedMicrokernelInt16 all[] = {
      packed_microkernel_int16<6>, packed_microkernel_int16<7>,  packed_microkernel_int16<8>,
      packed_microkernel_int16<9>, packed_microkernel_int16<10>, packed_microkernel_int16<11>,
      packed_microkernel_int16<12>};
  return all[mr - 6];
}

// Prefetches the panel that follows rows n to n + 31 of a matrix.
inline LinearPrefetch next_panel_prefetch(const Matrix& m, int64_t n) {
  const int64_t next = std::max<int64_t>(0, std::min(NR, m.rows - n - NR));
  return {static_cast<const char*>(m.data) + (n + NR) * row_bytes(m), next * row_bytes(m) / 64};
}

// Packs rows n to n + 31 of a matrix: [PARTIALS, steps, NR]. In place of rows beyond the matrix its
// last row is packed again; their results are not used.
inline void pack_panel(const Matrix& m, int64_t n, int64_t steps, uint32_t* panel) {
  for (int64_t g = 0; g < NR; g += 16) {
    const uint32_t* row[16];
    for (int64_t r = 0; r < 16; r++)
      row[r] =
          static_cast<const uint32_t*>(m.data) + std::min(n + g + r, m.rows - 1) * steps * PARTIALS;
    uint32_t* out[PARTIALS];
    for (int i = 0; i < PARTIALS; i++) out[i] = panel + partial_offset(BIT_REVERSED[i], steps) + g;
    for (int64_t step = 0; step < steps; step++) transpose_rows(row, 16, 16 * step, out, step * NR);
  }
}

// y[row, n] = x[row] . m[n] for all rows of input and the n of the range; fp32, or bf16 with input
// in bf16.
template <class Dot>
void gemm_packed(const Matrix& m, Range range, const PackedInput& input, Workspace& workspace,
                 float* y, int64_t y_stride) {
  const Tiles& tiles = input.tiles;
  const int64_t steps = input.steps, panel_size = partial_offset(PARTIALS, steps),
                subtotals_size = 4 * PACKED_MR * NR;
  float *buffer = workspace.reserve(panel_size + GROUP_TILES * subtotals_size + tiles.R * NR),
        *subtotals = buffer + panel_size;
  // [R, NR]: the outputs of a panel that is not full.
  float* last = subtotals + GROUP_TILES * subtotals_size;
  uint32_t* panel = reinterpret_cast<uint32_t*>(buffer);
  const int per_pass = input.layout.per_pass;
  for (int64_t n = range.begin; n < range.end; n += NR) {
    const bool full = n + NR <= range.end;
    float* out = full ? y + n : last;
    const int64_t out_stride = full ? y_stride : NR;
    pack_panel(m, n, steps, panel);
    LinearPrefetch ahead = next_panel_prefetch(m, n);
    const int64_t calls = tiles.count * PARTIALS, lines = (ahead.left + calls - 1) / calls;
    for (int64_t group = 0; group < tiles.count; group += GROUP_TILES) {
      const int64_t end = std::min(group + GROUP_TILES, tiles.count);
      for (int k = 0; k < PARTIALS; k += per_pass)
        for (int64_t t = group; t < end; t++)
          packed_microkernel_for<Dot>(tiles.rows(t))(
              panel, input.data + input.layout.offset(group, t, k), steps, k, per_pass,
              subtotals + (t - group) * subtotals_size, out + tiles.first(t) * out_stride,
              out_stride, ahead, lines);
    }
    if (!full)
      for (int64_t row = 0; row < tiles.R; row++)
        std::memcpy(y + row * y_stride + n, last + row * NR, (range.end - n) * sizeof(float));
  }
}

// Quantises and packs the input for `gemm_packed_int16`: for each block and tile [steps, rows of
// the tile], where a step is one word.
inline void pack_quantised_tiles(const QuantisedInput& input, int64_t format, const float* x,
                                 int64_t x_stride, int64_t stride, Workspace& workspace) {
  const Tiles tiles(input.R);
  int16_t* rounded = reinterpret_cast<int16_t*>(workspace.reserve(PACKED_MR * KC / 2));
  for (int64_t k0 = 0; k0 < stride; k0 += KC) {
    const int64_t columns = std::min(KC, stride - k0);
    for (int64_t t = 0; t < tiles.count; t++) {
      const int64_t row = tiles.first(t), mr = tiles.rows(t);
      const uint32_t* rows[16];
      for (int64_t i = 0; i < mr; i++) {
        int16_t* at = rounded + i * KC;
        input.scales[k0 / KC * input.R + row + i] =
            quantise_block(x + (row + i) * x_stride + k0, columns, max_input(format), at);
        rows[i] = reinterpret_cast<const uint32_t*>(at);
      }
      uint32_t* to = reinterpret_cast<uint32_t*>(input.data + input.R * k0 + row * columns);
      uint32_t* out[16];
      for (int j = 0; j < 16; j++) out[j] = to + j * mr;
      for (int64_t at = 0; at < columns / 2; at += 16) transpose_rows(rows, mr, at, out, at * mr);
    }
  }
}

inline void quantise_rows(const QuantisedInput& input, int64_t format, const float* x,
                          int64_t x_stride, int64_t stride) {
  for (int64_t k0 = 0; k0 < stride; k0 += KC) {
    const int64_t columns = std::min(KC, stride - k0);
    for (int64_t row = 0; row < input.R; row++)
      input.scales[k0 / KC * input.R + row] =
          quantise_block(x + row * x_stride + k0, columns, max_input(format),
                         input.data + input.R * k0 + row * columns);
  }
}

// Unpacks and packs a block of columns of rows n to n + 31 of a matrix: [columns / 2, NR] words,
// and the scale of each row.
template <Format F>
void pack_panel_int16(const Matrix& m, int64_t n, int64_t k0, int64_t columns, uint32_t* panel,
                      float* scales) {
  for (int64_t g = 0; g < NR; g += 16) {
    Int16Row<F> row[16];
    for (int64_t r = 0; r < 16; r++) {
      row[r] = Int16Row<F>(m, std::min(n + g + r, m.rows - 1), k0, columns);
      scales[g + r] = row[r].scale;
    }
    for (int64_t c = 0; c < columns; c += 64) {
      __m512i v[2][16];
      for (int r = 0; r < 16; r++) {
        v[0][r] = row[r].unpack(c);
        v[1][r] = row[r].unpack(c + 32);
      }
      for (int half = 0; half < 2; half++) {
        transpose16x16(v[half]);
        uint32_t* out = panel + (c / 2 + 16 * half) * NR + g;
        for (int j = 0; j < 16; j++) _mm512_storeu_si512(out + j * NR, v[half][j]);
      }
    }
  }
}

template <Format F>
void gemm_packed_int16(const Matrix& m, Range range, const QuantisedInput& input,
                       Workspace& workspace, float* y, int64_t y_stride) {
  const int64_t R = input.R;
  const Tiles tiles(R);
  float *buffer = workspace.reserve(KC / 2 * NR + R * NR), *totals = buffer + KC / 2 * NR;
  uint32_t* panel = reinterpret_cast<uint32_t*>(buffer);
  for (int64_t n = range.begin; n < range.end; n += NR) {
    const int64_t width = std::min(NR, range.end - n);
    LinearPrefetch ahead = next_panel_prefetch(m, n);
    const int64_t calls = tiles.count * ((m.stride + KC - 1) / KC),
                  lines = (ahead.left + calls - 1) / calls;
    std::fill_n(totals, R * NR, 0.0f);
    for (int64_t k0 = 0; k0 < m.stride; k0 += KC) {
      const int64_t columns = std::min(KC, m.stride - k0);
      alignas(64) float scales[NR];
      pack_panel_int16<F>(m, n, k0, columns, panel, scales);
      for (int64_t t = 0; t < tiles.count; t++) {
        const int64_t row = tiles.first(t);
        ahead.prefetch(lines);
        packed_microkernel_int16_for(tiles.rows(t))(
            panel, reinterpret_cast<const uint32_t*>(input.data + R * k0 + row * columns),
            columns / 2, scales, input.scales + k0 / KC * R + row, totals + row * NR);
      }
    }
    for (int64_t row = 0; row < R; row++)
      std::memcpy(y + row * y_stride + n, totals + row * NR, width * sizeof(float));
  }
}

// ---- all kinds

// R rows of input, quantised or packed for the kernel that multiplies them with matrices like `m`.
class Avx512Gemm {
 public:
  Avx512Gemm(const Matrix& m, const Input& in, int64_t R, Workspace& workspace, Workspace& scratch)
      : R_(R), algorithm_(algorithm_for(m, R)) {
    if (uses_int16(m)) {
      data_ = workspace.reserve(QuantisedInput::size_in_floats(R, m.stride));
      const QuantisedInput input(data_, R, m.stride);
      if (algorithm_ == PACKED)
        pack_quantised_tiles(input, m.format, in.fp32, in.stride, m.stride, scratch);
      else
        quantise_rows(input, m.format, in.fp32, in.stride, m.stride);
      return;
    }
    const bool bf16 = m.format == BF16;
    const void* rows = bf16 ? static_cast<const void*>(in.bf16) : in.fp32;
    x_ = static_cast<const uint32_t*>(rows);
    x_stride_ = bf16 ? in.stride / 2 : in.stride;
    if (algorithm_ == STREAMED || algorithm_ == TILED) return;
    const int64_t stride = row_bytes(m) / 4;
    data_ = workspace.reserve(R * stride);
    uint32_t* packed = reinterpret_cast<uint32_t*>(data_);
    if (algorithm_ == PACKED) {
      PackedInput{Tiles(R), stride / PARTIALS, packed}.pack(x_, x_stride_);
      return;
    }
    for (int64_t k0 = 0; k0 < stride; k0 += KC_WORDS) {
      const int64_t count = std::min(KC_WORDS, stride - k0);
      for (int64_t row = 0; row < R; row++)
        std::memcpy(packed + R * k0 + row * count, x_ + row * x_stride_ + k0, 4 * count);
    }
  }

  void multiply(const Matrix& m, Range range, Workspace& workspace, float* y,
                int64_t y_stride) const {
    if (uses_int16(m)) {
      const QuantisedInput input(data_, R_, m.stride);
      const auto gemm =
          m.format == INT8
              ? (algorithm_ == PACKED ? gemm_packed_int16<INT8> : gemm_blocked_int16<INT8>)
              : (algorithm_ == PACKED ? gemm_packed_int16<INT4> : gemm_blocked_int16<INT4>);
      return gemm(m, range, input, workspace, y, y_stride);
    }
    m.format == BF16 ? multiply<Bf16Dot>(m, range, workspace, y, y_stride)
                     : multiply<Fp32Dot>(m, range, workspace, y, y_stride);
  }

 private:
  template <class Dot>
  void multiply(const Matrix& m, Range range, Workspace& workspace, float* y,
                int64_t y_stride) const {
    uint32_t* packed = reinterpret_cast<uint32_t*>(data_);
    if (algorithm_ == STREAMED) return gemm_streamed<Dot>(m, range, x_, x_stride_, R_, y, y_stride);
    if (algorithm_ == TILED)
      return gemm_tiled<Dot>(m, range, x_, x_stride_, R_, workspace, y, y_stride);
    if (algorithm_ == BLOCKED)
      return gemm_blocked<Dot>(m, range, packed, R_, workspace, y, y_stride);
    gemm_packed<Dot>(m, range, PackedInput{Tiles(R_), row_bytes(m) / 4 / PARTIALS, packed},
                     workspace, y, y_stride);
  }

  int64_t R_;
  Algorithm algorithm_;
  const uint32_t* x_ = nullptr;
  int64_t x_stride_ = 0;
  float* data_ = nullptr;
};

}  // namespace

#endif
