// Attention over keys and values in bf16 on AMX, for one to 32 queries of a sequence.
//
// Queries and softmax weights are floats; each is split into two bf16, a high and a low part, which
// together have 16 bits of precision, and both parts are multiplied. Keys and values are read in
// place and are exact. A query's results are the same to the bit beside any other queries.
//
// Scores: a tile of 16 keys by a tile of 16 queries, transposed as the input in gemm_amx.h.
// Weighted values: a tile of 16 queries' weights for 32 positions by a tile of 32 values, in which
// a word has the same column of two consecutive positions. For a single query, AVX-512 computes the
// same sums in AMX's order, which is faster than packing the values.

#pragma once

#include "gemm_amx.h"

#if defined(USE_AMX)

namespace {

const int64_t AMX_QUERIES = 32;     // at most
const int64_t AMX_POSITIONS = 256;  // whose values are packed at a time

// Splits 16 floats into two bf16 each.
ALWAYS_INLINE void split_into_bf16(__m512 x, void* high, void* low) {
  const __m512i upper = round_to_bf16(x);
  const __m512i rest = round_to_bf16(_mm512_sub_ps(x, _mm512_castsi512_ps(upper)));
  store_vector(high, _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16)));
  store_vector(low, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rest, 16)));
}

// Keys or values that are read next, prefetched into the L2 cache in `parts` amid the computing.
class Ahead {
 public:
  Ahead(const uint16_t* at, int64_t elements, int64_t parts)
      : at_(at), end_(at + elements), part_((elements + 32 * parts - 1) / (32 * parts) * 32) {}

  ALWAYS_INLINE void prefetch_part() {
    const uint16_t* stop = std::min(end_, at_ + part_);
    for (; at_ < stop; at_ += 32) _mm_prefetch(at_, _MM_HINT_T1);
  }

 private:
  const uint16_t *at_, *end_;
  int64_t part_;
};

// The queries of one head, as tiles [tile, high or low, H / 2, width].
struct QueryTiles {
  uint32_t* data;
  int64_t count, width, H;

  int64_t tile_count() const { return (count + TILE - 1) / TILE; }
  const uint32_t* tile(int64_t number, int64_t part) const {
    return data + (2 * number + part) * (H / 2) * width;
  }

  // Queries are `stride` floats apart. `rows` is scratch for 16 queries.
  void pack(const float* q, int64_t stride, uint32_t* rows) const {
    for (int64_t first = 0; first < count; first += TILE) {
      const uint32_t* parts[2][TILE];
      const int64_t here = std::min(TILE, count - first);
      for (int64_t x = 0; x < here; x++) {
        uint32_t* high = rows + x * H;
        parts[0][x] = high;
        parts[1][x] = high + H / 2;
        for (int64_t i = 0; i < H; i += 16)
          split_into_bf16(_mm512_loadu_ps(q + (first + x) * stride + i), high + i / 2,
                          high + (H + i) / 2);
      }
      for (int64_t part = 0; part < 2; part++)
        pack_tiles(parts[part], here, width, H / 2,
                   data + (2 * (first / TILE) + part) * (H / 2) * width);
    }
  }
};

// The sums of 32 keys by one tile of queries: [key / 16, 16, width]. `ahead` has H / 32 parts.
inline void score_sums(const uint16_t* keys, const QueryTiles& queries, int64_t tile, float* sums,
                       Ahead& ahead) {
  const int64_t H = queries.H, width = queries.width;
  zero_tile<0>();
  zero_tile<1>();
  for (int64_t i = 0; i < H; i += 32) {
    ahead.prefetch_part();
    load_tile<4>(keys + i, 2 * H);
    load_tile<5>(keys + TILE * H + i, 2 * H);
    load_tile<6>(queries.tile(tile, 0) + i / 2 * width, 4 * width);
    Bf16Tiles::accumulate<0, 4, 6>();
    Bf16Tiles::accumulate<1, 5, 6>();
    load_tile<7>(queries.tile(tile, 1) + i / 2 * width, 4 * width);
    Bf16Tiles::accumulate<0, 4, 7>();
    Bf16Tiles::accumulate<1, 5, 7>();
  }
  store_tile<0>(sums, 4 * width);
  store_tile<1>(sums + TILE_WORDS, 4 * width);
}

// scores[x, p] = q[x] . key[p] * scale for 32 consecutive keys.
inline void scores_of_keys(const uint16_t* keys, const QueryTiles& queries, float scale,
                           float* scores, int64_t scores_stride, Ahead ahead) {
  alignas(64) float sums[2 * TILE_WORDS];
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t tile = 0; tile < queries.tile_count(); tile++) {
    score_sums(keys, queries, tile, sums, ahead);
    const int64_t here = std::min(TILE, queries.count - tile * TILE);
    for (int64_t half = 0; half < 2; half++) {
      __m512i v[TILE];
      transpose_sums(sums + half * TILE_WORDS, queries.width, v);
      float* to = scores + tile * TILE * scores_stride + half * TILE;
#pragma GCC unroll 16
      for (int x = 0; x < TILE; x++)
        if (x < here)
          _mm512_storeu_ps(to + x * scores_stride,
                           _mm512_mul_ps(_mm512_castsi512_ps(v[x]), factor));
    }
  }
}

// Splits softmax weights, in place: of each 32 floats, the high parts take the place of the first
// 16 and the low ones that of the others. `length` is a multiple of 32.
inline void split_weights(float* weights, int64_t length) {
  for (int64_t p = 0; p < length; p += 32) {
    float* at = weights + p;
    const __m512 first = _mm512_loadu_ps(at), second = _mm512_loadu_ps(at + 16);
    split_into_bf16(first, at, at + 16);
    split_into_bf16(second, at + 8, at + 24);
  }
}

// Packs the values of 32 positions, of which the first `count` are there: [H / 16, 16, 16] words.
// `ahead` has 16 parts.
inline void pack_values(const uint16_t* values, int64_t count, int64_t H, uint32_t* to,
                        Ahead ahead) {
  alignas(64) static const uint16_t low[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                               37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                               11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = load_words(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int64_t p = 0; p < 32; p += 2) {
    ahead.prefetch_part();
    for (int64_t i = 0; i < H; i += 32) {
      const __m512i zero = _mm512_setzero_si512();
      const __m512i a = p < count ? load_words(values + p * H + i) : zero;
      const __m512i b = p + 1 < count ? load_words(values + (p + 1) * H + i) : zero;
      uint32_t* at = to + i / 16 * TILE_WORDS + p / 2 * TILE;
      _mm512_store_si512(at, _mm512_permutex2var_epi16(a, first, b));
      _mm512_store_si512(at + TILE_WORDS, _mm512_permutex2var_epi16(a, second, b));
    }
  }
}

// out [count, H] += weights . values, for `groups` of 32 positions; the first groups overwrite it.
// `weights` are split, `values` packed. `count`, at most 16, is that of the registers' rows.
inline void accumulate_values(const float* weights, int64_t weights_stride, const uint32_t* values,
                              int64_t groups, int64_t H, bool first, float* out) {
  const int64_t out_stride = 4 * H;
  for (int64_t i = 0; i < H; i += 32) {
    if (first) {
      zero_tile<0>();
      zero_tile<1>();
    } else {
      load_tile<0>(out + i, out_stride);
      load_tile<1>(out + i + TILE, out_stride);
    }
    for (int64_t group = 0; group < groups; group++) {
      const float* w = weights + 32 * group;
      const uint32_t* v = values + group * (H / 2) * 32 + i / 16 * TILE_WORDS;
      load_tile<4>(w, 4 * weights_stride);
      load_tile<6>(v, 64);
      Bf16Tiles::accumulate<0, 4, 6>();
      load_tile<7>(v + TILE_WORDS, 64);
      Bf16Tiles::accumulate<1, 4, 7>();
      load_tile<5>(w + TILE, 4 * weights_stride);
      Bf16Tiles::accumulate<0, 5, 6>();
      Bf16Tiles::accumulate<1, 5, 7>();
    }
    store_tile<0>(out + i, out_stride);
    store_tile<1>(out + i + TILE, out_stride);
  }
}

// ---- the weighted values of a single query

// Denormal numbers count as zero while this lives, as in AMX; computing with them is slow too.
class FlushedDenormals {
 public:
  FlushedDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushedDenormals() { _mm_setcsr(before_); }
  FlushedDenormals(const FlushedDenormals&) = delete;

 private:
  unsigned before_;
};

// Splits softmax weights as `split_weights`, into floats.
inline void split_weights_into_floats(float* weights, int64_t length, float* low) {
  for (int64_t p = 0; p < length; p += 16) {
    const __m512 x = _mm512_loadu_ps(weights + p);
    const __m512 high = _mm512_castsi512_ps(round_to_bf16(x));
    _mm512_storeu_ps(weights + p, high);
    _mm512_storeu_ps(low + p, _mm512_castsi512_ps(round_to_bf16(_mm512_sub_ps(x, high))));
  }
}

// sums += weights . values of up to 32 positions, for 32 NV columns: for each 32 of them, the sums
// of the even columns and then of the odd ones. AMX sums the products of even positions and of odd
// ones apart, each with a single rounding, and then adds both; so does this. `ahead` has 16 parts
// for each call.
template <int NV>
ALWAYS_INLINE void accumulate_columns(const float* high, const float* low, const uint16_t* values,
                                      int64_t count, int64_t H, float* sums, Ahead& ahead) {
  const __m512i upper = _mm512_set1_epi32(int32_t(0xffff0000));
  __m512 parts[2][2][2 * NV];  // high or low, even or odd position
#pragma GCC unroll 8
  for (int j = 0; j < 8 * NV; j++) parts[j & 1][j >> 1 & 1][j >> 2] = _mm512_setzero_ps();
  const auto add = [&](int64_t p, auto parity) {
    const __m512 weights[2] = {_mm512_set1_ps(high[p]), _mm512_set1_ps(low[p])};
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
      const __m512i words = load_words(values + p * H + 32 * j);
      const __m512 columns[2] = {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
                                 _mm512_castsi512_ps(_mm512_and_si512(words, upper))};
#pragma GCC unroll 2
      for (int c = 0; c < 2; c++)
#pragma GCC unroll 2
        for (int w = 0; w < 2; w++) {
          __m512& part = parts[w][parity()][2 * j + c];
          part = _mm512_fmadd_ps(weights[w], columns[c], part);
        }
    }
  };
  int64_t p = 0;
  for (; p + 2 <= count; p += 2) {
    ahead.prefetch_part();
    add(p, std::integral_constant<int, 0>());
    add(p + 1, std::integral_constant<int, 1>());
  }
  if (p < count) add(p, std::integral_constant<int, 0>());
#pragma GCC unroll 8
  for (int j = 0; j < 2 * NV; j++) {
    __m512 sum = _mm512_loadu_ps(sums + 16 * j);
#pragma GCC unroll 2
    for (int w = 0; w < 2; w++)
      sum = _mm512_add_ps(sum, _mm512_add_ps(parts[w][0][j], parts[w][1][j]));
    _mm512_storeu_ps(sums + 16 * j, sum);
  }
}

// `accumulate_values` of up to 32 positions for one query, with values in place. `sums` [H / 32, 2,
// 16] has even and odd columns apart.
inline void accumulate_values_of_one(const float* high, const float* low, const uint16_t* values,
                                     int64_t count, int64_t H, float* sums, Ahead ahead) {
  int64_t i = 0;
  for (; i + 64 <= H; i += 64)
    accumulate_columns<2>(high, low, values + i, count, H, sums + i, ahead);
  if (i < H) accumulate_columns<1>(high, low, values + i, count, H, sums + i, ahead);
}

// Interleaves the sums of even and of odd columns.
inline void interleave_columns(const float* sums, int64_t H, float* out) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < H; i += 32) {
    const __m512 even = _mm512_loadu_ps(sums + i), odd = _mm512_loadu_ps(sums + i + 16);
    _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(even, first, odd));
    _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(even, second, odd));
  }
}

}  // namespace

#endif
