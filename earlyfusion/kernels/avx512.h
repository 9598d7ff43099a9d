// Products for processors whose registers hold sixteen floats (AVX-512), of any number of rows of input.
//
// Everything is multiplied in words of 32 bits: a float, a pair of bf16 (where an instruction multiplies them), or a
// pair of whole numbers of 16 bits, for int8 and int4 weights. There are three ways, and an output is the same to the
// bit in all of them:
//
// In registers (`put_in_registers`): a lane is one of sixteen sums of an output. Four rows of weights are multiplied
// with up to four rows of input, from their first to their last column.
//
// By blocks (`put_few_words`, `put_few_whole`): the same, but all rows of input pass by one block of columns of four
// rows of weights, which stays in the first-level cache, while the next four are fetched evenly.
//
// By panels (`put_many_words`, `put_many_whole`): a lane is an output. PANEL rows of weights are turned around, so that
// a vector holds one word of sixteen rows, and stay in the second-level cache while tiles of up to ROWS rows of input
// pass by. The sixteen sums of an output are computed one after the other and added up in the order of `sums`.
//
// Whole numbers: the input is rounded with one scale for each block of columns of a row. Weights of int8 are whole
// numbers already; a weight of int4 becomes its level times the scale of its 32 columns, as a part of the largest scale
// of the row and block, at most 800. A sum over a block is exact and fits into 32 bits; sums of blocks are floats.

#pragma once

#include "operands.h"

#if defined(VECTORS_OF_SIXTEEN)

namespace {

const int64_t PANEL = 32;      // rows of weights of a panel
const int64_t ROWS = 12;       // rows of input of a tile: 2 * 12 of 32 registers hold its sums
const int64_t GROUP = 4;       // tiles that pass by a part of a panel together
const int64_t FEW_ROWS = 6;    // rows of input whose sums fit into the registers: 6 * 4 of 32
const int64_t FEW_WORDS = 512;  // words of a row of weights that all rows of input pass by before the next are read

bool in_whole_numbers(const Matrix& m) { return m.format == INT8 || m.format == INT4; }

// How R rows of input are multiplied with a matrix: the fastest way for its size.
enum Way { REGISTERS, BLOCKS, PANELS };
inline Way way(const Matrix& m, int64_t R) {
  if (in_whole_numbers(m)) return R < (m.format == INT4 ? 28 : 44) ? BLOCKS : PANELS;
  const int64_t words = row_bytes(m) / 4;
  if (R <= 2 || words <= 704) return REGISTERS;
  return R < 44 ? BLOCKS : words <= 1024 ? REGISTERS : PANELS;
}

// Whether this processor's products with such a matrix are those of this file.
bool in_words(const Matrix& m) {
#if defined(__AVX512BF16__)
  return true;
#else
  return m.format != BF16;
#endif
}

// ---- words

INLINE __m512i words(const void* p) { return _mm512_loadu_si512(p); }

struct Floats {
  typedef floats16 Sum;
  static INLINE Sum add(Sum sum, __m512i w, __m512i x) {
    return floats16(_mm512_fmadd_ps(_mm512_castsi512_ps(w), _mm512_castsi512_ps(x), __m512(sum)));
  }
};

#if defined(__AVX512BF16__)
struct Pairs {
  typedef floats16 Sum;
  static INLINE Sum add(Sum sum, __m512i w, __m512i x) {
    return floats16(_mm512_dpbf16_ps(__m512(sum), __m512bh(w), __m512bh(x)));
  }
};
#else
typedef Floats Pairs;  // not used
#endif

struct WholePairs {
  typedef ints16 Sum;
  static INLINE Sum add(Sum sum, __m512i w, __m512i x) {
#if defined(__AVX512VNNI__)
    return ints16(_mm512_dpwssd_epi32(__m512i(sum), w, x));
#else
    return ints16(_mm512_add_epi32(__m512i(sum), _mm512_madd_epi16(w, x)));
#endif
  }
};

// Sixteen vectors of sixteen words, turned around.
INLINE void turn(__m512i* v) {
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
  // v[4 * g + c] has, in its part L of four words, word 4 * L + c of rows 4 * g to 4 * g + 3.
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

// ---- whole numbers

// A sum over a block fits into 32 bits: 127 * 16,000 for each column of int8, 800 * 2,620 of int4.
const int64_t BLOCK = 1024;  // columns
inline float largest_input(int64_t format) { return format == INT8 ? 16000 : 2620; }
const float LARGEST_WEIGHT = 800;  // of int4

// The largest entry without its sign; infinite or NaN if an entry is.
inline float largest(const float* x, int64_t columns) {
  // Without their sign, floats are in the order of their bits, and NaN is the largest of all.
  const __m512i unsigned_bits = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();
  for (int64_t c = 0; c < columns; c += 16)
    most = _mm512_max_epi32(most, _mm512_and_si512(words(x + c), unsigned_bits));
  const int32_t bits = _mm512_reduce_max_epi32(most);
  float top;
  std::memcpy(&top, &bits, sizeof(top));
  return top;
}

// A block of a row of input as whole numbers. Returns the scale: infinite or NaN if an entry is, and then so is each
// result.
inline float round_block(const float* x, int64_t columns, float most, int16_t* out) {
  const float top = largest(x, columns);
  const __m512 factor = _mm512_set1_ps(top > 1e-30f ? most / top : 0);
  for (int64_t c = 0; c < columns; c += 16) {
    const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + c), factor));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c), _mm512_cvtsepi32_epi16(whole));
  }
  return top / most;
}

// One block of columns of a row of int8 or int4 weights.
template <Format F>
struct WholeRow {
  const char* at;
  float scale;
    alignas(32) int16_t parts[32];
  // of int4: the scales as parts of the largest

  WholeRow() = default;
  WholeRow(const Matrix& m, int64_t n, int64_t first, int64_t columns) {
    at = static_cast<const char*>(m.data) + (n * m.stride + first) * (F == INT8 ? 8 : 4) / 8;
    if (F == INT8)
      scale = static_cast<const float*>(m.scales)[n];
    else
      divide(static_cast<const uint16_t*>(m.scales) + (n * m.stride + first) / 32, columns / 32);
  }

  // The scales are those of `count` times 32 columns.
  void divide(const uint16_t* scales, int64_t count) {
    __m512 all[2];
    for (int i = 0; i < 2; i++) {
      const int64_t left = std::min<int64_t>(16, std::max<int64_t>(0, count - 16 * i));
      const __m256i raw = _mm256_maskz_loadu_epi16(__mmask16((1u << left) - 1), scales + 16 * i);
      all[i] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(all[0]), _mm512_abs_ps(all[1])));
    const __m512 factor = _mm512_set1_ps(top > 0 ? LARGEST_WEIGHT / top : 0);
    for (int i = 0; i < 2; i++) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(all[i], factor));
      write(parts + 16 * i, _mm512_cvtsepi32_epi16(whole));
    }
    scale = top * 8 / LARGEST_WEIGHT;
  }

  // 32 columns from column c on, in pairs.
  INLINE __m512i unpack(int64_t c) const {
    if (F == INT8) return _mm512_cvtepi8_epi16(read<__m256i>(at + c));
    // 32 bytes hold 64 columns, the first 32 in the low nibbles. A nibble in the upper bits, its first bit turned
    // around, is a level times 4,096; the product with a part is divided by 32,768.
    const __m512i raw = _mm512_cvtepu8_epi16(read<__m256i>(at + c / 64 * 32));
    const __m512i upper = _mm512_slli_epi16(raw, c % 64 ? 8 : 12);
    const __m512i mask = _mm512_set1_epi16(int16_t(0xf000)), sign = _mm512_set1_epi16(INT16_MIN);
    const __m512i level = _mm512_ternarylogic_epi64(upper, mask, sign, 0x6a);  // (upper & mask) ^ sign
    return _mm512_mulhrs_epi16(level, _mm512_set1_epi16(parts[c / 32]));
  }
};

// ---- few rows of input

// Four rows of weights that are read next, fetched line by line.
class Following4 {
 public:
  Following4() = default;  // nothing

  // `bytes` of rows `row_bytes` apart.
  Following4(const char* first, int64_t row_bytes, int64_t bytes)
      : first_(first), row_bytes_(row_bytes), lines_((bytes + 63) / 64) {}

  // Fetches `each` / 256 lines more.
  INLINE void fetch(int64_t each) {
    for (due_ += each; due_ >= 256; due_ -= 256) {
      _mm_prefetch(first_ + r_ * row_bytes_ + 64 * line_, _MM_HINT_T1);
      if (++line_ == lines_) line_ = 0, r_ = (r_ + 1) % 4;
    }
  }

 private:
  const char* first_ = nullptr;
  int64_t row_bytes_ = 0, lines_ = 0, line_ = 0, r_ = 0, due_ = 0;
};

// Adds the products of X rows of input with four rows of weights, in `count` words, to their sums [X, 4]; at the
// `beginning` these are nothing. Meanwhile it fetches `each` / 256 lines of the `next` weights per 32 words.
template <class Word, int X>
void pass4(const uint32_t* w, int64_t w_stride, const uint32_t* x, int64_t x_stride, int64_t count,
                  bool beginning, typename Word::Sum* sums, Following4& next, int64_t each) {
  typename Word::Sum sum[X][4];
#pragma GCC unroll 6
  for (int i = 0; i < X; i++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) sum[i][r] = beginning ? typename Word::Sum{} : sums[4 * i + r];
  for (int64_t begin = 0; begin < count; begin += 32) {
    next.fetch(each);
#pragma GCC unroll 2
    for (int64_t c = begin; c < begin + 32; c += 16) {
      __m512i entries[X];
#pragma GCC unroll 6
      for (int i = 0; i < X; i++) hold(entries[i] = words(x + i * x_stride + c));
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        __m512i v = words(w + r * w_stride + c);
        hold(v);
#pragma GCC unroll 6
        for (int i = 0; i < X; i++) sum[i][r] = Word::add(sum[i][r], v, entries[i]);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < X; i++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) sums[4 * i + r] = sum[i][r];
}

template <class Word>
using Pass4 = void (*)(const uint32_t*, int64_t, const uint32_t*, int64_t, int64_t, bool, typename Word::Sum*,
                       Following4&, int64_t);

template <class Word>
Pass4<Word> pass_of(int64_t X) {
  static const Pass4<Word> all[] = {pass4<Word, 1>, pass4<Word, 2>, pass4<Word, 3>,
                                    pass4<Word, 4>, pass4<Word, 5>, pass4<Word, 6>};
  return all[X - 1];
}

// The sums of 4 `rows` vectors, which are used up, four rows at a time: `take(row, sums)` for rows row to row + 3 of
// input, sums [4, 4]. Those after the last row mean nothing.
template <class Sum, class Take>
INLINE void each_four(Sum* all, int64_t rows, Take take) {
  for (int64_t row = 0; row < rows; row += 4) {
    Sum v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = row + i / 4 < rows ? all[4 * row + i] : Sum{};
    take(row, sums<16>(v));
  }
}

// y[row, n] = input[row] . m[n] for all rows and the n of `mine`: floats, and bf16 with bf16 inputs. The input is
// ordered by blocks [R, words of the block], the last of which may be shorter.
template <class Word>
void put_few_words(const Matrix& m, Range mine, const uint32_t* blocks, int64_t R, Room& memory, float* y,
                   int64_t y_stride) {
  const int64_t bytes = row_bytes(m), stride = bytes / 4, tiles = (R + FEW_ROWS - 1) / FEW_ROWS;
  floats16* sums = reinterpret_cast<floats16*>(memory.of(R * 64));
  const char* data = static_cast<const char*>(m.data);
  for (int64_t n = mine.first; n < mine.last; n += 4) {
    for (int64_t first = 0; first < stride; first += FEW_WORDS) {
      const int64_t count = std::min(FEW_WORDS, stride - first);
      Following4 following(data + std::min(n + 4, m.rows - 4) * bytes + 4 * first, bytes, 4 * count);
      const uint32_t* w = reinterpret_cast<const uint32_t*>(data + n * bytes) + first;
      const int64_t each = 2 * 4 * 256 / tiles;  // 32 words of four rows are eight lines
      for (int64_t t = 0, row = 0; t < tiles; t++) {
        const int64_t X = (R - row + tiles - t - 1) / (tiles - t);
        pass_of<Word>(X)(w, stride, blocks + R * first + row * count, count, count, first == 0, sums + 4 * row,
                         following, each);
        row += X;
      }
    }
    each_four(sums, R, [&](int64_t row, floats16 four) {
      float out[16];
      store(out, four);
      for (int64_t i = row; i < std::min(R, row + 4); i++) std::memcpy(y + i * y_stride + n, out + 4 * (i - row), 16);
    });
  }
}

// The products of X rows of input and four rows of weights, `bytes` apart. The sums stay in registers. With FETCH it
// fetches what lies `ahead` bytes further on.
template <class Word, int X, bool FETCH>
INLINE void put_four_words(const char* w, int64_t bytes, const uint32_t* x, int64_t x_stride, int64_t ahead, float* y,
                           int64_t y_stride) {
  floats16 sum[4 * X] = {};
  for (int64_t at = 0; at < bytes; at += 64, x += 16) {
    __m512i entries[X];
#pragma GCC unroll 4
    for (int i = 0; i < X; i++) hold(entries[i] = words(x + i * x_stride));
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      if (FETCH) _mm_prefetch(w + r * bytes + at + ahead, _MM_HINT_T1);
      __m512i v = words(w + r * bytes + at);
      if (X > 1) hold(v);
#pragma GCC unroll 4
      for (int i = 0; i < X; i++) sum[4 * i + r] = Word::add(sum[4 * i + r], v, entries[i]);
    }
  }
  float out[16];
  store(out, sums<4 * X>(sum));
  for (int i = 0; i < X; i++) std::memcpy(y + i * y_stride, out + 4 * i, 16);
}

template <class Word, int X, bool FETCH>
void put_rows(const char* w, int64_t bytes, int64_t count, const uint32_t* x, int64_t x_stride, int64_t ahead, float* y,
              int64_t y_stride) {
  for (int64_t n = 0; n < count; n += 4)
    put_four_words<Word, X, FETCH>(w + n * bytes, bytes, x, x_stride, ahead, y + n, y_stride);
}

// y[row, n] = x[row] . m[n] for all rows and the n of `mine`, four by four: floats, and bf16 with bf16 inputs.
template <class Word>
void put_in_registers(const Matrix& m, Range mine, const uint32_t* x, int64_t x_stride, int64_t R, float* y,
                      int64_t y_stride) {
  const decltype(&put_rows<Word, 1, true>) puts[] = {
      put_rows<Word, 1, false>, put_rows<Word, 2, false>, put_rows<Word, 3, false>, put_rows<Word, 4, false>,
      put_rows<Word, 1, true>,  put_rows<Word, 2, true>,  put_rows<Word, 3, true>,  put_rows<Word, 4, true>};
  const int64_t bytes = row_bytes(m);
  // Many rows of input pass by 128 KB of weights, which stay in the second-level cache.
  const int64_t width = R <= 16 ? 4 : std::max<int64_t>(4, (int64_t(1) << 17) / bytes / 4 * 4);
  for (int64_t n = mine.first; n < mine.last; n += width) {
    const char* w = static_cast<const char*>(m.data) + n * bytes;
    for (int64_t row = 0; row < R; row += 4) {
      const int64_t X = std::min<int64_t>(4, R - row), fetches = row == 0;
      puts[4 * fetches + X - 1](w, bytes, std::min(width, mine.last - n), x + row * x_stride, x_stride, width * bytes,
                                y + row * y_stride + n, y_stride);
    }
  }
}

// The input of products with int8 and int4 weights, as whole numbers.
struct WholeInput {
  int16_t* entries;  // for each block [R, columns of the block], or, for many rows, as `fill_whole_tiles` leaves it
  float* scales;     // [blocks, R]
  int64_t R;

  static int64_t floats(int64_t R, int64_t stride) { return R * stride / 2 + R * (stride / BLOCK + 1); }

  WholeInput(float* room, int64_t R, int64_t stride)
      : entries(reinterpret_cast<int16_t*>(room)), scales(room + R * stride / 2), R(R) {}
};

// `pass4` of the first X rows: it unpacks the weights, and leaves them in `unpacked` [4, columns of a block] for the
// others (KEEP). It fetches the same columns of the next four rows, `distance` bytes further on.
template <Format F, int X, bool KEEP>
void first_pass(const WholeRow<F>* rows, int16_t* unpacked, const int16_t* x, int64_t columns, int64_t distance,
                ints16* sums) {
  const int64_t line = F == INT8 ? 64 : 128;  // columns
  ints16 sum[X][4] = {};
  for (int64_t begin = 0; begin < columns; begin += 64) {
    if (begin % line == 0)
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) _mm_prefetch(rows[r].at + begin * 64 / line + distance, _MM_HINT_T1);
#pragma GCC unroll 2
    for (int64_t c = begin; c < begin + 64; c += 32) {
      __m512i entries[X];
#pragma GCC unroll 6
      for (int i = 0; i < X; i++) hold(entries[i] = words(x + i * columns + c));
#pragma GCC unroll 4
      for (int r = 0; r < 4; r++) {
        __m512i v = rows[r].unpack(c);
        hold(v);
        if (KEEP) _mm512_storeu_si512(unpacked + r * BLOCK + c, v);
#pragma GCC unroll 6
        for (int i = 0; i < X; i++) sum[i][r] = WholePairs::add(sum[i][r], v, entries[i]);
      }
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < X; i++)
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) sums[4 * i + r] = sum[i][r];
}

template <Format F, int X>
void first_pass_of(const WholeRow<F>* rows, int16_t* unpacked, const int16_t* x, int64_t columns, int64_t distance,
                   ints16* sums) {
  (unpacked ? first_pass<F, X, true> : first_pass<F, X, false>)(rows, unpacked, x, columns, distance, sums);
}

template <Format F>
void put_few_whole(const Matrix& m, Range mine, const WholeInput& input, Room& memory, float* y, int64_t y_stride) {
  const decltype(&first_pass_of<F, 1>) first_passes[] = {first_pass_of<F, 1>, first_pass_of<F, 2>, first_pass_of<F, 3>,
                                                         first_pass_of<F, 4>, first_pass_of<F, 5>, first_pass_of<F, 6>};
  const int64_t R = input.R, bytes = row_bytes(m), tiles = (R + FEW_ROWS - 1) / FEW_ROWS;
  float* room = memory.of(R * 64 + R * 16 + 2 * BLOCK);
  ints16* sums = reinterpret_cast<ints16*>(room);
  float* totals = room + R * 64;  // [R, 4], of blocks
  int16_t* unpacked = tiles > 1 ? reinterpret_cast<int16_t*>(totals + R * 16) : nullptr;
  for (int64_t n = mine.first; n < mine.last; n += 4) {
    std::fill_n(totals, R * 4 + 16, 0.0f);
    for (int64_t first = 0; first < m.stride; first += BLOCK) {
      const int64_t columns = std::min(BLOCK, m.stride - first);
      WholeRow<F> rows[4];
      for (int r = 0; r < 4; r++) rows[r] = WholeRow<F>(m, n + r, first, columns);
      const int16_t* x = input.entries + R * first;
      Following4 nothing;
      for (int64_t t = 0, row = 0; t < tiles; t++) {
        const int64_t X = (R - row + tiles - t - 1) / (tiles - t);
        if (t == 0)
          first_passes[X - 1](rows, unpacked, x, columns, 4 * bytes, sums);
        else
          pass_of<WholePairs>(X)(reinterpret_cast<const uint32_t*>(unpacked), BLOCK / 2,
                                 reinterpret_cast<const uint32_t*>(x + row * columns), columns / 2, columns / 2, true,
                                 sums + 4 * row, nothing, 0);
        row += X;
      }
      const __m512 scale = _mm512_setr4_ps(rows[0].scale, rows[1].scale, rows[2].scale, rows[3].scale);
      const float* x_scales = input.scales + first / BLOCK * R;
      each_four(sums, R, [&](int64_t row, ints16 four) {
        const __mmask16 some = __mmask16((1u << std::min<int64_t>(4, R - row)) - 1);
        const __m512i of_row = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        const __m512 inputs = _mm512_permutexvar_ps(of_row, _mm512_maskz_loadu_ps(some, x_scales + row));
        float* to = totals + 4 * row;
        store(to, fused(__builtin_convertvector(four, floats16), floats16(_mm512_mul_ps(scale, inputs)), load(to)));
      });
    }
    for (int64_t row = 0; row < R; row++) std::memcpy(y + row * y_stride + n, totals + 4 * row, 16);
  }
}

// ---- many rows of input

typedef TilesOf<ROWS> Tiles;

// Adds the products of X rows of input, [steps, X], and two vectors of weights, [steps, 2], to their sums.
template <class Word, int X>
INLINE void multiply_tile(const uint32_t* w, const uint32_t* x, int64_t steps, typename Word::Sum (&sum)[X][2]) {
#pragma GCC unroll 12
  for (int i = 0; i < X; i++) sum[i][0] = sum[i][1] = typename Word::Sum{};
  for (int64_t step = 0; step < steps; step++, w += PANEL, x += X) {
    __m512i low = words(w), high = words(w + 16);
    hold(low);
    hold(high);
#pragma GCC unroll 12
    for (int i = 0; i < X; i++) {
      const __m512i entry = _mm512_set1_epi32(int32_t(x[i]));
      sum[i][0] = Word::add(sum[i][0], low, entry);
      sum[i][1] = Word::add(sum[i][1], high, entry);
    }
  }
}

// Sixteen words of each of some rows, turned around: those of word j, `rows` of them, at out[j] + `to`.
INLINE void turn_rows(const uint32_t* const* row, int64_t rows, int64_t at, uint32_t* const* out, int64_t to) {
  __m512i v[16];
#pragma GCC unroll 16
  for (int64_t r = 0; r < 16; r++) v[r] = r < rows ? words(row[r] + at) : _mm512_setzero_si512();
  turn(v);
  const __mmask16 some = __mmask16((1u << rows) - 1);
#pragma GCC unroll 16
  for (int j = 0; j < 16; j++)
    if (rows == 16)
      _mm512_storeu_si512(out[j] + to, v[j]);
    else
      _mm512_mask_storeu_epi32(out[j] + to, some, v[j]);
}

// How many sums are computed at a time, so that their weights stay in the first-level cache.
inline int sums_together(int64_t steps) { return steps <= 16 ? 8 : steps <= 32 ? 4 : steps <= 64 ? 2 : 1; }

// Where the columns of the k-th sum begin in a panel. A line is left free between sums, as the caches have few places
// for addresses that differ by a power of two.
INLINE int64_t place(int64_t k, int64_t steps) { return k * (steps * PANEL + 16); }

// The input turned around as the panels are.
struct Turned {
  Tiles tiles;
  int64_t steps;
  uint32_t* data;
  PlacesOf<Tiles, GROUP> places{tiles, steps, sums_together(steps)};

  // Rows of words, `stride` words apart.
  void fill(const uint32_t* x, int64_t stride) const {
    for (int64_t tile = 0; tile < tiles.count; tile++) {
      const int64_t X = tiles.rows(tile);
      const uint32_t* row[16];
      for (int64_t i = 0; i < X; i++) row[i] = x + (tiles.first(tile) + i) * stride;
      uint32_t* out[SUMS];
      for (int sum = 0; sum < SUMS; sum++) out[sum] = data + places.of_sum(tile, sum);
      for (int64_t step = 0; step < steps; step++) turn_rows(row, X, 16 * step, out, step * X);
    }
  }
};

// `count` sums, from the k-th one on, of the products of X rows of input and a panel. `kept` holds sums of sums,
// [level, X, PANEL]; the whole goes to y. After each sum `each` lines are fetched `ahead`.
template <class Word, int X>
void tile_of(const uint32_t* panel, const uint32_t* x, int64_t steps, int k, int count, float* kept, float* y,
             int64_t y_stride, Ahead& ahead, int64_t each) {
  for (const int last = k + count; k < last; k++, x += steps * X) {
    ahead.fetch(each);
    floats16 sum[X][2];
    multiply_tile<Word, X>(panel + place(k, steps), x, steps, sum);
    float* level = kept;
    for (int ones = k; ones % 2; ones /= 2, level += X * PANEL)
#pragma GCC unroll 12
      for (int i = 0; i < X; i++)
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++) sum[i][g] = load(level + i * PANEL + 16 * g) + sum[i][g];
    float* to = k == SUMS - 1 ? y : level;
    const int64_t to_stride = k == SUMS - 1 ? y_stride : PANEL;
#pragma GCC unroll 12
    for (int i = 0; i < X; i++)
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) store(to + i * to_stride + 16 * g, sum[i][g]);
  }
}

// The same for one block of whole numbers: adds the products to `totals` [X, PANEL].
template <int X>
void whole_tile(const uint32_t* panel, const uint32_t* x, int64_t steps, const float* scales, const float* x_scales,
                float* totals) {
  ints16 sum[X][2];
  multiply_tile<WholePairs, X>(panel, x, steps, sum);
#pragma GCC unroll 12
  for (int i = 0; i < X; i++)
#pragma GCC unroll 2
    for (int g = 0; g < 2; g++) {
      float* to = totals + i * PANEL + 16 * g;
      const floats16 both = load(scales + 16 * g) * splat(x_scales[i]);
      store(to, fused(__builtin_convertvector(sum[i][g], floats16), both, load(to)));
    }
}

template <class Word>
using Tile = void (*)(const uint32_t*, const uint32_t*, int64_t, int, int, float*, float*, int64_t, Ahead&, int64_t);
using WholeTile = void (*)(const uint32_t*, const uint32_t*, int64_t, const float*, const float*, float*);

template <class Word>
Tile<Word> tile_for(int64_t X) {
  static const Tile<Word> all[] = {tile_of<Word, 6>, tile_of<Word, 7>,  tile_of<Word, 8>, tile_of<Word, 9>,
                                   tile_of<Word, 10>, tile_of<Word, 11>, tile_of<Word, 12>};
  return all[X - 6];
}

WholeTile whole_tile_for(int64_t X) {
  static const WholeTile all[] = {whole_tile<6>, whole_tile<7>, whole_tile<8>, whole_tile<9>,
                                  whole_tile<10>, whole_tile<11>, whole_tile<12>};
  return all[X - 6];
}

// The next panel of a matrix.
inline Ahead next_panel(const Matrix& m, int64_t n) {
  const int64_t next = std::max<int64_t>(0, std::min(PANEL, m.rows - n - PANEL));
  return {static_cast<const char*>(m.data) + (n + PANEL) * row_bytes(m), next * row_bytes(m) / 64};
}

// Rows n to n + 31 of a matrix, turned around: [SUMS, steps, PANEL]. Behind the last row of the matrix it is repeated;
// nobody uses the results.
inline void pack(const Matrix& m, int64_t n, int64_t steps, uint32_t* panel) {
  for (int64_t g = 0; g < PANEL; g += 16) {
    const uint32_t* row[16];
    for (int64_t r = 0; r < 16; r++)
      row[r] = static_cast<const uint32_t*>(m.data) + std::min(n + g + r, m.rows - 1) * steps * SUMS;
    uint32_t* out[SUMS];
    for (int sum = 0; sum < SUMS; sum++) out[sum] = panel + place(ORDER[sum], steps) + g;
    for (int64_t step = 0; step < steps; step++) turn_rows(row, 16, 16 * step, out, step * PANEL);
  }
}

// y[row, n] = input[row] . m[n] for all rows and the n of `mine`.
template <class Word>
void put_many_words(const Matrix& m, Range mine, const Turned& input, Room& memory, float* y, int64_t y_stride) {
  const Tiles& tiles = input.tiles;
  const int64_t steps = input.steps, size = place(SUMS, steps), levels = 4 * ROWS * PANEL;
  float *room = memory.of(size + GROUP * levels + tiles.R * PANEL), *kept = room + size;
  float* last = kept + GROUP * levels;  // [R, PANEL], of a panel that is not full
  uint32_t* panel = reinterpret_cast<uint32_t*>(room);
  const int together = input.places.together;
  for (int64_t n = mine.first; n < mine.last; n += PANEL) {
    const bool full = n + PANEL <= mine.last;
    float* out = full ? y + n : last;
    const int64_t out_stride = full ? y_stride : PANEL;
    pack(m, n, steps, panel);
    Ahead ahead = next_panel(m, n);
    const int64_t times = tiles.count * SUMS, each = (ahead.left + times - 1) / times;
    for (int64_t group = 0; group < tiles.count; group += GROUP) {
      const int64_t end = std::min(group + GROUP, tiles.count);
      for (int k = 0; k < SUMS; k += together)
        for (int64_t t = group; t < end; t++)
          tile_for<Word>(tiles.rows(t))(panel, input.data + input.places.at(group, t, k), steps, k, together,
                                        kept + (t - group) * levels, out + tiles.first(t) * out_stride, out_stride,
                                        ahead, each);
    }
    if (!full)
      for (int64_t row = 0; row < tiles.R; row++)
        std::memcpy(y + row * y_stride + n, last + row * PANEL, (mine.last - n) * sizeof(float));
  }
}

// The input for `put_many_whole`: for each block and tile [steps, row of the tile].
inline void fill_whole_tiles(const WholeInput& input, int64_t format, const float* x, int64_t x_stride, int64_t stride,
                             Room& memory) {
  const Tiles tiles(input.R);
  int16_t* rounded = reinterpret_cast<int16_t*>(memory.of(ROWS * BLOCK / 2));
  for (int64_t first = 0; first < stride; first += BLOCK) {
    const int64_t columns = std::min(BLOCK, stride - first);
    for (int64_t t = 0; t < tiles.count; t++) {
      const int64_t row = tiles.first(t), X = tiles.rows(t);
      const uint32_t* rows[16];
      for (int64_t i = 0; i < X; i++) {
        int16_t* at = rounded + i * BLOCK;
        input.scales[first / BLOCK * input.R + row + i] =
            round_block(x + (row + i) * x_stride + first, columns, largest_input(format), at);
        rows[i] = reinterpret_cast<const uint32_t*>(at);
      }
      uint32_t* to = reinterpret_cast<uint32_t*>(input.entries + input.R * first + row * columns);
      uint32_t* out[16];
      for (int j = 0; j < 16; j++) out[j] = to + j * X;
      for (int64_t at = 0; at < columns / 2; at += 16) turn_rows(rows, X, at, out, at * X);
    }
  }
}

inline void fill_whole_rows(const WholeInput& input, int64_t format, const float* x, int64_t x_stride,
                            int64_t stride) {
  for (int64_t first = 0; first < stride; first += BLOCK) {
    const int64_t columns = std::min(BLOCK, stride - first);
    for (int64_t row = 0; row < input.R; row++)
      input.scales[first / BLOCK * input.R + row] =
          round_block(x + row * x_stride + first, columns, largest_input(format),
                      input.entries + input.R * first + row * columns);
  }
}

// A block of columns of rows n to n + 31 of a matrix, turned around: [columns / 2, PANEL], and their scales.
template <Format F>
void pack_whole(const Matrix& m, int64_t n, int64_t first, int64_t columns, uint32_t* panel, float* scales) {
  for (int64_t g = 0; g < PANEL; g += 16) {
    WholeRow<F> row[16];
    for (int64_t r = 0; r < 16; r++) {
      row[r] = WholeRow<F>(m, std::min(n + g + r, m.rows - 1), first, columns);
      scales[g + r] = row[r].scale;
    }
    for (int64_t c = 0; c < columns; c += 64) {
      __m512i v[2][16];
      for (int r = 0; r < 16; r++) {
        v[0][r] = row[r].unpack(c);
        v[1][r] = row[r].unpack(c + 32);
      }
      for (int half = 0; half < 2; half++) {
        turn(v[half]);
        uint32_t* out = panel + (c / 2 + 16 * half) * PANEL + g;
        for (int j = 0; j < 16; j++) _mm512_storeu_si512(out + j * PANEL, v[half][j]);
      }
    }
  }
}

template <Format F>
void put_many_whole(const Matrix& m, Range mine, const WholeInput& input, Room& memory, float* y, int64_t y_stride) {
  const int64_t R = input.R;
  const Tiles tiles(R);
  float *room = memory.of(BLOCK / 2 * PANEL + R * PANEL), *totals = room + BLOCK / 2 * PANEL;
  uint32_t* panel = reinterpret_cast<uint32_t*>(room);
  for (int64_t n = mine.first; n < mine.last; n += PANEL) {
    const int64_t here = std::min(PANEL, mine.last - n);
    Ahead ahead = next_panel(m, n);
    const int64_t times = tiles.count * ((m.stride + BLOCK - 1) / BLOCK), each = (ahead.left + times - 1) / times;
    std::fill_n(totals, R * PANEL, 0.0f);
    for (int64_t first = 0; first < m.stride; first += BLOCK) {
      const int64_t columns = std::min(BLOCK, m.stride - first);
      alignas(64) float scales[PANEL];
      pack_whole<F>(m, n, first, columns, panel, scales);
      for (int64_t t = 0; t < tiles.count; t++) {
        const int64_t row = tiles.first(t);
        ahead.fetch(each);
        whole_tile_for(tiles.rows(t))(
            panel, reinterpret_cast<const uint32_t*>(input.entries + R * first + row * columns), columns / 2, scales,
            input.scales + first / BLOCK * R + row, totals + row * PANEL);
      }
    }
    for (int64_t row = 0; row < R; row++)
      std::memcpy(y + row * y_stride + n, totals + row * PANEL, here * sizeof(float));
  }
}

// ---- all

// R rows of input, in the order in which the products with matrices like `m` read them.
class WordOperand {
 public:
  WordOperand(const Matrix& m, const Input& in, int64_t R, Room& memory, Room& scratch) : R_(R), way_(way(m, R)) {
    if (in_whole_numbers(m)) {
      data_ = memory.of(WholeInput::floats(R, m.stride));
      const WholeInput input(data_, R, m.stride);
      if (way_ == PANELS)
        fill_whole_tiles(input, m.format, in.fp32, in.stride, m.stride, scratch);
      else
        fill_whole_rows(input, m.format, in.fp32, in.stride, m.stride);
      return;
    }
    const bool bf16 = m.format == BF16;
    const void* rows = bf16 ? static_cast<const void*>(in.rounded) : in.fp32;
    x_ = static_cast<const uint32_t*>(rows);
    x_stride_ = bf16 ? in.stride / 2 : in.stride;
    if (way_ == REGISTERS) return;
    const int64_t stride = row_bytes(m) / 4;
    data_ = memory.of(R * stride);
    uint32_t* ordered = reinterpret_cast<uint32_t*>(data_);
    if (way_ == PANELS) {
      Turned{Tiles(R), stride / SUMS, ordered}.fill(x_, x_stride_);
      return;
    }
    for (int64_t first = 0; first < stride; first += FEW_WORDS) {
      const int64_t count = std::min(FEW_WORDS, stride - first);
      for (int64_t row = 0; row < R; row++)
        std::memcpy(ordered + R * first + row * count, x_ + row * x_stride_ + first, 4 * count);
    }
  }

  void multiply(const Matrix& m, Range range, Room& memory, float* y, int64_t y_stride) const {
    if (in_whole_numbers(m)) {
      const WholeInput input(data_, R_, m.stride);
      const auto put = m.format == INT8 ? (way_ == PANELS ? put_many_whole<INT8> : put_few_whole<INT8>)
                                        : (way_ == PANELS ? put_many_whole<INT4> : put_few_whole<INT4>);
      return put(m, range, input, memory, y, y_stride);
    }
    m.format == BF16 ? multiply<Pairs>(m, range, memory, y, y_stride) : multiply<Floats>(m, range, memory, y, y_stride);
  }

 private:
  template <class Word>
  void multiply(const Matrix& m, Range range, Room& memory, float* y, int64_t y_stride) const {
    uint32_t* ordered = reinterpret_cast<uint32_t*>(data_);
    if (way_ == REGISTERS) return put_in_registers<Word>(m, range, x_, x_stride_, R_, y, y_stride);
    if (way_ == BLOCKS) return put_few_words<Word>(m, range, ordered, R_, memory, y, y_stride);
    put_many_words<Word>(m, range, Turned{Tiles(R_), row_bytes(m) / 4 / SUMS, ordered}, memory, y, y_stride);
  }

  int64_t R_;
  Way way_;
  const uint32_t* x_ = nullptr;
  int64_t x_stride_ = 0;
  float* data_ = nullptr;
};

}  // namespace

#endif
