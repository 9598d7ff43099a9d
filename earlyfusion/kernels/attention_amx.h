// Attention over keys and values in bf16 on AMX, for one or more queries of a sequence.
//
// Queries and softmax weights are floats; each is split into two bf16, a high and a low part, which
// together have 16 bits of precision, and both parts are multiplied. Keys and values are read in
// place and are exact. A query's results are the same to the bit beside any other queries.
//
// Scores: a tile of 16 keys by a tile of 16 queries, transposed as the input in gemm_amx.h. So the
// scores of 16 queries and one key are a vector, and softmax needs no horizontal maximum or sum.
// Weighted values: a tile of 16 queries' weights for 32 positions by a tile of 32 values, in which
// a word has the same column of two consecutive positions. For a single query, AVX-512 computes the
// same sums in AMX's order, which is faster than packing the values.
//
// Two tiles of queries are multiplied together: a product needs the sum before it, so four sums are
// under way at once.

#pragma once

#include "gemm_amx.h"

#if defined(USE_AMX)

namespace {

const int64_t AMX_POSITIONS = 256;      // whose values are packed at a time
const int64_t AMX_MAX_QUERIES = 128;    // of a group, for which values are packed once
const int64_t AMX_SCORES = 256 * 1024;  // of a group, so that they stay in the L2 cache

// Queries of a group, a multiple of 32: what fits, but not so few that packing takes long.
inline int64_t amx_queries(int64_t length) {
  const int64_t fitting = AMX_SCORES / std::max<int64_t>(length, 1) / 32 * 32;
  return std::max<int64_t>(32, std::min(AMX_MAX_QUERIES, fitting));
}

// Keys and values are multiplied 32 positions at a time.
inline int64_t padded_positions(int64_t count) { return (count + 31) / 32 * 32; }

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

// sums[p, x] = key[p] . q[x] for 32 consecutive keys and NT, 1 or 2, tiles of queries, whose sums
// lie `distance` floats apart. `ahead` has H / 32 parts.
template <int NT>
inline void score_sums(const uint16_t* keys, const QueryTiles& queries, int64_t tile, float* sums,
                       int64_t distance, Ahead& ahead) {
  const int64_t H = queries.H, width = queries.width;
  zero_tile<0>();
  zero_tile<1>();
  if (NT == 2) zero_tile<2>();
  if (NT == 2) zero_tile<3>();
  for (int64_t i = 0; i < H; i += 32) {
    ahead.prefetch_part();
    load_tile<4>(keys + i, 2 * H);
    load_tile<5>(keys + TILE * H + i, 2 * H);
#pragma GCC unroll 2
    for (int part = 0; part < 2; part++) {
      load_tile<6>(queries.tile(tile, part) + i / 2 * width, 4 * width);
      Bf16Tiles::accumulate<0, 4, 6>();
      Bf16Tiles::accumulate<1, 5, 6>();
      if (NT == 2) {
        load_tile<7>(queries.tile(tile + 1, part) + i / 2 * width, 4 * width);
        Bf16Tiles::accumulate<2, 4, 7>();
        Bf16Tiles::accumulate<3, 5, 7>();
      }
    }
  }
  store_tile<0>(sums, 4 * width);
  store_tile<1>(sums + TILE * width, 4 * width);
  if (NT == 2) store_tile<2>(sums + distance, 4 * width);
  if (NT == 2) store_tile<3>(sums + distance + TILE * width, 4 * width);
}

// ---- softmax of a tile of queries: `scores` are [position, 16]
//
// Query x sees the positions before `end` + x. The results are those of `softmax_numerators`.

// The queries of a tile that see position p.
ALWAYS_INLINE __mmask16 queries_that_see(int64_t p, int64_t end) {
  return __mmask16(0xffffu << std::max<int64_t>(0, std::min<int64_t>(16, p - end + 1)));
}

// Scales the scores of 32 positions from p on, and raises `maxima` to the largest ones.
inline void scale_scores(float* scores, int64_t p, int64_t end, __m512 scale, float* maxima) {
  __m512 largest = _mm512_loadu_ps(maxima);
  for (int64_t i = 0; i < 32; i++) {
    const __m512 here = _mm512_mul_ps(_mm512_loadu_ps(scores + TILE * (p + i)), scale);
    _mm512_storeu_ps(scores + TILE * (p + i), here);
    largest = _mm512_mask_max_ps(largest, queries_that_see(p + i, end), largest, here);
  }
  _mm512_storeu_ps(maxima, largest);
}

// The weights of 32 positions from p on, split and in place of their scores: tiles of high and of
// low parts, [query, pair of positions] each. `partials` [16, 16] are sums of every 16th position.
template <bool ALL_SEEN>
ALWAYS_INLINE void softmax_positions(float* scores, int64_t p, int64_t end, __m512 maxima,
                                     __m512* partials) {
  __m512i parts[2][TILE];
  const auto weight = [&](int64_t i) {
    const floats x = floats(_mm512_sub_ps(_mm512_loadu_ps(scores + TILE * i), maxima));
    const __m512 e = __m512(vector_exp(x));
    const __m512 seen = ALL_SEEN ? e : _mm512_maskz_mov_ps(queries_that_see(i, end), e);
    partials[i % 16] = _mm512_add_ps(partials[i % 16], seen);
    return seen;
  };
#pragma GCC unroll 2
  for (int64_t j = 0; j < TILE; j++) {
    const __m512 first = weight(p + 2 * j), second = weight(p + 2 * j + 1);
    const __m512i a = round_to_bf16(first), b = round_to_bf16(second);
    const __m512i c = round_to_bf16(_mm512_sub_ps(first, _mm512_castsi512_ps(a)));
    const __m512i d = round_to_bf16(_mm512_sub_ps(second, _mm512_castsi512_ps(b)));
    parts[0][j] = _mm512_or_si512(_mm512_srli_epi32(a, 16), b);
    parts[1][j] = _mm512_or_si512(_mm512_srli_epi32(c, 16), d);
  }
  for (int part = 0; part < 2; part++) {
    transpose16x16(parts[part]);
#pragma GCC unroll 16
    for (int x = 0; x < TILE; x++)
      store_vector(scores + TILE * p + part * TILE_WORDS + TILE * x, parts[part][x]);
  }
}

// Turns the scores of `length` positions, a multiple of 32, into split weights; `totals` gets the
// sums of the weights.
inline void softmax_tile(float* scores, int64_t length, int64_t end, const float* maxima,
                         float* totals) {
  const __m512 largest = _mm512_loadu_ps(maxima);
  __m512 partials[16];
  for (auto& partial : partials) partial = _mm512_setzero_ps();
  for (int64_t p = 0; p < length; p += 32)
    if (p + 32 <= end)
      softmax_positions<true>(scores, p, end, largest, partials);
    else
      softmax_positions<false>(scores, p, end, largest, partials);
  // In the order of `horizontal_sum`.
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) partials[i] = _mm512_add_ps(partials[i], partials[i + half]);
  _mm512_storeu_ps(totals, partials[0]);
}

// ---- weighted values

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

// out [16 NT, H] += weights . values, for `groups` of 32 positions; the first groups overwrite it.
// `weights` are split, those of the second tile `distance` floats apart; `values` are packed.
template <int NT>
inline void accumulate_values(const float* weights, int64_t distance, const uint32_t* values,
                              int64_t groups, int64_t H, bool first, float* out) {
  const int64_t stride = 4 * H;
  for (int64_t i = 0; i < H; i += 32) {
    float *to = out + i, *to2 = to + TILE * H;
    if (first) {
      zero_tile<0>();
      zero_tile<1>();
      if (NT == 2) zero_tile<2>();
      if (NT == 2) zero_tile<3>();
    } else {
      load_tile<0>(to, stride);
      load_tile<1>(to + TILE, stride);
      if (NT == 2) load_tile<2>(to2, stride);
      if (NT == 2) load_tile<3>(to2 + TILE, stride);
    }
    for (int64_t group = 0; group < groups; group++) {
      const uint32_t* v = values + group * (H / 2) * 32 + i / 16 * TILE_WORDS;
      load_tile<6>(v, 64);
      load_tile<7>(v + TILE_WORDS, 64);
#pragma GCC unroll 2
      for (int part = 0; part < 2; part++) {
        const float* w = weights + (2 * group + part) * TILE_WORDS;
        load_tile<4>(w, 64);
        Bf16Tiles::accumulate<0, 4, 6>();
        Bf16Tiles::accumulate<1, 4, 7>();
        if (NT == 2) {
          load_tile<5>(w + distance, 64);
          Bf16Tiles::accumulate<2, 5, 6>();
          Bf16Tiles::accumulate<3, 5, 7>();
        }
      }
    }
    store_tile<0>(to, stride);
    store_tile<1>(to + TILE, stride);
    if (NT == 2) store_tile<2>(to2, stride);
    if (NT == 2) store_tile<3>(to2 + TILE, stride);
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

// Splits softmax weights as `softmax_positions`, into floats.
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
