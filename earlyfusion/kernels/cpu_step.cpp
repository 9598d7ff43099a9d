// One step of the transformer on a CPU: all layers inside one parallel region.
//
// A step has R rows, one new token each; the weights are read once for all rows. The rows of a
// prompt have the same block table and consecutive positions. The rows of a weight matrix are
// divided among the threads (`RowPartition`). With up to 16 rows, each thread has its own copy of
// the residual stream and of the input of a product, so that a layer needs only five barriers:
// after the products of q, k and v, after attention, its output projection, SwiGLU and the down
// projection (six if rows share a sequence and the heads cannot be divided among the threads).
//
// The result of a row depends, to the bit, on its token, its position and the keys and values
// before it: not on the rows beside it, how a prompt was chunked, or the number of threads. For
// this every sum is added up in one order, and every function that rounds is compiled once
// (NOINLINE) or says how it rounds (`fmadd`). The products are in gemm.h.
//
// Names: R rows, D width, N query heads, K key heads, H head width, F inner width.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <type_traits>
#include <utility>

#include "attention_amx.h"
#include "gemm.h"
#include "sampling.h"
#include "simd.h"

namespace {

// ---- the structures of cpu_step.py: same names, same order

struct Layer {
  Matrix q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
  const float *attention_norm, *feed_forward_norm;
  const float *q_weight, *q_bias, *k_weight, *k_bias;  // norms over a head
};

struct Model {
  int64_t layer_count, D, N, K, H, F;
  int64_t norm_after;  // 1: norms of the sublayers' outputs (the 34B), 0: of their inputs
  int64_t cache_format, block_size;  // block_size: tokens, a multiple of 16
  float eps;
  const Layer* layers;
  const float *final_norm, *cos, *sin;  // cos, sin: [positions, H / 2]
  void* kv;                             // [blocks, layer_count, 2, K, block_size, H]
  float* kv_scales;  // of an int8 cache: one per vector, the same shape without H
};

// A barrier. OpenMP's own spins for long, which costs whole time slices where a thread shares its
// core with another process; this one soon yields the core.
class Barrier {
 public:
  void wait() {
    // Read before arriving: the last thread to arrive begins the next round.
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == omp_get_num_threads()) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int64_t spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins > 10000) std::this_thread::yield();
#if defined(__x86_64__)
      else
        __builtin_ia32_pause();
#endif
    }
  }

 private:
  std::atomic<int64_t> arrived_{0}, round_{0};
};

// ---- the steps of a layer

// For functions that round: inlined in two places, one might round in two ways (see `fmadd`).
#define NOINLINE __attribute__((noinline))

// The sum of (x - mean)^2.
float squared_deviations(const float* x, int64_t n, float mean) {
  floats16 total = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const floats16 off = load(x + i) - mean;
    total += off * off;
  }
  float s = horizontal_sum(total);
  for (; i < n; i++) s += (x[i] - mean) * (x[i] - mean);
  return s;
}

NOINLINE void rms_norm(const float* __restrict x, const float* __restrict weight, int64_t n,
                       float eps, float* __restrict y) {
  const float scale = 1.0f / std::sqrt(squared_deviations(x, n, 0) / n + eps);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// Stores some rows of x as the input of a product: after their norm, if it has a `weight`. The
// first of them must be the first of a tile.
void store_input(const float* x, const float* weight, Range rows, int64_t D, float eps,
                 const Input& in) {
#if defined(USE_AMX)
  if (in.tiles) {
    static thread_local Workspace workspace;
    const int64_t stride = in.stride / 2;  // words
    float* normed = workspace.reserve(D + TILE * stride);
    uint32_t* rounded = reinterpret_cast<uint32_t*>(normed + D);
    const uint32_t* words[TILE];
    for (int64_t i = 0; i < TILE; i++) words[i] = rounded + i * stride;
    for (int64_t first = rows.begin; first < rows.end; first += TILE) {
      const int64_t count = std::min(TILE, rows.end - first);
      for (int64_t i = 0; i < count; i++) {
        const float* row = x + (first + i) * D;
        if (weight) rms_norm(row, weight, D, eps, normed);
        uint16_t* to = reinterpret_cast<uint16_t*>(rounded + i * stride);
        Input::to_bf16(to, weight ? normed : row, D);
        std::fill_n(to + D, in.stride - D, 0);
      }
      pack_tiles(words, count, in.width, stride, in.tile(first / TILE));
    }
    return;
  }
#endif
  for (int64_t row = rows.begin; row < rows.end; row++) {
    float* y = in.fp32 + row * in.stride;
    if (weight)
      rms_norm(x + row * D, weight, D, eps, y);
    else
      std::memcpy(y, x + row * D, D * sizeof(float));
    if (in.bf16) Input::to_bf16(in.bf16 + row * in.stride, y, D);
  }
}

// x += y, or x += norm(y) with a `weight`, for models whose norms come after the sublayers.
void add_residual(float* x, const float* y, int64_t y_stride, const float* weight, Range rows,
                  int64_t D, float eps, float* scratch) {
  for (int64_t row = rows.begin; row < rows.end; row++) {
    const float* sublayer = y + row * y_stride;
    if (weight) {
      rms_norm(sublayer, weight, D, eps, scratch);
      sublayer = scratch;
    }
    for (int64_t i = 0; i < D; i++) x[row * D + i] += sublayer[i];
  }
}

float sum_of(const float* x, int64_t n) {
  floats16 parts = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) parts += load(x + i);
  float s = horizontal_sum(parts);
  for (; i < n; i++) s += x[i];
  return s;
}

// LayerNorm over one head, then RoPE on the pairs (i, i + H / 2); the eps of the norm is fixed.
NOINLINE void layer_norm_and_rope(const float* x, const float* weight, const float* bias,
                                  const float* cos, const float* sin, int64_t H,
                                  float* __restrict y) {
  const float mean = sum_of(x, H) / H,
              scale = 1.0f / std::sqrt(squared_deviations(x, H, mean) / H + 1e-5f);
  const int64_t half = H / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = (x[i] - mean) * scale * weight[i] + bias[i];
    const float b = (x[i + half] - mean) * scale * weight[i + half] + bias[i + half];
    y[i] = a * cos[i] - b * sin[i];
    y[i + half] = b * cos[i] + a * sin[i];
  }
}

// Stores a key or value in the dtype of the cache.
inline void store_in_cache(float* at, const float* x, int64_t n) {
  std::memcpy(at, x, n * sizeof(float));
}
inline void store_in_cache(uint16_t* at, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) at[i] = float_to_bf16(x[i]);
}

// Returns the scale: the element of largest absolute value becomes +-127.
inline float store_in_cache(int8_t* at, const float* x, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; i++) largest = std::max(largest, std::fabs(x[i]));
  const float scale = largest / 127, inverse = scale > 0 ? 1 / scale : 0;
  for (int64_t i = 0; i < n; i++) at[i] = int8_t(std::nearbyint(x[i] * inverse));
  return scale;
}

inline float to_float(int8_t x) { return x; }
inline float to_float(float x) { return x; }
inline float to_float(uint16_t x) { return bf16_to_float(x); }

template <class T>
float dot(const float* q, const T* k, int64_t H) {
  floats16 total = {};
  int64_t i = 0;
#if defined(USE_AVX2)
  __m256 low = _mm256_setzero_ps(), high = low;
  for (; i + 16 <= H; i += 16) {
    low = _mm256_fmadd_ps(load8(q + i), load8(k + i), low);
    high = _mm256_fmadd_ps(load8(q + i + 8), load8(k + i + 8), high);
  }
  std::memcpy(&total, &low, 32);
  std::memcpy(reinterpret_cast<char*>(&total) + 32, &high, 32);
#else
  for (; i + 16 <= H; i += 16) total = fmadd(load(q + i), load(k + i), total);
#endif
  float s = horizontal_sum(total);
  for (; i < H; i++) s += q[i] * to_float(k[i]);
  return s;
}

// The dot products of one query with the keys of 16 consecutive positions.
template <class T>
floats16 dots16(const float* q, const T* k, int64_t H) {
#if defined(USE_AVX2)
  float out[16];
  for (int p = 0; p < 16; p += 4) {
    __m256 low[4] = {}, high[4] = {};
    for (int64_t i = 0; i < H; i += 16) {
      const __m256 q_low = load8(q + i), q_high = load8(q + i + 8);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        low[j] = _mm256_fmadd_ps(q_low, load8(k + (p + j) * H + i), low[j]);
        high[j] = _mm256_fmadd_ps(q_high, load8(k + (p + j) * H + i + 8), high[j]);
      }
    }
    _mm_storeu_ps(out + p, horizontal_sums4(low, high));
  }
  return load(out);
#else
  floats16 products[16] = {};
  for (int64_t i = 0; i < H; i += 16) {
    const floats16 here = load(q + i);
    for (int p = 0; p < 16; p++) products[p] = fmadd(here, load(k + p * H + i), products[p]);
  }
  return horizontal_sums<16>(products);
#endif
}

// `count` keys or values that are read next, for prefetching.
template <class T>
struct NextKV {
  const T* at;
  int64_t count, H;

  // How many elements the `number` from the p-th on have, or as many as there are.
  int64_t elements(int64_t p, int64_t number) const {
    return std::max<int64_t>(0, std::min(number, count - p)) * H;
  }

  // Prefetches at most `number` of them from the p-th on.
  void prefetch(int64_t p, int64_t number) const {
    const T *line = at + p * H, *end = at + std::min(p + number, count) * H;
    for (; line < end; line += 64 / sizeof(T)) ::prefetch(line, 0);
  }
};

// The keys or the values of one head of a sequence, which lie in the blocks of its table. `scales`,
// one per position, only in int8.
template <class T>
struct CachedHead {
  T* data;  // of block 0
  float* scales;
  const int64_t* table;
  int64_t stride, size, H;  // stride: vectors from one block to the next; size: tokens of a block
  const T* next = nullptr;  // a block to prefetch with the last one

  T* block(int64_t number) const { return data + table[number] * stride * H; }
  float* scales_of(int64_t number) const { return scales + table[number] * stride; }

  void store(int64_t position, const float* x) const {
    const int64_t number = position / size, offset = position % size;
    T* at = block(number) + offset * H;
    if constexpr (std::is_same_v<T, int8_t>)
      scales_of(number)[offset] = store_in_cache(at, x, H);
    else
      store_in_cache(at, x, H);
  }

  // Multiplies scores with the scales of int8 keys, or softmax weights with those of int8 values.
  void apply_scales(float* __restrict weights, int64_t length) const {
    if (!scales) return;
    for (int64_t first = 0; first < length; first += size) {
      const float* here = scales_of(first / size);
      const int64_t count = std::min(size, length - first);
      for (int64_t p = 0; p < count; p++) weights[first + p] *= here[p];
    }
  }

  // Visits the blocks in order: `visit(first, count, at, ahead)` gets the vectors of `count`
  // positions from `first` on, and the next block for prefetching.
  template <class Visit>
  void for_each_block(int64_t length, Visit visit) const {
    for (int64_t first = 0; first < length; first += size) {
      const int64_t number = first / size, left = length - first - size;
      const NextKV<T> ahead = left > 0 ? NextKV<T>{block(number + 1), std::min(size, left), H}
                                       : NextKV<T>{next, next ? std::min(size, length) : 0, H};
      visit(first, std::min(size, length - first), block(number), ahead);
    }
  }
};

// scores[p] = q . k[p] * scale, for `length` positions.
template <class T>
void attention_scores(const CachedHead<T>& k, const float* q, int64_t length, float scale,
                      float* scores) {
  const int64_t H = k.H;
  k.for_each_block(length, [&](int64_t first, int64_t count, const T* at, const NextKV<T>& ahead) {
    int64_t p = 0;
    // The last 16 keys may be stale beyond `length`: `softmax_numerators` sets their scores to
    // -inf.
    for (; H % 16 == 0 && p < count; p += 16) {
      ahead.prefetch(p, p + 16 < count ? 16 : k.size);
      store(scores + first + p, dots16(q, at + p * H, H) * scale);
    }
    for (; p < count; p++) scores[first + p] = dot(q, at + p * H, H) * scale;
  });
}

// ---- a tile of queries: rows of one sequence at consecutive positions
//
// Each key and value is read once for the whole tile. Sums are in the order of `attention_scores`
// and `weighted_values`. Rows of `q`, `scores` and `weights` are a stride apart.

#if defined(USE_AVX2)
const int MAX_QUERIES = 24, MIN_QUERIES = 3;  // of a tile; with fewer, single rows are faster

// out [NK, 8 NV] = keys [NK, H] . queries [H, 8 NV] * scale. A lane is a query. The 16 partial sums
// of a score are computed two at a time and added up in the order of all kernels, as in
// gemm_avx2_packed.h.
template <int NV, int NK>
NOINLINE void scores_microkernel(const float* queries_HV, const float* keys, int64_t H, float scale,
                                 float* out) {
  const int width = 8 * NV;
  __m256 subtotals[4][NK][NV];  // subtotals by level
#pragma GCC unroll 8
  for (int pair = 0; pair < PARTIALS / 2; pair++) {
    __m256 sum[2][NK][NV] = {};
    for (int64_t i = 0; i < H; i += PARTIALS) {
#pragma GCC unroll 2
      for (int s = 0; s < 2; s++) {
        const int64_t at = i + BIT_REVERSED[2 * pair + s];
        __m256 key[NK];
#pragma GCC unroll 4
        for (int j = 0; j < NK; j++)
          keep_in_register(key[j] = _mm256_broadcast_ss(keys + j * H + at));
#pragma GCC unroll 3
        for (int g = 0; g < NV; g++) {
          __m256 query = _mm256_load_ps(queries_HV + at * width + 8 * g);
          keep_in_register(query);
#pragma GCC unroll 4
          for (int j = 0; j < NK; j++) sum[s][j][g] = _mm256_fmadd_ps(query, key[j], sum[s][j][g]);
        }
      }
    }
    const int level = pair == 7 ? 3 : pair % 4 == 3 ? 2 : pair % 2;  // trailing ones of `pair`
#pragma GCC unroll 4
    for (int j = 0; j < NK; j++)
#pragma GCC unroll 3
      for (int g = 0; g < NV; g++) {
        __m256 total = _mm256_add_ps(sum[0][j][g], sum[1][j][g]);
#pragma GCC unroll 3
        for (int l = 0; l < level; l++) total = _mm256_add_ps(subtotals[l][j][g], total);
        subtotals[level][j][g] = total;
      }
  }
#pragma GCC unroll 4
  for (int j = 0; j < NK; j++)
#pragma GCC unroll 3
    for (int g = 0; g < NV; g++)
      _mm256_store_ps(out + j * width + 8 * g,
                      _mm256_mul_ps(subtotals[3][j][g], _mm256_set1_ps(scale)));
}

inline const float* to_floats(const float* x, int64_t, float*) { return x; }

template <class T>
const float* to_floats(const T* x, int64_t n, float* scratch) {
  for (int64_t i = 0; i < n; i += 8) _mm256_store_ps(scratch + i, load8(x + i));
  return scratch;
}

// Queries, keys as floats, and scores of 8 keys, in vectors of H floats; H is at least 16.
const int SCRATCH_VECTORS = MAX_QUERIES + 8 + 12;

// `attention_scores` for `count` queries, at most 8 NV. The last 16 keys may be stale, as there.

template <int NV, class T>
void attention_scores_tile(const CachedHead<T>& k, const float* q, int64_t q_stride, int64_t count,
                           int64_t length, float scale, float* scores, int64_t scores_stride,
                           float* scratch) {
  const int64_t H = k.H;
  const int width = 8 * NV, keys = NV == 1 ? 4 : 2;
  float *queries_HV = scratch, *floats = scratch + H * width, *out = floats + 8 * H;
  __m256i transposed[8];
  for (int g = 0; g < NV; g++) {
    const EightRows rows(q + 8 * g * q_stride, q_stride, std::min<int64_t>(8, count - 8 * g));
    for (int64_t i = 0; i < H; i += 8) {
      transpose8x8(rows, 4 * i, transposed);
      for (int r = 0; r < 8; r++)
        _mm256_store_ps(queries_HV + (i + r) * width + 8 * g, _mm256_castsi256_ps(transposed[r]));
    }
  }
  k.for_each_block(length, [&](int64_t first, int64_t here, const T* at, const NextKV<T>&) {
    for (int64_t p = 0; p < here; p += 8) {
      const float* vectors = to_floats(at + p * H, 8 * H, floats);
      for (int j = 0; j < 8; j += keys)
        scores_microkernel<NV, keys>(queries_HV, vectors + j * H, H, scale, out + j * width);
      for (int g = 0; g < NV; g++) {
        transpose8x8(EightRows(out + 8 * g, width, 8), 0, transposed);
        for (int r = 0; r < 8; r++)
          store_vector(scores + (8 * g + r) * scores_stride + first + p, transposed[r]);
      }
    }
  });
}

template <class T>
void attention_scores_tile(const CachedHead<T>& k, const float* q, int64_t q_stride, int64_t count,
                           int64_t length, float scale, float* scores, int64_t scores_stride,
                           float* scratch) {
  const auto kernel = count > 16  ? attention_scores_tile<3, T>
                      : count > 8 ? attention_scores_tile<2, T>
                                  : attention_scores_tile<1, T>;
  kernel(k, q, q_stride, count, length, scale, scores, scores_stride, scratch);
}

// `weighted_values` for NQ queries and 16 columns: each value is read once for all of them.
template <int NQ, class T>
void weighted_values_microkernel(const CachedHead<T>& v, const float* weights,
                                 int64_t weights_stride, int64_t length, int64_t column,
                                 float* out) {
  const int64_t H = v.H;
  __m256 total[NQ][2] = {};
  v.for_each_block(length, [&](int64_t first, int64_t count, const T* at, const NextKV<T>&) {
    __m256 acc[NQ][2];  // in registers
    std::memcpy(acc, total, sizeof(total));
    for (int64_t p = 0; p < count; p++) {
      const T* here = at + p * H + column;
      const float* weight = weights + first + p;
      __m256 low = load8(here), high = load8(here + 8);
      keep_in_register(low);
      keep_in_register(high);
#pragma GCC unroll 6
      for (int x = 0; x < NQ; x++) {
        const __m256 w = _mm256_broadcast_ss(weight + x * weights_stride);
        acc[x][0] = _mm256_fmadd_ps(w, low, acc[x][0]);
        acc[x][1] = _mm256_fmadd_ps(w, high, acc[x][1]);
      }
    }
    std::memcpy(total, acc, sizeof(total));
  });
  for (int x = 0; x < NQ; x++) std::memcpy(out + x * H + column, total[x], 64);
}

template <class T>
void weighted_values_tile(const CachedHead<T>& v, const float* weights, int64_t weights_stride,
                          int64_t count, int64_t length, float* out) {
  for (int64_t x = 0, nq; x < count; x += nq) {
    nq = std::min<int64_t>(6, count - x);
    const auto kernel = nq == 6   ? weighted_values_microkernel<6, T>
                        : nq == 5 ? weighted_values_microkernel<5, T>
                        : nq == 4 ? weighted_values_microkernel<4, T>
                        : nq == 3 ? weighted_values_microkernel<3, T>
                        : nq == 2 ? weighted_values_microkernel<2, T>
                                  : weighted_values_microkernel<1, T>;
    for (int64_t column = 0; column < v.H; column += 16)
      kernel(v, weights + x * weights_stride, weights_stride, length, column, out + x * v.H);
  }
}
#else
const int MIN_QUERIES = 3;  // of a tile; with fewer, single rows are faster

// The scores of NQ queries and the keys of four consecutive positions.
template <int NQ, class T>
inline void scores_microkernel(const T* keys, int64_t H, const float* q, int64_t q_stride,
                               float scale, float* scores, int64_t scores_stride) {
  floats16 products[4 * NQ] = {};
  for (int64_t i = 0; i < H; i += 16) {
    floats16 key[4];
    for (int j = 0; j < 4; j++) key[j] = load(keys + j * H + i);
    for (int x = 0; x < NQ; x++) {
      const floats16 here = load(q + x * q_stride + i);
      for (int j = 0; j < 4; j++) products[4 * x + j] = fmadd(here, key[j], products[4 * x + j]);
    }
  }
  float out[16];
  store(out, horizontal_sums<4 * NQ>(products) * scale);
  for (int x = 0; x < NQ; x++) std::memcpy(scores + x * scores_stride, out + 4 * x, 16);
}

// `attention_scores` for `count` queries. The last four keys may be stale, as there.
template <class T>
void attention_scores_few(const CachedHead<T>& k, const float* q, int64_t q_stride, int64_t count,
                          int64_t length, float scale, float* scores, int64_t scores_stride) {
  const int64_t H = k.H;
  k.for_each_block(length, [&](int64_t first, int64_t here, const T* at, const NextKV<T>&) {
    for (int64_t x = 0; x < count; x += 4) {
      const int64_t nq = std::min<int64_t>(4, count - x);
      const auto kernel = nq == 4   ? scores_microkernel<4, T>
                          : nq == 3 ? scores_microkernel<3, T>
                          : nq == 2 ? scores_microkernel<2, T>
                                    : scores_microkernel<1, T>;
      for (int64_t p = 0; p < here; p += 4)
        kernel(at + p * H, H, q + x * q_stride, q_stride, scale,
               scores + x * scores_stride + first + p, scores_stride);
    }
  });
}

#if defined(USE_AVX512)
const int MAX_QUERIES = 32;
const int FEW_QUERIES = 10;  // up to these, `scores_microkernel` is faster than a group of 16

// out [8, 16] = keys [8, H] . queries [H, 16] * scale. A lane is a query. The 16 partial sums of a
// score are computed one after the other and added up in the order of all kernels, as in
// `packed_microkernel`.
NOINLINE void scores_microkernel_16(const float* queries_H16, const float* keys, int64_t H,
                                    float scale, float* out) {
  floats16 subtotals[5][8];  // by level; the last level has the scores
#pragma GCC unroll 16
  for (int partial = 0; partial < PARTIALS; partial++) {
    floats16 sum[8] = {};
    for (int64_t i = BIT_REVERSED[partial]; i < H; i += PARTIALS) {
      floats16 query = load(queries_H16 + 16 * i);
      keep_in_register(query);
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) sum[j] = fmadd(query, broadcast(keys[j * H + i]), sum[j]);
    }
    int level = 0;
    for (int ones = partial; ones % 2; ones /= 2) level++;
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      floats16 total = sum[j];
#pragma GCC unroll 4
      for (int l = 0; l < level; l++) total = subtotals[l][j] + total;
      subtotals[level][j] = total;
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) store(out + 16 * j, subtotals[4][j] * scale);
}

inline const float* to_floats(const float* x, int64_t, float*) { return x; }

template <class T>
const float* to_floats(const T* x, int64_t n, float* scratch) {
  for (int64_t i = 0; i < n; i += 16) store(scratch + i, load(x + i));
  return scratch;
}

// Transposes 16 vectors of 16 floats from `from` on, a stride apart; those beyond `count` are zero.
inline void transpose_floats(const float* from, int64_t from_stride, int64_t count, float* to,
                             int64_t to_stride) {
  __m512i v[16];
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++)
    v[r] = r < count ? load_words(from + r * from_stride) : _mm512_setzero_si512();
  transpose16x16(v);
#pragma GCC unroll 16
  for (int r = 0; r < 16; r++) _mm512_storeu_si512(to + r * to_stride, v[r]);
}

// Queries, 16 keys as floats, and their scores, in vectors of H floats; H is at least 16.
const int SCRATCH_VECTORS = MAX_QUERIES + 16 + 16;

// `attention_scores` for `count` queries, in groups of 16. The last 16 keys may be stale, as there.
template <class T>
void attention_scores_groups(const CachedHead<T>& k, const float* q, int64_t q_stride,
                             int64_t count, int64_t length, float scale, float* scores,
                             int64_t scores_stride, float* scratch) {
  const int64_t H = k.H;
  float *floats = scratch + MAX_QUERIES * H, *out = floats + 16 * H;
  for (int64_t x = 0; x < count; x += 16)
    for (int64_t i = 0; i < H; i += 16)
      transpose_floats(q + x * q_stride + i, q_stride, count - x, scratch + x * H + 16 * i, 16);
  k.for_each_block(length, [&](int64_t first, int64_t here, const T* at, const NextKV<T>&) {
    for (int64_t p = 0; p < here; p += 16) {
      const float* keys = to_floats(at + p * H, 16 * H, floats);
      for (int64_t x = 0; x < count; x += 16) {
        scores_microkernel_16(scratch + x * H, keys, H, scale, out);
        scores_microkernel_16(scratch + x * H, keys + 8 * H, H, scale, out + 8 * 16);
        transpose_floats(out, 16, 16, scores + x * scores_stride + first + p, scores_stride);
      }
    }
  });
}
#else
const int MAX_QUERIES = 24, SCRATCH_VECTORS = 0;
#endif

template <class T>
void attention_scores_tile(const CachedHead<T>& k, const float* q, int64_t q_stride, int64_t count,
                           int64_t length, float scale, float* scores, int64_t scores_stride,
                           float* scratch) {
  int64_t grouped = 0;
#if defined(USE_AVX512)
  grouped = count % 16 > FEW_QUERIES ? count : count / 16 * 16;
  if (grouped)
    attention_scores_groups(k, q, q_stride, grouped, length, scale, scores, scores_stride, scratch);
#endif
  if (grouped < count)
    attention_scores_few(k, q + grouped * q_stride, q_stride, count - grouped, length, scale,
                         scores + grouped * scores_stride, scores_stride);
}

// out [NQ, 16 NV] += weights [NQ, count] . values [count, 16 NV], for some columns of a block; the
// first block overwrites them. Each value is read once for all queries.
template <int NQ, int NV, class T>
void weighted_values_microkernel(const T* values, int64_t H, const float* weights,
                                 int64_t weights_stride, int64_t count, bool first, float* out) {
  floats16 sum[NQ][NV];
#pragma GCC unroll 12
  for (int x = 0; x < NQ; x++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) sum[x][j] = first ? floats16{} : load(out + x * H + 16 * j);
  for (int64_t p = 0; p < count; p++) {
    floats16 value[NV];
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) value[j] = load(values + p * H + 16 * j);
#pragma GCC unroll 12
    for (int x = 0; x < NQ; x++) {
      const floats16 weight = broadcast(weights[x * weights_stride + p]);
#pragma GCC unroll 2
      for (int j = 0; j < NV; j++) sum[x][j] = fmadd(weight, value[j], sum[x][j]);
    }
  }
#pragma GCC unroll 12
  for (int x = 0; x < NQ; x++)
#pragma GCC unroll 2
    for (int j = 0; j < NV; j++) store(out + x * H + 16 * j, sum[x][j]);
}

// The same for all columns.
template <int NQ, class T>
void weighted_values_rows(const T* values, int64_t H, const float* weights, int64_t weights_stride,
                          int64_t count, bool first, float* out) {
  int64_t i = 0;
  for (; i + 32 <= H; i += 32)
    weighted_values_microkernel<NQ, 2>(values + i, H, weights, weights_stride, count, first,
                                       out + i);
  if (i < H)
    weighted_values_microkernel<NQ, 1>(values + i, H, weights, weights_stride, count, first,
                                       out + i);
}

// `weighted_values` for `count` queries. All of them are multiplied with a block of values before
// the next one, so that the block and its weights stay in the L1 cache.
template <class T>
void weighted_values_tile(const CachedHead<T>& v, const float* weights, int64_t weights_stride,
                          int64_t count, int64_t length, float* out) {
  const int max_nq = LANES == 16 ? 12 : 4;  // queries whose sums fit into the registers
  v.for_each_block(length, [&](int64_t first, int64_t here, const T* at, const NextKV<T>&) {
    for (int64_t x = 0, nq; x < count; x += nq) {
      const int64_t left = count - x;
      nq = left >= max_nq              ? max_nq
           : left >= 8 && LANES == 16 ? 8
           : left >= 4                ? 4
           : left >= 2                ? 2
                                      : 1;
      const auto kernel = nq == 12  ? weighted_values_rows<12, T>
                          : nq == 8 ? weighted_values_rows<8, T>
                          : nq == 4 ? weighted_values_rows<4, T>
                          : nq == 2 ? weighted_values_rows<2, T>
                                    : weighted_values_rows<1, T>;
      kernel(at, v.H, weights + x * weights_stride + first, weights_stride, here, first == 0,
             out + x * v.H);
    }
  });
}
#endif

// out = sum of weights[p] * v[p] over `length` positions, for 16 NV columns from `column` on.
template <int NV, class T>
void weighted_values(const CachedHead<T>& v, const float* weights, int64_t length, int64_t column,
                     float* out) {
  const int64_t H = v.H;
#if defined(USE_AVX2)
  __m256 total[2 * NV] = {};
#else
  floats16 total[NV] = {};
#endif
  v.for_each_block(length, [&](int64_t first, int64_t count, const T* at, const NextKV<T>& ahead) {
    std::remove_reference_t<decltype(total)> acc;  // in registers
    std::memcpy(acc, total, sizeof(total));
    for (int64_t p = 0; p < count; p++) {
      const T* here = at + p * H + column;
      if (p < ahead.count)
        for (size_t i = 0; i < 16 * NV; i += 64 / sizeof(T))
          prefetch(ahead.at + p * H + column + i, 0);
#if defined(USE_AVX2)
      const __m256 weight = _mm256_broadcast_ss(weights + first + p);
#pragma GCC unroll 16
      for (int j = 0; j < 2 * NV; j++)
        acc[j] = _mm256_fmadd_ps(weight, load8(here + 8 * j), acc[j]);
#else
      const floats16 weight = broadcast(weights[first + p]);
      for (int j = 0; j < NV; j++) acc[j] = fmadd(weight, load(here + 16 * j), acc[j]);
#endif
    }
    std::memcpy(total, acc, sizeof(total));
  });
#if defined(USE_AVX2)
#pragma GCC unroll 16
  for (int j = 0; j < 2 * NV; j++) _mm256_storeu_ps(out + 8 * j, total[j]);
#else
  for (int j = 0; j < NV; j++) store(out + 16 * j, total[j]);
#endif
}

template <class T>
void weighted_values(const CachedHead<T>& v, const float* weights, int64_t length, float* out) {
  const int64_t H = v.H;
  int64_t i = 0;
#if !defined(USE_AVX2)
  for (; i + 128 <= H; i += 128) weighted_values<8>(v, weights, length, i, out + i);
#endif
  for (; i + 64 <= H; i += 64) weighted_values<4>(v, weights, length, i, out + i);
  for (; i + 16 <= H; i += 16) weighted_values<1>(v, weights, length, i, out + i);
  for (; i < H; i++) {
    float total = 0;
    v.for_each_block(length, [&](int64_t first, int64_t count, const T* at, const NextKV<T>&) {
      for (int64_t p = 0; p < count; p++) total += weights[first + p] * to_float(at[p * H + i]);
    });
    out[i] = total;
  }
}

// The numerators of softmax, in place: scores[p] = e^(scores[p] - max). Returns their sum. The
// buffer is padded to a multiple of 16; the padding counts as -inf.
NOINLINE float softmax_numerators(float* scores, int64_t n) {
  const int parts = 16 / LANES;
  for (int64_t i = n; i % 16; i++) scores[i] = -INFINITY;
  floats max_parts[parts], total[parts] = {};
  for (int j = 0; j < parts; j++) max_parts[j] = load_vector<floats>(scores + LANES * j);
  for (int64_t i = 16; i < n; i += 16)
    for (int j = 0; j < parts; j++) {
      const floats here = load_vector<floats>(scores + i + LANES * j);
      max_parts[j] = here > max_parts[j] ? here : max_parts[j];
    }
  float max_score = max_parts[0][0];
  for (int i = 1; i < 16; i++) max_score = std::max(max_score, max_parts[i / LANES][i % LANES]);
  for (int64_t i = 0; i < n; i += 16)
    for (int j = 0; j < parts; j++) {
      const floats e = vector_exp(load_vector<floats>(scores + i + LANES * j) - max_score);
      store_vector(scores + i + LANES * j, e);
      total[j] += e;
    }
  return horizontal_sum(load_vector<floats16>(total));
}

// Attention of one row, for the queries that share one key head, over `length` keys, that of the
// new token included.
template <class T>
NOINLINE void attend(const Model& m, const CachedHead<T>& k, const CachedHead<T>& v, int64_t length,
                     const float* q, float* scores, float* out, const Input& in, int64_t row,
                     int64_t column) {
  const int64_t H = m.H;
  const float scale = 1.0f / std::sqrt(float(H));
  for (int64_t g = 0; g < m.N / m.K; g++) {
    attention_scores(k, q + g * H, length, scale, scores);
    k.apply_scales(scores, length);
    const float total = softmax_numerators(scores, length);
    v.apply_scales(scores, length);
    weighted_values(v, scores, length, out);
    for (int64_t i = 0; i < H; i++) out[i] /= total;
    in.store(row, column + g * H, out, H);
  }
}

// `attend` for `count` rows of one sequence at consecutive positions, the first of which sees
// `length` keys.
template <class T>
NOINLINE void attend_tile(const Model& m, const CachedHead<T>& k, const CachedHead<T>& v,
                          int64_t length, int64_t count, const float* q, int64_t q_stride,
                          float* scores, int64_t scores_stride, float* out, float* scratch,
                          const Input& in, int64_t row, int64_t column) {
  const int64_t H = m.H, last = length + count - 1;
  const float scale = 1.0f / std::sqrt(float(H));
  for (int64_t g = 0; g < m.N / m.K; g++) {
    attention_scores_tile(k, q + g * H, q_stride, count, last, scale, scores, scores_stride,
                          scratch);
    float totals[MAX_QUERIES];
    for (int64_t x = 0; x < count; x++) {
      float* here = scores + x * scores_stride;
      k.apply_scales(here, length + x);
      totals[x] = softmax_numerators(here, length + x);
      v.apply_scales(here, length + x);
      for (int64_t p = length + x; p < last; p++) here[p] = 0;  // keys of later rows
    }
    weighted_values_tile(v, scores, scores_stride, count, last, out);
    for (int64_t x = 0; x < count; x++) {
      for (int64_t i = 0; i < H; i++) out[x * H + i] /= totals[x];
      in.store(row + x, column + g * H, out + x * H, H);
    }
  }
}

// Whether attention over a cache of elements T runs on AMX, for all rows or for none.
template <class T>
bool attends_on_amx(const Model& m) {
#if defined(USE_AMX)
  return std::is_same_v<T, uint16_t> && m.H % 32 == 0 && m.block_size % 32 == 0 && amx_permitted();
#else
  return false;
#endif
}

#if defined(USE_AMX)
// Scratch of `attend_on_amx`, in vectors of H floats: tiles of queries, 16 queries and values.
const int64_t AMX_SCRATCH_VECTORS = AMX_MAX_QUERIES + TILE + AMX_POSITIONS / 2;

// Calls `visit` for each 32 positions from `begin` to `end`, with their values, how many of them
// are within `length`, and the values that are read next, if `prefetches`.
template <class Visit>
void for_each_32_values(const CachedHead<uint16_t>& v, int64_t begin, int64_t end, int64_t length,
                        bool prefetches, int64_t parts, Visit visit) {
  for (int64_t p = begin; p < end; p += 32) {
    const int64_t next = p / v.size + 1, offset = p % v.size;  // next: block
    const uint16_t* ahead = next * v.size < length ? v.block(next) : v.next;
    const int64_t elements = prefetches && ahead ? 32 * v.H : 0;
    visit(p, v.block(p / v.size) + offset * v.H, std::min<int64_t>(32, length - p),
          Ahead(ahead + offset * v.H, elements, parts));
  }
}

// Calls `visit` for each 32 positions, with their keys and what is read next, if `prefetches`. The
// last 32 keys may be stale beyond `length`, as in `attention_scores`.
template <class Visit>
void for_each_32_keys(const CachedHead<uint16_t>& k, int64_t length, bool prefetches, Visit visit) {
  k.for_each_block(length, [&](int64_t first, int64_t here, const uint16_t* at,
                               const NextKV<uint16_t>& next) {
    for (int64_t p = 0; p < here; p += 32) {
      const int64_t elements = prefetches ? next.elements(p, p + 32 < here ? 32 : k.size) : 0;
      visit(first + p, at + p * k.H, Ahead(next.at + p * k.H, elements, k.H / 32));
    }
  });
}

// `weighted_values` for one query; `low` and `sums` are scratch for as many weights and H floats.
inline void weighted_values_of_one(const CachedHead<uint16_t>& v, float* weights, float* low,
                                   int64_t length, bool prefetches, float* sums, float* out) {
  const int64_t H = v.H, parts = (H + 63) / 64 * 16;
  split_weights_into_floats(weights, padded_positions(length), low);
  std::fill(sums, sums + H, 0);
  const FlushedDenormals flushed;
  for_each_32_values(v, 0, length, length, prefetches, parts,
                     [&](int64_t p, const uint16_t* at, int64_t here, const Ahead& ahead) {
                       accumulate_values_of_one(weights + p, low + p, at, here, H, sums, ahead);
                     });
  interleave_columns(sums, H, out);
}

// `attention_scores` for one query.
inline void attention_scores_of_one(const CachedHead<uint16_t>& k, const QueryTiles& query,
                                    int64_t length, float scale, bool prefetches, float* scores) {
  const TileRegisters registers(TILE, 1);
  for_each_32_keys(k, length, prefetches, [&](int64_t p, const uint16_t* keys, Ahead ahead) {
    float* to = scores + p;
    score_sums<1>(keys, query, 0, to, 0, ahead);
    for (int64_t i = 0; i < 32; i += 16) store(to + i, load(to + i) * scale);
  });
}

// Attention of a group of queries to one head on AMX, two tiles of them at a time. Query x sees
// `length` + x positions; `last` is how many the last one sees.
struct AmxGroup {
  const QueryTiles& queries;
  int64_t length, last;
  float* scores;  // [tile, padded last, 16], then split weights

  int64_t tile_stride() const { return padded_positions(last) * TILE; }
  float* scores_of(int64_t tile) const { return scores + tile * tile_stride(); }
  // Positions that two tiles of queries from `tile` on read.
  int64_t end(int64_t tile) const {
    return padded_positions(std::min(last, length + (tile + 2) * TILE - 1));
  }

  void compute_scores(const CachedHead<uint16_t>& k, float scale, bool prefetches,
                      float* maxima) const {
    const int64_t tiles = queries.tile_count();
    const __m512 factor = _mm512_set1_ps(scale);
    std::fill(maxima, maxima + tiles * TILE, -INFINITY);
    for_each_32_keys(k, last, prefetches, [&](int64_t p, const uint16_t* keys, Ahead ahead) {
      for (int64_t tile = 0; tile < tiles; tile += 2) {
        if (p >= end(tile)) continue;
        const bool two = tile + 1 < tiles;
        const auto sums = two ? score_sums<2> : score_sums<1>;
        sums(keys, queries, tile, scores_of(tile) + p * TILE, tile_stride(), ahead);
        for (int64_t t = tile; t < tile + 1 + two; t++)
          scale_scores(scores_of(t), p, length + t * TILE, factor, maxima + t * TILE);
      }
    });
  }

  // Softmax, in place of the scores.
  void compute_weights(const float* maxima, float* totals) const {
    for (int64_t tile = 0; tile < queries.tile_count(); tile++)
      softmax_tile(scores_of(tile), end(tile / 2 * 2), length + tile * TILE, maxima + tile * TILE,
                   totals + tile * TILE);
  }

  // `packed` is scratch for AMX_POSITIONS values.
  void weight_values(const CachedHead<uint16_t>& v, bool prefetches, uint32_t* packed,
                     float* out) const {
    const int64_t H = v.H, tiles = queries.tile_count();
    for (int64_t first = 0; first < last; first += AMX_POSITIONS) {
      const int64_t stop = std::min(last, first + AMX_POSITIONS);
      for_each_32_values(v, first, stop, last, prefetches, 16,
                         [&](int64_t p, const uint16_t* at, int64_t here, const Ahead& ahead) {
                           pack_values(at, here, H, packed + (p - first) * (H / 2), ahead);
                         });
      for (int64_t tile = 0; tile < tiles; tile += 2) {
        const int64_t groups = (std::min(padded_positions(stop), end(tile)) - first) / 32;
        if (groups <= 0) continue;
        const auto accumulate = tile + 1 < tiles ? accumulate_values<2> : accumulate_values<1>;
        accumulate(scores_of(tile) + first * TILE, tile_stride(), packed, groups, H, first == 0,
                   out + tile * TILE * H);
      }
    }
  }
};

// As `attend_tile`, on AMX, also for one row; `count` is at most `amx_queries` of the last length.
NOINLINE void attend_on_amx(const Model& m, const CachedHead<uint16_t>& k,
                            const CachedHead<uint16_t>& v, int64_t length, int64_t count,
                            const float* q, int64_t q_stride, float* scores, float* out,
                            float* scratch, const Input& in, int64_t row, int64_t column) {
  const int64_t H = m.H, last = length + count - 1;
  const float scale = 1.0f / std::sqrt(float(H));
  const QueryTiles queries{reinterpret_cast<uint32_t*>(scratch), count, count == 1 ? 1 : TILE, H};
  uint32_t *rows = queries.data + AMX_MAX_QUERIES * H, *packed = rows + TILE * H;
  alignas(64) float maxima[AMX_MAX_QUERIES], totals[AMX_MAX_QUERIES];
  for (int64_t g = 0; g < m.N / m.K; g++) {
    const bool prefetches = g == 0;
    queries.pack(q + g * H, q_stride, rows);
    if (count == 1) {
      attention_scores_of_one(k, queries, last, scale, prefetches, scores);
      const int64_t padded = padded_positions(last);
      totals[0] = softmax_numerators(scores, last);
      std::fill(scores + last, scores + padded, 0);
      weighted_values_of_one(v, scores, scores + padded, last, prefetches,
                             reinterpret_cast<float*>(packed), out);
    } else {
      const TileRegisters registers(TILE, TILE);
      const AmxGroup group{queries, length, last, scores};
      group.compute_scores(k, scale, prefetches, maxima);
      group.compute_weights(maxima, totals);
      group.weight_values(v, prefetches, packed, out);
    }
    for (int64_t x = 0; x < count; x++) {
      for (int64_t i = 0; i < H; i++) out[x * H + i] /= totals[x];
      in.store(row + x, column + g * H, out + x * H, H);
    }
  }
}
#else
const int64_t AMX_MAX_QUERIES = 0, AMX_SCRATCH_VECTORS = 0;
int64_t amx_queries(int64_t) { return 0; }
#endif

// silu(gate) * up, for some columns of all rows; rows of `gates` and `ups` are `stride` floats
// apart.
NOINLINE void swiglu(const float* gates, const float* ups, int64_t stride, Range range, int64_t R,
                     const Input& inner) {
  for (int64_t row = 0; row < R; row++, gates += stride, ups += stride) {
    float* out = inner.fp32 + row * inner.stride;
    for (int64_t n = range.begin; n < range.end; n += LANES) {
      float last[3][LANES] = {};  // the last columns, if they are fewer than LANES
      const int64_t bytes = (range.end - n) * sizeof(float);
      const bool whole = n + LANES <= range.end;
      if (!whole) {
        std::memcpy(last[0], gates + n, bytes);
        std::memcpy(last[1], ups + n, bytes);
      }
      const floats gate = load_vector<floats>(whole ? gates + n : last[0]);
      const floats up = load_vector<floats>(whole ? ups + n : last[1]);
      store_vector(whole ? out + n : last[2], gate / (1.0f + vector_exp(-gate)) * up);
      if (!whole) std::memcpy(out + n, last[2], bytes);
    }
    if (inner.bf16)
      Input::to_bf16(inner.bf16 + row * inner.stride + range.begin, out + range.begin,
                     range.end - range.begin);
  }
}

// The rows of a step: one new token each. Row r is at position positions[r] of the sequence whose
// blocks are listed at tables[r].
struct Rows {
  int64_t count;
  const int64_t* const* tables;
  const int64_t* positions;
  bool shared;  // whether some rows are of one sequence, at consecutive positions

  int64_t max_length;  // keys that the row at the last position sees

  // Whether row + x continues the sequence of `row`.
  bool follows(int64_t row, int64_t x) const {
    return row + x < count && tables[row + x] == tables[row] &&
           positions[row + x] == positions[row] + x;
  }
};

// Attention of one layer for the rows of a step, and the store of their keys and values.
template <class T>
struct AttentionLayer {
  const Model& m;
  const Layer& l;
  int64_t layer;
  const Rows& rows;
  float* qkv;
  int64_t qkv_width;
  const Input& attention_out;

  // `values`: 0 for keys, 1 for values.
  CachedHead<T> cached_head(int64_t row, int64_t head, int64_t values) const {
    const int64_t first = ((layer * 2 + values) * m.K + head) * m.block_size;
    return {static_cast<T*>(m.kv) + first * m.H,
            m.kv_scales ? m.kv_scales + first : nullptr,
            rows.tables[row],
            m.layer_count * 2 * m.K * m.block_size,
            m.block_size,
            m.H};
  }

  // Stores a row's key and value of one key head, and applies norm and RoPE to the queries that
  // share it.
  void store_kv_and_rotate(int64_t row, int64_t head, float* rotated) const {
    const int64_t H = m.H, group = m.N / m.K, position = rows.positions[row];
    const float *cos = m.cos + position * (H / 2), *sin = m.sin + position * (H / 2);
    float* q = qkv + row * qkv_width;  // of this row: queries, keys, values
    for (int64_t n = head * group * H; n < (head + 1) * group * H; n += H) {
      layer_norm_and_rope(q + n, l.q_weight + n, l.q_bias + n, cos, sin, H, rotated);
      std::memcpy(q + n, rotated, H * sizeof(float));
    }
    const float *new_k = q + (m.N + head) * H, *new_v = new_k + m.K * H;
    layer_norm_and_rope(new_k, l.k_weight + head * H, l.k_bias + head * H, cos, sin, H, rotated);
    cached_head(row, head, 0).store(position, rotated);
    cached_head(row, head, 1).store(position, new_v);
  }

  // Keys and values of a head, with what is read after them, for prefetching.
  std::pair<CachedHead<T>, CachedHead<T>> keys_and_values(int64_t row, int64_t head) const {
    CachedHead<T> k = cached_head(row, head, 0), v = cached_head(row, head, 1);
    k.next = v.block(0);
    // After the values, the keys of the next task are read.
    if (head + 1 < m.K)
      v.next = cached_head(row, head + 1, 0).block(0);
    else if (row + 1 < rows.count)
      v.next = cached_head(row + 1, 0, 0).block(0);
    return {k, v};
  }

  void attend_row(int64_t row, int64_t head, float* scratch) const {
    if (attends_on_amx<T>(m)) return attend_rows(row, 1, head, scratch);
    const int64_t n = head * (m.N / m.K) * m.H;
    const auto [k, v] = keys_and_values(row, head);
    attend(m, k, v, rows.positions[row] + 1, qkv + row * qkv_width + n, scratch + m.H, scratch,
           attention_out, row, n);
  }

  // `attend_row` for `count` rows of one sequence.
  void attend_rows(int64_t row, int64_t count, int64_t head, float* scratch) const {
    const int64_t n = head * (m.N / m.K) * m.H, stride = leading_dimension(rows.max_length);
    float *out = scratch, *tile_scratch = out + OUT_VECTORS * m.H,
          *scores = tile_scratch + TILE_SCRATCH_VECTORS * m.H;
    const auto [k, v] = keys_and_values(row, head);
#if defined(USE_AMX)
    if constexpr (std::is_same_v<T, uint16_t>)
      if (attends_on_amx<T>(m))
        return attend_on_amx(m, k, v, rows.positions[row] + 1, count, qkv + row * qkv_width + n,
                             qkv_width, scores, out, tile_scratch, attention_out, row, n);
#endif
    attend_tile(m, k, v, rows.positions[row] + 1, count, qkv + row * qkv_width + n, qkv_width,
                scores, stride, out, tile_scratch, attention_out, row, n);
  }

  // Rows that attend together, at most.
  int64_t max_queries() const {
    return attends_on_amx<T>(m) ? amx_queries(rows.max_length) : MAX_QUERIES;
  }

  // What `attend_rows` needs on this processor, with AMX or without it, in vectors of H floats.
  static const int64_t OUT_VECTORS = MAX_QUERIES > AMX_MAX_QUERIES ? MAX_QUERIES : AMX_MAX_QUERIES;
  static const int64_t TILE_SCRATCH_VECTORS =
      AMX_SCRATCH_VECTORS > SCRATCH_VECTORS ? AMX_SCRATCH_VECTORS : SCRATCH_VECTORS;

  static int64_t scratch_size(int64_t H, int64_t max_length) {
    const int64_t queries = std::max<int64_t>(MAX_QUERIES, amx_queries(max_length));
    return (OUT_VECTORS + TILE_SCRATCH_VECTORS) * H + queries * leading_dimension(max_length);
  }

  // The cost of a row, in keys read; storing and rotating counts as some.
  int64_t cost(int64_t row) const { return rows.positions[row] + 16; }

  // A task is a row and a key head. Each thread has consecutive tasks of about equal total cost. If
  // rows share a sequence, later ones read keys that earlier ones store: so those are stored first,
  // and the tasks of one head follow each other, so that its keys stay in the cache. If the heads
  // can be divided among the threads, no thread reads what another one stores.
  void run(Barrier& barrier, float* scratch) const {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads(), R = rows.count;
    int64_t total = 0;  // of one head
    for (int64_t row = 0; row < R; row++) total += cost(row);
    const int64_t first = total * m.K * thread / team, last = total * m.K * (thread + 1) / team;
    int64_t done = 0;  // cost before a task: a thread has the tasks that begin in its range
    if (!rows.shared) {
      for (int64_t row = 0; row < R && done < last; row++)
        for (int64_t head = 0; head < m.K; head++, done += cost(row))
          if (done >= first && done < last) {
            store_kv_and_rotate(row, head, scratch);
            attend_row(row, head, scratch);
          }
      return;
    }
    const bool whole_heads = m.K % team == 0;
    const int64_t stored_heads = whole_heads ? m.K / team : 1;  // of a row, one after another
    for (int64_t task = thread; task < R * m.K / stored_heads; task += team)
      for (int64_t i = 0; i < stored_heads; i++)
        store_kv_and_rotate(task * stored_heads / m.K, task * stored_heads % m.K + i, scratch);
    if (!whole_heads) barrier.wait();
    for (int64_t head = first / total; head < m.K && head * total < last; head++) {
      done = head * total;
      for (int64_t row = 0; row < R && done < last;) {
        // A row's result is the same in a tile and alone, so a tile may begin at any row.
        const bool mine = done >= first;
        int64_t count = 0;  // rows of one sequence that are all this thread's, or all not
        do done += cost(row + count++);
        while (count < max_queries() && rows.follows(row, count) && done < last &&
               mine == (done >= first));
        if (mine && m.H % 16 == 0 && (count >= MIN_QUERIES || attends_on_amx<T>(m)))
          attend_rows(row, count, head, scratch);
        else if (mine)
          for (int64_t x = 0; x < count; x++) attend_row(row + x, head, scratch);
        row += count;
      }
    }
  }
};

// The products of a layer, partitioned among threads.
struct LayerPartitions {
  RowPartition q, k, v, o, gate_up, down;

  LayerPartitions(const Layer& l, int64_t R, int64_t threads)
      : q(partition(l.q_proj, R, threads)),
        k(partition(l.k_proj, R, threads)),
        v(partition(l.v_proj, R, threads)),
        o(partition(l.o_proj, R, threads)),
        gate_up(partition(l.gate_proj, R, threads)),
        down(partition(l.down_proj, R, threads)) {}
};

template <class T>
void attention(const Model& m, int64_t layer, const Rows& rows, float* qkv, int64_t qkv_width,
               const Input& attention_out, Barrier& barrier, float* scratch) {
  AttentionLayer<T>{m, m.layers[layer], layer, rows, qkv, qkv_width, attention_out}.run(barrier,
                                                                                        scratch);
}

}  // namespace

extern "C" {

// The sizes of the structures, which cpu_step.py compares with its own.
const int64_t* earlyfusion_abi() {
  static const int64_t sizes[] = {sizeof(Matrix), sizeof(Layer), sizeof(Model), sizeof(Choice)};
  return sizes;
}

// Whether products of many rows with bf16 weights run on AMX.
bool earlyfusion_runs_on_amx() { return takes_tiles(Matrix{nullptr, nullptr, 0, 0, BF16}); }

// The column sampled for each of B choices; -1 if the logits are not finite.
void earlyfusion_sample(const Choice* choices, int64_t B, int64_t* columns, int64_t threads) {
  int64_t widest = 0;
  for (int64_t b = 0; b < B; b++) widest = std::max(widest, choices[b].columns);
#pragma omp parallel num_threads(std::min(threads, B))
  {
    AlignedVector<float> z(widest + PADDING - 1);
    AlignedVector<double> e(widest + PADDING - 1);
#pragma omp for
    for (int64_t b = 0; b < B; b++) columns[b] = sample_column(choices[b], z.data(), e.data());
  }
}

// x_RD: embedded tokens in, states after the final norm out. Stores each row's key and value at its
// position; a row sees all up to there, also what other rows of this call store.
void earlyfusion_step(const Model* model, int64_t R, float* x_RD, const int64_t* const* tables,
                      const int64_t* positions, int64_t shared, int64_t threads) {
  const Model& m = *model;
  const Rows rows{R, tables, positions, shared != 0,
                  *std::max_element(positions, positions + R) + 1};
  const int64_t D = m.D, qkv_width = leading_dimension((m.N + 2 * m.K) * m.H),
                y_width = leading_dimension(D), inner_width = leading_dimension(m.F);
  const Matrix& any = m.layers[0].q_proj;  // all matrices have one format
  ScopedArena arena;
  const Input attention_out = arena.allocate_input(any, R, m.N * m.H),
              inner = arena.allocate_input(any, R, m.F);
  float *qkv = arena->allocate<float>(R * qkv_width), *y = arena->allocate<float>(R * y_width);
  float *gates = nullptr, *ups = nullptr;
  if (!inner.tiles) {
    gates = arena->allocate<float>(R * inner_width);
    ups = arena->allocate<float>(R * inner_width);
  }
  std::vector<LayerPartitions> partitions;
  for (int64_t i = 0; i < m.layer_count; i++) partitions.emplace_back(m.layers[i], R, threads);
  Barrier barrier;
  const auto attention_in_format = m.cache_format == FP32   ? attention<float>
                                   : m.cache_format == BF16 ? attention<uint16_t>
                                                            : attention<int8_t>;
  // Few rows: each thread has its own x and computes the same norms and residual sums, which saves
  // barriers. Many rows are divided among the threads, by tiles.
  const int64_t tiles = (R + TILE - 1) / TILE;
  const bool divided = tiles > 1 && threads > 1;
  std::optional<Input> shared_in;
  float* shared_x = nullptr;
  if (divided) {
    shared_in = arena.allocate_input(any, R, D);
    shared_x = arena->allocate<float>(R * D);
  }
#pragma omp parallel num_threads(threads)
  {
    ScopedArena local_arena;
    const Input in = divided ? *shared_in : local_arena.allocate_input(any, R, D);
    float* x = divided ? shared_x : local_arena->allocate<float>(R * D);
    float* norm_scratch = local_arena->allocate<float>(D);
    float* scratch =
        local_arena->allocate<float>(AttentionLayer<float>::scratch_size(m.H, rows.max_length));
    Range own{0, R};  // rows
    if (divided) {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      own = {std::min(R, tiles * thread / team * TILE),
             std::min(R, tiles * (thread + 1) / team * TILE)};
    }
    std::memcpy(x + own.begin * D, x_RD + own.begin * D,
                (own.end - own.begin) * D * sizeof(float));
    // The residual sum after a sublayer and the input of the next one, a tile of rows at a time, so
    // that x is read once. The first sublayer has none before it, and the last one none after it.
    const auto between_sublayers = [&](const float* norm, const float* next_norm) {
      for (int64_t first = own.begin; first < own.end; first += TILE) {
        const Range tile{first, std::min(own.end, first + TILE)};
        if (norm)
          add_residual(x, y, y_width, m.norm_after ? norm : nullptr, tile, D, m.eps, norm_scratch);
        if (next_norm) store_input(x, m.norm_after ? nullptr : next_norm, tile, D, m.eps, in);
      }
      if (divided) barrier.wait();
    };
    between_sublayers(nullptr, m.layers[0].attention_norm);
    for (int64_t i = 0; i < m.layer_count; i++) {
      const Layer& l = m.layers[i];
      LayerPartitions& work = partitions[i];
      {
        const Gemm gemm(l.q_proj, in, R);
        float *k = qkv + m.N * m.H, *v = k + m.K * m.H;
        work.q.for_each([&](Range range) { gemm.multiply(l.q_proj, range, qkv, qkv_width); });
        work.k.for_each([&](Range range) { gemm.multiply(l.k_proj, range, k, qkv_width); });
        work.v.for_each([&](Range range) { gemm.multiply(l.v_proj, range, v, qkv_width); });
      }
      barrier.wait();
      attention_in_format(m, i, rows, qkv, qkv_width, attention_out, barrier, scratch);
      barrier.wait();
      {
        const Gemm gemm(l.o_proj, attention_out, R);
        work.o.for_each([&](Range range) { gemm.multiply(l.o_proj, range, y, y_width); });
      }
      barrier.wait();
      between_sublayers(l.attention_norm, l.feed_forward_norm);
      {
        const Gemm gemm(l.gate_proj, in, R);
        work.gate_up.for_each([&](Range range) {
          if (in.tiles) return gemm.multiply_swiglu(l.gate_proj, l.up_proj, range, inner);
          gemm.multiply(l.gate_proj, range, gates, inner_width);
          gemm.multiply(l.up_proj, range, ups, inner_width);
          swiglu(gates, ups, inner_width, range, R, inner);
        });
      }
      barrier.wait();
      {
        const Gemm gemm(l.down_proj, inner, R);
        work.down.for_each([&](Range range) { gemm.multiply(l.down_proj, range, y, y_width); });
      }
      barrier.wait();
      between_sublayers(l.feed_forward_norm,
                        i + 1 < m.layer_count ? m.layers[i + 1].attention_norm : nullptr);
    }
    // Rows that are not divided are the same in all threads.
    if (divided || omp_get_thread_num() == 0)
      for (int64_t row = own.begin; row < own.end; row++)
        rms_norm(x + row * D, m.final_norm, D, m.eps, x_RD + row * D);
  }
}

// y [R, rows] = x [R, columns] W^T.
void earlyfusion_gemm(const Matrix* matrix, int64_t R, const float* x, int64_t columns, float* y,
                      int64_t threads) {
  ScopedArena arena;
  const Input in = arena.allocate_input(*matrix, R, columns);
  store_input(x, nullptr, {0, R}, columns, 0, in);
  RowPartition work = partition(*matrix, R, threads);
#pragma omp parallel num_threads(threads)
  {
    const Gemm gemm(*matrix, in, R);
    work.for_each([&](Range range) { gemm.multiply(*matrix, range, y, matrix->rows); });
  }
}
}
