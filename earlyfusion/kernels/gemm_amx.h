// GEMM on AMX: bf16 and int8 weights, and int4 weights for many rows of input.
//
// AMX multiplies tiles of 16 rows of 64 bytes, here 16 words: a word is two bf16 or four int8. The
// first operand is a tile of weights: 16 rows of the matrix, read in place. The second one is a
// tile of input, transposed when it is packed: element [k, i] is word k of row i of the input. So
// element [n, i] of the result is the product of row n of the weights and row i of the input.
//
// An output is the same to the bit for any number of rows of input: it does not depend on where in
// a tile it lies. bf16: for each 32 columns, the products of even and of odd columns are summed up,
// and both sums are added to the result. That is another order than in the other kernels, so bf16
// weights are always multiplied here if the processor has AMX. int8 and int4: as in gemm_avx512.h;
// levels of 16 bits are split into two of 8 bits, whose products are exact.
//
// With up to 16 rows of input, each tile of weights is multiplied while the next one is prefetched.
// With more, prefetching in software was slower than leaving it to the hardware.

#pragma once

#include "gemm_avx512.h"

#if defined(USE_AMX)

namespace {

const int64_t TILE_WORDS = 256;      // words of a tile
const int64_t AMX_NR = 256;          // rows of weights of a panel, at most
const int64_t AMX_INTEGER_NR = 64;   // the same for int8 weights
const int64_t AMX_KC_WORDS = 1024;   // words of a row in a block, so that a panel stays in L2
const int64_t PANEL_TILES = AMX_NR / TILE;
// Words of a row from which on a few rows of input are multiplied tile by tile, as measured.
const int64_t AMX_LONG_WORDS = 512;
// Rows of input from which on int4 weights are multiplied here, as measured.
const int64_t AMX_INT4_MIN_ROWS = 20;

// Rows of weights of a panel. Up to 256 rows of input stay in the L2 cache beside a small panel;
// more of them are read from L3 for each panel, so it is as large as L2 allows.
inline int64_t panel_rows(int64_t R) { return R <= 256 ? 64 : AMX_NR; }

// Whether a product with R rows of input runs on AMX.
inline bool uses_amx(const Matrix& m, int64_t R) {
  if (m.format == FP32 || !amx_permitted()) return false;
  return m.format != INT4 || R >= AMX_INT4_MIN_ROWS;
}

// ---- instructions; tiles are numbered at compile time

template <int T>
ALWAYS_INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}

template <int T>
ALWAYS_INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

template <int T>
ALWAYS_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

struct Bf16Tiles {
  typedef float Sum;
  template <int SUM, int W, int X>
  static ALWAYS_INLINE void accumulate() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(W), "i"(X));
  }
};

struct Int8Tiles {
  typedef int32_t Sum;
  template <int SUM, int W, int X>
  static ALWAYS_INLINE void accumulate() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(W), "i"(X));
  }
};

// The tile registers of this thread while it is in scope: 0 to 3 hold sums, 4 and 5 the first
// operand, of which `rows` are used, 6 and 7 the second one; `width` are its columns and those of
// the sums. Registers that are released make switching between threads cheaper.
class TileRegisters {
 public:
  TileRegisters(int64_t rows, int64_t width) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; t++) {
      config.row_bytes[t] = t == 4 || t == 5 ? 64 : 4 * width;
      config.rows[t] = t < 6 ? rows : TILE;
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
};

// ---- microkernels: sums (+)= weights . input, over `steps` times 16 words
//
// The sums of a tile of weights and a tile of input are [16, width]; tiles of them lie TILE_WORDS
// apart.

// Up to four tiles of weights, whose rows are `stride` bytes apart.
struct WeightTiles {
  const char* const* tiles;
  int64_t stride;
};

template <int T, class Sum>
ALWAYS_INLINE void begin_sums(const Sum* sums, int64_t width, bool first) {
  if (first)
    zero_tile<T>();
  else
    load_tile<T>(sums + T * TILE_WORDS, 4 * width);
}

// NW, 1, 2 or 4, tiles of weights and one tile of input, `width` words wide. `first`: the sums are
// overwritten. If `next` is not null, a tile of weights there is prefetched, with NW = 1.
template <class Tiles, int NW>
void accumulate_tiles(WeightTiles w, const uint32_t* x, int64_t width, int64_t steps, bool first,
                      typename Tiles::Sum* sums, const char* next = nullptr) {
  begin_sums<0>(sums, width, first);
  if (NW >= 2) begin_sums<1>(sums, width, first);
  if (NW == 4) begin_sums<2>(sums, width, first);
  if (NW == 4) begin_sums<3>(sums, width, first);
  for (int64_t at = 0; at < 64 * steps; at += 64, x += TILE * width) {
    if (NW == 1 && next)
#pragma GCC unroll 16
      for (int64_t r = 0; r < TILE; r++) prefetch(next + r * w.stride, at);
    load_tile<6>(x, 4 * width);
    load_tile<4>(w.tiles[0] + at, w.stride);
    Tiles::template accumulate<0, 4, 6>();
    if (NW >= 2) {
      load_tile<5>(w.tiles[1] + at, w.stride);
      Tiles::template accumulate<1, 5, 6>();
    }
    if (NW == 4) {
      load_tile<4>(w.tiles[2] + at, w.stride);
      Tiles::template accumulate<2, 4, 6>();
      load_tile<5>(w.tiles[3] + at, w.stride);
      Tiles::template accumulate<3, 5, 6>();
    }
  }
  store_tile<0>(sums, 4 * width);
  if (NW >= 2) store_tile<1>(sums + TILE_WORDS, 4 * width);
  if (NW == 4) store_tile<2>(sums + 2 * TILE_WORDS, 4 * width);
  if (NW == 4) store_tile<3>(sums + 3 * TILE_WORDS, 4 * width);
}

// Two tiles of weights and two of input, which lie `x_distance` words apart. The sums: tile 0 of
// weights with both tiles of input, then tile 1.
template <class Tiles>
void accumulate_tiles_2x2(WeightTiles w, const uint32_t* x, int64_t x_distance,
                                        int64_t steps, bool first, typename Tiles::Sum* sums) {
  begin_sums<0>(sums, TILE, first);
  begin_sums<1>(sums, TILE, first);
  begin_sums<2>(sums, TILE, first);
  begin_sums<3>(sums, TILE, first);
  for (int64_t at = 0; at < 64 * steps; at += 64, x += TILE_WORDS) {
    load_tile<6>(x, 64);
    load_tile<4>(w.tiles[0] + at, w.stride);
    Tiles::template accumulate<0, 4, 6>();
    load_tile<5>(w.tiles[1] + at, w.stride);
    Tiles::template accumulate<2, 5, 6>();
    load_tile<7>(x + x_distance, 64);
    Tiles::template accumulate<1, 4, 7>();
    Tiles::template accumulate<3, 5, 7>();
  }
  store_tile<0>(sums, 4 * TILE);
  store_tile<1>(sums + TILE_WORDS, 4 * TILE);
  store_tile<2>(sums + 2 * TILE_WORDS, 4 * TILE);
  store_tile<3>(sums + 3 * TILE_WORDS, 4 * TILE);
}

// Transposes the sums of a tile: v[i] has those of column i, for all rows of weights. It reads up
// to 15 words beyond them.
template <class Sum>
ALWAYS_INLINE void transpose_sums(const Sum* sums, int64_t width, __m512i* v) {
#pragma GCC unroll 16
  for (int n = 0; n < TILE; n++) v[n] = load_words(sums + n * width);
  if (width > 1) transpose16x16(v);
}

// Packs up to 16 rows of words as one tile of `width` columns for each 16 words.
inline void pack_tiles(const uint32_t* const* rows, int64_t count, int64_t width, int64_t words,
                       uint32_t* to) {
  for (int64_t at = 0; at < words; at += TILE, to += TILE * width) {
    __m512i v[TILE];
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++)
      v[i] = i < count ? load_words(rows[i] + at) : _mm512_setzero_si512();
    transpose16x16(v);
    const __mmask16 valid = __mmask16((1u << width) - 1);
#pragma GCC unroll 16
    for (int j = 0; j < TILE; j++) _mm512_mask_storeu_epi32(to + j * width, valid, v[j]);
  }
}

// Rows of weights of a panel, with zeros in place of rows beyond the matrix: tiles are read whole.
inline const char* whole_tile(const Matrix& m, int64_t n, Workspace& workspace) {
  const int64_t bytes = row_bytes(m);
  const char* at = static_cast<const char*>(m.data) + n * bytes;
  if (n + TILE <= m.rows) return at;
  char* copy = reinterpret_cast<char*>(workspace.reserve(TILE * bytes / 4));
  std::memset(copy, 0, TILE * bytes);
  std::memcpy(copy, at, (m.rows - n) * bytes);
  return copy;
}

// ---- bf16

// Rounds 16 floats to bf16, in the upper halves of words.
ALWAYS_INLINE __m512i round_to_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_and_si512(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))),
                          _mm512_set1_epi32(int32_t(0xffff0000)));
}

// silu(gates) * ups, [16, width] each, for 16 columns and a tile of rows. The results are rounded
// to bf16 and stored as words [8, width] of the input of the next product.
inline __attribute__((noinline)) void swiglu_tile(const float* gates, const float* ups,
                                                  int64_t width, uint32_t* to) {
  const __mmask16 valid = __mmask16((1u << width) - 1);
  const auto rounded = [&](int64_t n) {
    const floats16 gate = load(gates + n * width), up = load(ups + n * width);
    return round_to_bf16(__m512(gate / (1.0f + vector_exp(-gate)) * up));
  };
#pragma GCC unroll 8
  for (int64_t n = 0; n < TILE; n += 2) {
    const __m512i low = _mm512_srli_epi32(rounded(n), 16), high = rounded(n + 1);
    _mm512_mask_storeu_epi32(to + n / 2 * width, valid, _mm512_or_si512(low, high));
  }
}

// R rows of input, as tiles, for products with bf16 weights.
class AmxBf16Gemm {
 public:
  AmxBf16Gemm(const Input& in, int64_t R)
      : in_(in), R_(R), tile_count_((R + TILE - 1) / TILE), words_(in.stride / 2) {}

  // y[row, n] = x[row] . m[n] for all rows of input and the n of the range.
  void multiply(const Matrix& m, Range range, Workspace& workspace, Workspace& copy, float* y,
                int64_t y_stride) const {
    const TileRegisters registers(TILE, in_.width);
    const int64_t panel = panel_rows(R_);
    for (int64_t begin = range.begin; begin < range.end; begin += panel) {
      const int64_t end = std::min(range.end, begin + panel);
      const char* weights[PANEL_TILES];
      int64_t count = 0;
      for (int64_t n = begin; n < end; n += TILE) weights[count++] = whole_tile(m, n, copy);
      for_each_pair(weights, count, workspace,
                    [&](int64_t first, int64_t tile, const float* a, const float* b) {
                      const int64_t n = begin + first * TILE;
                      store_results(a, tile, n, end, y, y_stride);
                      if (b) store_results(b, tile, n + TILE, end, y, y_stride);
                    });
    }
  }

  // inner = silu(x gate^T) * (x up^T), for the columns of the range.
  void multiply_swiglu(const Matrix& gate, const Matrix& up, Range range, Workspace& workspace,
                       Workspace& gate_copy, Workspace& up_copy, const Input& inner) const {
    const TileRegisters registers(TILE, in_.width);
    const int64_t panel = panel_rows(R_) / 2;
    for (int64_t begin = range.begin; begin < range.end; begin += panel) {
      const int64_t end = std::min(range.end, begin + panel);
      const char* weights[PANEL_TILES];  // of `gate` and of `up` in turn
      int64_t count = 0;
      for (int64_t n = begin; n < end; n += TILE) {
        weights[count++] = whole_tile(gate, n, gate_copy);
        weights[count++] = whole_tile(up, n, up_copy);
      }
      for_each_pair(weights, count, workspace,
                    [&](int64_t first, int64_t tile, const float* gates, const float* ups) {
                      const int64_t n = begin + first / 2 * TILE;
                      swiglu_tile(gates, ups, in_.width, inner.tile(tile) + n / 2 * in_.width);
                    });
    }
  }

 private:
  // Multiplies tiles of weights with all tiles of input. For each two tiles of weights and each
  // tile of input it calls `visit(number of the first of them, tile, sums, sums of the second)`.
  // The last of an odd number of tiles is alone: then the second sums are null.
  template <class Visit>
  void for_each_pair(const char* const* weights, int64_t count, Workspace& workspace,
                     Visit visit) const {
    // A pass over the weights reads two tiles of input. With several passes, blocks of columns stay
    // in the L2 cache, and sums are kept from block to block.
    const int64_t blocks = tile_count_ <= 2 ? 1 : (words_ + AMX_KC_WORDS - 1) / AMX_KC_WORDS,
                  block_words = (words_ / TILE + blocks - 1) / blocks * TILE;
    const int64_t kept = blocks > 1 ? 2 * count * TILE_WORDS : 0;  // for two tiles of input
    float* all_sums = workspace.reserve(
        std::max<int64_t>(4 * TILE_WORDS, kept * ((tile_count_ + 1) / 2)));
    for (int64_t k0 = 0; k0 < words_; k0 += block_words) {
      const int64_t steps = std::min(block_words, words_ - k0) / TILE;
      const bool first = k0 == 0, last = k0 + block_words >= words_;
      for (int64_t t = 0; t < tile_count_; t += 2) {
        const uint32_t *x = in_.tile(t) + k0 * in_.width, *x2 = in_.tile(t + 1) + k0 * in_.width;
        const bool two = t + 1 < tile_count_;
        float* sums = all_sums + t / 2 * kept;
        for (int64_t j = 0, step; j < count; j += step) {
          const char* tiles[4];
          step = std::min<int64_t>(two ? 2 : 4, count - j);
          if (step == 3) step = 2;
          for (int64_t i = 0; i < step; i++) tiles[i] = weights[j + i] + 4 * k0;
          const WeightTiles w{tiles, 4 * words_};
          if (tile_count_ == 1 && words_ >= AMX_LONG_WORDS)
            for (int64_t i = 0; i < step; i++) {
              const bool more = j + i + 1 < count;
              const char* next = more ? weights[j + i + 1] : weights[j + i] + TILE * w.stride;
              accumulate_tiles<Bf16Tiles, 1>({tiles + i, w.stride}, x, in_.width, steps, first,
                                             sums + i * TILE_WORDS, next);
            }
          else if (step == 4)
            accumulate_tiles<Bf16Tiles, 4>(w, x, in_.width, steps, first, sums);
          else if (two && step == 2)
            accumulate_tiles_2x2<Bf16Tiles>(w, x, x2 - x, steps, first, sums);
          else if (step == 2)
            accumulate_tiles<Bf16Tiles, 2>(w, x, in_.width, steps, first, sums);
          else
            accumulate_tiles<Bf16Tiles, 1>(w, x, in_.width, steps, first, sums);
          if (two && step == 1)
            accumulate_tiles<Bf16Tiles, 1>(w, x2, in_.width, steps, first, sums + TILE_WORDS);
          // Sums of two tiles of input lie side by side.
          const int64_t next = (two ? 2 : 1) * TILE_WORDS;
          for (int64_t i = 0; last && i < step; i += 2)
            for (int64_t e = 0; e < (two ? 2 : 1); e++) {
              const float* a = sums + i * next + e * TILE_WORDS;
              visit(j + i, t + e, a, step > 1 ? a + next : nullptr);
            }
          if (kept) sums += step * next;
        }
      }
    }
  }

  // Stores the products of a tile of input and rows n to n + 15 of the weights.
  void store_results(const float* sums, int64_t tile, int64_t n, int64_t end, float* y,
                     int64_t y_stride) const {
    const int64_t first = tile * TILE, count = std::min(TILE, R_ - first);
    const __mmask16 valid = __mmask16((1u << std::min(TILE, end - n)) - 1);
    __m512i v[TILE];
    transpose_sums(sums, in_.width, v);
    float* to = y + first * y_stride + n;
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++)
      if (i < count) _mm512_mask_storeu_epi32(to + i * y_stride, valid, v[i]);
  }

  const Input& in_;
  int64_t R_, tile_count_, words_;
};

// ---- int8 and int4

// R rows of input for products with int8 or int4 weights, quantised to 16 bits as in gemm_avx512.h.
// A level of 16 bits is 256 times a high plus a low one of 8 bits, both signed; a tile has the high
// levels of up to eight rows and then their low ones. int4 weights are split in the same way.
class AmxIntegerGemm {
 public:
  AmxIntegerGemm(const Matrix& m, const Input& in, int64_t R, Workspace& workspace)
      : R_(R), stride_(m.stride), rows_(std::min(R, TILE / 2)) {
    const int64_t tiles = tile_count();
    float* buffer = workspace.reserve(tiles * 2 * rows_ * stride_ / 4 + R * (stride_ / KC + 1));
    uint32_t* packed = reinterpret_cast<uint32_t*>(buffer);
    x_ = packed;
    x_scales_ = buffer + tiles * 2 * rows_ * stride_ / 4;
    alignas(64) int16_t levels[KC];
    alignas(64) int8_t halves[TILE][KC];
    for (int64_t k0 = 0; k0 < stride_; k0 += KC) {
      const int64_t columns = std::min(KC, stride_ - k0);
      for (int64_t first = 0; first < R; first += rows_) {
        const uint32_t* rows[TILE] = {};
        const int64_t count = std::min(rows_, R - first);
        for (int64_t i = 0; i < rows_; i++) {
          int8_t *high = halves[i], *low = halves[rows_ + i];
          rows[i] = reinterpret_cast<const uint32_t*>(high);
          rows[rows_ + i] = reinterpret_cast<const uint32_t*>(low);
          if (i < count) {
            x_scales_[k0 / KC * R + first + i] = quantise_block(
                in.fp32 + (first + i) * in.stride + k0, columns, max_input(m.format), levels);
            for (int64_t c = 0; c < columns; c += 32) {
              const int64_t at = m.format == INT4 ? int4_place(c, columns) : c;
              split(load_words(levels + c), high + at, low + at);
            }
          } else {
            std::memset(high, 0, columns);
            std::memset(low, 0, columns);
          }
        }
        pack_tiles(rows, 2 * rows_, 2 * rows_, columns / 4, packed);
        packed += 2 * rows_ * columns / 4;
      }
    }
  }

  void multiply(const Matrix& m, Range range, Workspace& workspace, Workspace& copy, float* y,
                int64_t y_stride) const {
    const TileRegisters registers(TILE, 2 * rows_);
    float* buffer = workspace.reserve(5 * TILE_WORDS + 2 * TILE * PLANE_STRIDE / 4);
    const Scratch scratch{reinterpret_cast<int32_t*>(buffer),
                          reinterpret_cast<char*>(buffer + 5 * TILE_WORDS), copy};
    if (m.format == INT4)
      for (int64_t n = range.begin; n < range.end; n += TILE)
        for (int64_t k0 = 0; k0 < stride_; k0 += KC)
          multiply_int4(m, n, range.end, k0, scratch, y, y_stride);
    else
      for (int64_t begin = range.begin; begin < range.end; begin += AMX_INTEGER_NR)
        for (int64_t k0 = 0; k0 < stride_; k0 += KC)
          multiply_int8(m, {begin, std::min(range.end, begin + AMX_INTEGER_NR)}, k0, scratch, y,
                        y_stride);
  }

 private:
  // A row of a plane of int4 weights, with a cache line more: see `partial_offset`.
  static const int64_t PLANE_STRIDE = KC + 64;

  struct Scratch {
    int32_t* sums;  // [4, 16, 16] and room for `transpose_sums`
    char* planes;   // [2, 16, PLANE_STRIDE]
    Workspace& copy;
  };

  static ALWAYS_INLINE void split(__m512i levels, void* high, void* low) {
    const __m512i rounded = _mm512_add_epi16(levels, _mm512_set1_epi16(128));
    store_vector(high, _mm512_cvtepi16_epi8(_mm512_srai_epi16(rounded, 8)));
    store_vector(low, _mm512_cvtepi16_epi8(levels));
  }

  // Where columns c to c + 31 of a block lie in planes of int4 weights and in their input: of each
  // 128 columns, those of low nibbles come first (see `unpack_int4`).
  static int64_t int4_place(int64_t c, int64_t columns) {
    const int64_t first = c / 128 * 128, part = c % 128 / 32;
    return first + 128 > columns ? c : first + (part % 2 * 2 + part / 2) * 32;
  }

  // Unpacks a row of int4 weights as `Int16Row`, and splits it.
  static ALWAYS_INLINE void unpack_int4(const Int16Row<INT4>& row, int64_t columns, char* high,
                                        char* low) {
    const __m512i factors = load_words(row.factors);
    for (int64_t c = 0; c < columns; c += 128) {
      // 64 columns in each half of `raw`, or only in the first one.
      const bool whole = c + 128 <= columns;
      const __m512i raw = _mm512_maskz_loadu_epi8(whole ? ~uint64_t(0) : uint32_t(-1),
                                                  row.at + c / 2);
      const __m512i group = _mm512_inserti64x4(_mm512_set1_epi16(int16_t(c / 32)),
                                               _mm256_set1_epi16(int16_t(c / 32 + 2)), 1);
      const __m512i next = _mm512_add_epi16(group, _mm512_set1_epi16(1));
      unpack_nibbles(_mm512_slli_epi16(raw, 12), _mm512_slli_epi16(raw, 4),
                     _mm512_permutexvar_epi16(group, factors), whole, high + c, low + c);
      const int64_t at = c + (whole ? 64 : 32);
      unpack_nibbles(_mm512_slli_epi16(raw, 8), raw, _mm512_permutexvar_epi16(next, factors),
                     whole, high + at, low + at);
    }
  }

  // The levels of nibbles of even bytes and of odd ones, each in the upper 4 of 16 bits, times
  // their factors, split; the bytes are in order again. Only half of them is stored if not `whole`.
  static ALWAYS_INLINE void unpack_nibbles(__m512i even, __m512i odd, __m512i factors, bool whole,
                                           char* high, char* low) {
    const __m512i nibble = _mm512_set1_epi16(int16_t(0xf000));
    const __m512i sign = _mm512_set1_epi16(INT16_MIN), half = _mm512_set1_epi16(128);
    const __m512i lower = _mm512_set1_epi16(0x00ff), upper = _mm512_set1_epi16(int16_t(0xff00));
    // (x & nibble) ^ sign, as in `Int16Row`
    even = _mm512_mulhrs_epi16(_mm512_ternarylogic_epi64(even, nibble, sign, 0x6a), factors);
    odd = _mm512_mulhrs_epi16(_mm512_ternarylogic_epi64(odd, nibble, sign, 0x6a), factors);
    // a | (b & c)
    const __m512i highs =
        _mm512_ternarylogic_epi64(_mm512_srli_epi16(_mm512_add_epi16(even, half), 8),
                                  _mm512_add_epi16(odd, half), upper, 0xf8);
    const __m512i lows =
        _mm512_ternarylogic_epi64(_mm512_slli_epi16(odd, 8), even, lower, 0xf8);
    if (whole) {
      store_vector(high, highs);
      store_vector(low, lows);
    } else {
      store_vector(high, _mm512_castsi512_si256(highs));
      store_vector(low, _mm512_castsi512_si256(lows));
    }
  }

  int64_t tile_count() const { return (R_ + rows_ - 1) / rows_; }

  // A tile of input in the block of columns that begins at k0.
  const uint32_t* tile(int64_t number, int64_t k0) const {
    return x_ + 2 * rows_ * (tile_count() * k0 + number * std::min(KC, stride_ - k0)) / 4;
  }

  // Calls `kernel2` for pairs of tiles of input, and `kernel1` for the last one.
  template <class Kernel2, class Kernel1>
  void for_each_tile(Kernel2 kernel2, Kernel1 kernel1) const {
    const int64_t tiles = tile_count();
    for (int64_t t = 0; t + 2 <= tiles; t += 2) kernel2(t);
    if (tiles % 2) kernel1(tiles - 1);
  }

  // Adds the dequantised products of one tile of input and rows n to n + 15 of the weights to y;
  // the first block overwrites it. `sums`: of all bits of int8 weights or of the high bits of int4
  // ones; `low_sums`: of the low bits of int4 weights.
  void store_results(const int32_t* sums, const int32_t* low_sums, __m512 scales, int64_t number,
                     int64_t n, int64_t end, int64_t k0, float* y, int64_t y_stride) const {
    const __mmask16 valid = __mmask16((1u << std::min(TILE, end - n)) - 1);
    const float* x_scales = x_scales_ + k0 / KC * R_;
    __m512i v[TILE], w[TILE];
    transpose_sums(sums, 2 * rows_, v);
    if (low_sums) transpose_sums(low_sums, 2 * rows_, w);
    for (int64_t i = 0; i < std::min(rows_, R_ - number * rows_); i++) {
      __m512i total = _mm512_add_epi32(_mm512_slli_epi32(v[i], 8), v[rows_ + i]);
      if (low_sums)
        total = _mm512_add_epi32(
            _mm512_slli_epi32(total, 8),
            _mm512_add_epi32(_mm512_slli_epi32(w[i], 8), w[rows_ + i]));
      const int64_t row = number * rows_ + i;
      float* to = y + row * y_stride + n;
      const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(x_scales[row]));
      const __m512 before = k0 ? _mm512_maskz_loadu_ps(valid, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, valid, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scale, before));
    }
  }

  void multiply_int8(const Matrix& m, Range range, int64_t k0, const Scratch& scratch, float* y,
                     int64_t y_stride) const {
    const int64_t steps = std::min(KC, stride_ - k0) / 64, distance = tile_distance(k0);
    const char* weights[PANEL_TILES];
    for (int64_t n = range.begin; n < range.end; n += TILE)
      weights[(n - range.begin) / TILE] = whole_tile(m, n, scratch.copy) + k0;
    const auto tiles_from = [&](int64_t n) {
      return WeightTiles{weights + (n - range.begin) / TILE, stride_};
    };
    const auto store = [&](int64_t sum, int64_t number, int64_t n) {
      const __mmask16 valid = __mmask16((1u << std::min(TILE, range.end - n)) - 1);
      const __m512 scales =
          _mm512_maskz_loadu_ps(valid, static_cast<const float*>(m.scales) + n);
      store_results(scratch.sums + sum * TILE_WORDS, nullptr, scales, number, n, range.end, k0, y,
                    y_stride);
    };
    const auto one_tile = [&](int64_t number, int64_t begin) {
      const bool prefetches = tile_count() == 1 && stride_ / 4 >= AMX_LONG_WORDS;
      for (int64_t n = begin, count; n < range.end; n += count * TILE) {
        count = range.end - n >= 4 * TILE && !prefetches ? 4 : 1;
        const WeightTiles w = tiles_from(n);
        if (count == 4)
          accumulate_tiles<Int8Tiles, 4>(w, tile(number, k0), 2 * rows_, steps, true, scratch.sums);
        else
          accumulate_tiles<Int8Tiles, 1>(w, tile(number, k0), 2 * rows_, steps, true, scratch.sums,
                                         prefetches ? w.tiles[0] + TILE * stride_ : nullptr);
        for (int64_t t = 0; t < count; t++) store(t, number, n + t * TILE);
      }
    };
    const auto two_tiles = [&](int64_t number) {
      int64_t n = range.begin;
      for (; n + 2 * TILE <= range.end; n += 2 * TILE) {
        accumulate_tiles_2x2<Int8Tiles>(tiles_from(n), tile(number, k0), distance, steps, true,
                                        scratch.sums);
        for (int t = 0; t < 4; t++) store(t, number + t % 2, n + t / 2 * TILE);
      }
      one_tile(number, n);
      one_tile(number + 1, n);
    };
    for_each_tile(two_tiles, [&](int64_t number) { one_tile(number, range.begin); });
  }

  // Words from one tile of input to the next in a block of columns.
  int64_t tile_distance(int64_t k0) const { return 2 * rows_ * std::min(KC, stride_ - k0) / 4; }

  // Rows n to n + 15, which are unpacked into two planes of high and of low levels.
  void multiply_int4(const Matrix& m, int64_t n, int64_t end, int64_t k0, const Scratch& scratch,
                     float* y, int64_t y_stride) const {
    const int64_t columns = std::min(KC, stride_ - k0), plane = TILE * PLANE_STRIDE;
    alignas(64) float scales[TILE];
    for (int64_t r = 0; r < TILE; r++) {
      const Int16Row<INT4> row(m, std::min(n + r, m.rows - 1), k0, columns);
      scales[r] = row.scale;
      char* at = scratch.planes + r * PLANE_STRIDE;
      // The same columns 16 rows on: rows of a block are too short for the hardware's prefetcher.
      for (int64_t line = 0; line < columns / 2; line += 64)
        prefetch(row.at + line, TILE * m.stride / 2);
      unpack_int4(row, columns, at, at + plane);
    }
    const char* planes[] = {scratch.planes, scratch.planes + plane};
    const WeightTiles weights{planes, PLANE_STRIDE};
    const auto store = [&](int64_t sum, int64_t low_sum, int64_t number) {
      store_results(scratch.sums + sum * TILE_WORDS, scratch.sums + low_sum * TILE_WORDS,
                    _mm512_load_ps(scales), number, n, end, k0, y, y_stride);
    };
    for_each_tile(
        [&](int64_t number) {
          accumulate_tiles_2x2<Int8Tiles>(weights, tile(number, k0), tile_distance(k0),
                                          columns / 64, true, scratch.sums);
          store(0, 2, number);
          store(1, 3, number + 1);
        },
        [&](int64_t number) {
          accumulate_tiles<Int8Tiles, 2>(weights, tile(number, k0), 2 * rows_, columns / 64, true,
                                         scratch.sums);
          store(0, 1, number);
        });
  }

  int64_t R_, stride_, rows_;  // rows_: of input in a tile
  const uint32_t* x_;          // [block of columns, tile, columns / 64, 16, 2 rows_]
  float* x_scales_;            // [block of columns, R]
};

}  // namespace

#endif
