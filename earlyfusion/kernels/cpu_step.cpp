// One step of the transformer on a CPU: every layer inside one parallel region.
//
// A step has R rows, one new token each, which share each read of the weights. The rows of a prompt
// have one block table and consecutive positions. Threads share the rows of weights (`Shares`); each has its own copy
// of the residual stream and of the inputs of a product, so that a layer needs five barriers: after
// the queries, the attention, its output, the gates and the end (six if rows share a sequence).
//
// The result of a row depends, to the bit, on its token, its position and the keys and values before
// it: not on the rows beside it, on how a prompt was cut, or on the number of threads. For this
// every sum is added up in one order, and every function that rounds is compiled once (ONE_COPY) or
// says how it rounds (`fused`). Products are in products.h.
//
// Names: R rows, D width, N query heads, K key heads, H head width, F inner width.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <type_traits>

#include "draw.h"
#include "products.h"
#include "simd.h"

namespace {

// ---- the structures of cpu_step.py: same names, same order

struct Layer {
  Matrix q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
  const float *attention_norm, *feed_forward_norm;
  const float *q_weight, *q_bias, *k_weight, *k_bias;  // norms of the heads
};

struct Model {
  int64_t layer_count, D, N, K, H, F;
  int64_t norm_after;  // 1: norms of the branches' outputs (the 34B), 0: of their inputs
  int64_t cache_format, block_size;  // block_size: tokens, a multiple of 16
  float eps;
  const Layer* layers;
  const float *final_norm, *cos, *sin;  // cos, sin: [positions, H / 2]
  void* kv;                             // [blocks, layer_count, 2, K, block_size, H]
  float* kv_scales;                     // of an int8 cache: the same without H
};

// A barrier. OpenMP's own keeps spinning, which costs whole time slices where a thread shares its
// core with another process; this one yields the core after a while.
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
      else __builtin_ia32_pause();
#endif
    }
  }

 private:
  std::atomic<int64_t> arrived_{0}, round_{0};
};

// ---- the steps of a layer

// Inlined in two places, a function may round in two ways (see `fused`).
#define ONE_COPY __attribute__((noinline))

// The sum of (x - mean)^2.
float squares(const float* x, int64_t n, float mean) {
  floats16 total = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const floats16 off = load(x + i) - mean;
    total += off * off;
  }
  float s = sum(total);
  for (; i < n; i++) s += (x[i] - mean) * (x[i] - mean);
  return s;
}

ONE_COPY void rms_norm(const float* __restrict x, const float* __restrict weight, int64_t n,
                       float eps, float* __restrict y) {
  const float scale = 1.0f / std::sqrt(squares(x, n, 0) / n + eps);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// The input of a product: rows as they are.
void copy_rounded(const float* x, int64_t R, int64_t D, const Input& in) {
  for (int64_t row = 0; row < R; row++) in.put(row, 0, x + row * D, D);
}

// The input of a product: rows after their norm.
void norm_rounded(const float* x, const float* weight, int64_t R, int64_t D, float eps,
                  const Input& in) {
  for (int64_t row = 0; row < R; row++) {
    float* y = in.fp32 + row * in.stride;
    rms_norm(x + row * D, weight, D, eps, y);
    if (in.rounded) Input::round(in.rounded + row * in.stride, y, D);
  }
}

// x += y, or x += norm(y) with a `weight`: where norms come after the branches.
void add(float* x, const float* y, int64_t y_stride, const float* weight, int64_t R, int64_t D, float eps,
         float* scratch) {
  for (int64_t row = 0; row < R; row++) {
    const float* branch = y + row * y_stride;
    if (weight) {
      rms_norm(branch, weight, D, eps, scratch);
      branch = scratch;
    }
    for (int64_t i = 0; i < D; i++) x[row * D + i] += branch[i];
  }
}

float total(const float* x, int64_t n) {
  floats16 parts = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) parts += load(x + i);
  float s = sum(parts);
  for (; i < n; i++) s += x[i];
  return s;
}

// LayerNorm over one head, then rotation of the pairs (i, i + H / 2); its eps is fixed.
ONE_COPY void head_norm_and_rotate(const float* x, const float* weight, const float* bias,
                                   const float* cos, const float* sin, int64_t H,
                                   float* __restrict y) {
  const float mean = total(x, H) / H, scale = 1.0f / std::sqrt(squares(x, H, mean) / H + 1e-5f);
  const int64_t half = H / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = (x[i] - mean) * scale * weight[i] + bias[i];
    const float b = (x[i + half] - mean) * scale * weight[i + half] + bias[i + half];
    y[i] = a * cos[i] - b * sin[i];
    y[i + half] = b * cos[i] + a * sin[i];
  }
}

// Entries of the cache in its dtype.
inline void store_rounded(float* at, const float* x, int64_t n) {
  std::memcpy(at, x, n * sizeof(float));
}
inline void store_rounded(uint16_t* at, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) at[i] = as_bf16(x[i]);
}

// Returns the scale: the largest entry becomes +-127.
inline float store_rounded(int8_t* at, const float* x, int64_t n) {
  float most = 0;
  for (int64_t i = 0; i < n; i++) most = std::max(most, std::fabs(x[i]));
  const float scale = most / 127, inverse = scale > 0 ? 1 / scale : 0;
  for (int64_t i = 0; i < n; i++) at[i] = int8_t(std::nearbyint(x[i] * inverse));
  return scale;
}

inline float value(int8_t x) { return x; }
inline float value(float x) { return x; }
inline float value(uint16_t x) { return as_float(x); }

template <class T>
float dot(const float* q, const T* k, int64_t H) {
  floats16 total = {};
  int64_t i = 0;
#if defined(VECTORS_OF_EIGHT)
  __m256 low = _mm256_setzero_ps(), high = low;
  for (; i + 16 <= H; i += 16) {
    low = _mm256_fmadd_ps(eight(q + i), eight(k + i), low);
    high = _mm256_fmadd_ps(eight(q + i + 8), eight(k + i + 8), high);
  }
  std::memcpy(&total, &low, 32);
  std::memcpy(reinterpret_cast<char*>(&total) + 32, &high, 32);
#else
  for (; i + 16 <= H; i += 16) total = fused(load(q + i), load(k + i), total);
#endif
  float s = sum(total);
  for (; i < H; i++) s += q[i] * value(k[i]);
  return s;
}

// The products of one query and the keys of sixteen consecutive positions.
template <class T>
floats16 dots16(const float* q, const T* k, int64_t H) {
#if defined(VECTORS_OF_EIGHT)
  float out[16];
  for (int p = 0; p < 16; p += 4) {
    __m256 low[4] = {}, high[4] = {};
    for (int64_t i = 0; i < H; i += 16) {
      const __m256 q_low = eight(q + i), q_high = eight(q + i + 8);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        low[j] = _mm256_fmadd_ps(q_low, eight(k + (p + j) * H + i), low[j]);
        high[j] = _mm256_fmadd_ps(q_high, eight(k + (p + j) * H + i + 8), high[j]);
      }
    }
    _mm_storeu_ps(out + p, four_sums(low, high));
  }
  return load(out);
#else
  floats16 products[16] = {};
  for (int64_t i = 0; i < H; i += 16) {
    const floats16 here = load(q + i);
    for (int p = 0; p < 16; p++) products[p] = fused(here, load(k + p * H + i), products[p]);
  }
  return sums<16>(products);
#endif
}

// `count` vectors that are read soon.
template <class T>
struct Following {
  const T* at;
  int64_t count, H;

  // Those from the p-th one on, `number` at most.
  void fetch(int64_t p, int64_t number) const {
    const T *line = at + p * H, *end = at + std::min(p + number, count) * H;
    for (; line < end; line += 64 / sizeof(T)) ::fetch(line, 0);
  }
};

// Keys or values of one head of a sequence, which lie in the blocks of its table; `scales`, one per
// position, only in int8.
template <class T>
struct CachedHead {
  T* data;  // of block 0
  float* scales;
  const int64_t* table;
  int64_t stride, size, H;  // stride: vectors from one block to the next; size: tokens of a block
  const T* next = nullptr;  // what is read after these, fetched with the last block

  T* block(int64_t number) const { return data + table[number] * stride * H; }
  float* scales_of(int64_t number) const { return scales + table[number] * stride; }

  void put(int64_t position, const float* x) const {
    const int64_t number = position / size, offset = position % size;
    T* at = block(number) + offset * H;
    if constexpr (std::is_same_v<T, int8_t>)
      scales_of(number)[offset] = store_rounded(at, x, H);
    else
      store_rounded(at, x, H);
  }

  // An int8 vector's scale is a factor of its score, or of its share in the result.
  void scale(float* __restrict weights, int64_t length) const {
    if (!scales) return;
    for (int64_t first = 0; first < length; first += size) {
      const float* here = scales_of(first / size);
      const int64_t count = std::min(size, length - first);
      for (int64_t p = 0; p < count; p++) weights[first + p] *= here[p];
    }
  }

  // Positions are read one block after the other: `read(first, count, at, ahead)` gets the vectors
  // of `count` positions from `first` on, and what is to be fetched meanwhile.
  template <class Read>
  void each_block(int64_t length, Read read) const {
    for (int64_t first = 0; first < length; first += size) {
      const int64_t number = first / size, left = length - first - size;
      const Following<T> ahead = left > 0 ? Following<T>{block(number + 1), std::min(size, left), H}
                                          : Following<T>{next, next ? std::min(size, length) : 0, H};
      read(first, std::min(size, length - first), block(number), ahead);
    }
  }
};

// scores[p] = q . k[p] * scale, for `length` positions.
template <class T>
void score(const CachedHead<T>& k, const float* q, int64_t length, float scale, float* scores) {
  const int64_t H = k.H;
  k.each_block(length, [&](int64_t first, int64_t count, const T* at, const Following<T>& ahead) {
    int64_t p = 0;
    // The last sixteen may be stale keys past `length`: `soften` sets their scores to -inf.
    for (; H % 16 == 0 && p < count; p += 16) {
      ahead.fetch(p, p + 16 < count ? 16 : k.size);
      store(scores + first + p, dots16(q, at + p * H, H) * scale);
    }
    for (; p < count; p++) scores[first + p] = dot(q, at + p * H, H) * scale;
  });
}

// ---- rows of one sequence at consecutive positions, which read each key and value together. Scores and results
// are added up in the order of `score` and `blend`; rows of `q` and `scores` are a stride apart.

#if defined(VECTORS_OF_EIGHT)
const int TILE_ROWS = 24, LEAST_ROWS = 3;  // at most, and from which on this pays

// The products of N keys and 8 V queries, out: [N, 8 V]. A lane is a query here: the sixteen sums of a score are
// kept apart and added up in their order, as in panels.h, of which two are computed at a time.
template <int V, int N>
ONE_COPY void scores_of(const float* queries_HV, const float* keys, int64_t H, float scale, float* out) {
  const int width = 8 * V;
  __m256 kept[4][N][V];  // sums of sums, by level
#pragma GCC unroll 8
  for (int pair = 0; pair < SUMS / 2; pair++) {
    __m256 sum[2][N][V] = {};
    for (int64_t i = 0; i < H; i += SUMS) {
#pragma GCC unroll 2
      for (int side = 0; side < 2; side++) {
        const int64_t at = i + ORDER[2 * pair + side];
        __m256 entry[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) hold(entry[j] = _mm256_broadcast_ss(keys + j * H + at));
#pragma GCC unroll 3
        for (int g = 0; g < V; g++) {
          __m256 query = _mm256_load_ps(queries_HV + at * width + 8 * g);
          hold(query);
#pragma GCC unroll 4
          for (int j = 0; j < N; j++) sum[side][j][g] = _mm256_fmadd_ps(query, entry[j], sum[side][j][g]);
        }
      }
    }
    const int level = pair == 7 ? 3 : pair % 4 == 3 ? 2 : pair % 2;  // ones at the end of `pair`
#pragma GCC unroll 4
    for (int j = 0; j < N; j++)
#pragma GCC unroll 3
      for (int g = 0; g < V; g++) {
        __m256 total = _mm256_add_ps(sum[0][j][g], sum[1][j][g]);
#pragma GCC unroll 3
        for (int l = 0; l < level; l++) total = _mm256_add_ps(kept[l][j][g], total);
        kept[level][j][g] = total;
      }
  }
#pragma GCC unroll 4
  for (int j = 0; j < N; j++)
#pragma GCC unroll 3
    for (int g = 0; g < V; g++)
      _mm256_store_ps(out + j * width + 8 * g, _mm256_mul_ps(kept[3][j][g], _mm256_set1_ps(scale)));
}

inline const float* as_floats(const float* x, int64_t, float*) { return x; }

template <class T>
const float* as_floats(const T* x, int64_t n, float* room) {
  for (int64_t i = 0; i < n; i += 8) _mm256_store_ps(room + i, eight(x + i));
  return room;
}

// `score` for `count` queries, at most 8 V; `room` is for TILE_SCRATCH * H floats. The last keys of sixteen may be
// stale, as in `score`.
const int TILE_SCRATCH = TILE_ROWS + 8 + 12;

template <int V, class T>
void score_tile(const CachedHead<T>& k, const float* q, int64_t q_stride, int64_t count, int64_t length,
                float scale, float* scores, int64_t scores_stride, float* room) {
  const int64_t H = k.H;
  const int width = 8 * V, keys = V == 1 ? 4 : 2;
  float *queries_HV = room, *floats = room + H * width, *out = floats + 8 * H;
  __m256i turned_rows[8];
  for (int g = 0; g < V; g++) {
    const Eight rows(q + 8 * g * q_stride, q_stride, std::min<int64_t>(8, count - 8 * g));
    for (int64_t i = 0; i < H; i += 8) {
      turned(rows, 4 * i, turned_rows);
      for (int r = 0; r < 8; r++)
        _mm256_store_ps(queries_HV + (i + r) * width + 8 * g, _mm256_castsi256_ps(turned_rows[r]));
    }
  }
  k.each_block(length, [&](int64_t first, int64_t here, const T* at, const Following<T>&) {
    for (int64_t p = 0; p < here; p += 8) {
      const float* vectors = as_floats(at + p * H, 8 * H, floats);
      for (int j = 0; j < 8; j += keys)
        scores_of<V, keys>(queries_HV, vectors + j * H, H, scale, out + j * width);
      for (int g = 0; g < V; g++) {
        turned(Eight(out + 8 * g, width, 8), 0, turned_rows);
        for (int r = 0; r < 8; r++)
          write(scores + (8 * g + r) * scores_stride + first + p, turned_rows[r]);
      }
    }
  });
}

template <class T>
void score_tile(const CachedHead<T>& k, const float* q, int64_t q_stride, int64_t count, int64_t length,
                float scale, float* scores, int64_t scores_stride, float* room) {
  const auto score = count > 16 ? score_tile<3, T> : count > 8 ? score_tile<2, T> : score_tile<1, T>;
  score(k, q, q_stride, count, length, scale, scores, scores_stride, room);
}

// `blend` for X rows and sixteen columns: each value is read once for all of them.
template <int X, class T>
void blend_tile(const CachedHead<T>& v, const float* weights, int64_t weights_stride, int64_t length,
                int64_t column, float* out) {
  const int64_t H = v.H;
  __m256 total[X][2] = {};
  v.each_block(length, [&](int64_t first, int64_t count, const T* at, const Following<T>&) {
    __m256 acc[X][2];  // in registers
    std::memcpy(acc, total, sizeof(total));
    for (int64_t p = 0; p < count; p++) {
      const T* here = at + p * H + column;
      const float* weight = weights + first + p;
      __m256 low = eight(here), high = eight(here + 8);
      hold(low);
      hold(high);
#pragma GCC unroll 6
      for (int x = 0; x < X; x++) {
        const __m256 w = _mm256_broadcast_ss(weight + x * weights_stride);
        acc[x][0] = _mm256_fmadd_ps(w, low, acc[x][0]);
        acc[x][1] = _mm256_fmadd_ps(w, high, acc[x][1]);
      }
    }
    std::memcpy(total, acc, sizeof(total));
  });
  for (int x = 0; x < X; x++) std::memcpy(out + x * H + column, total[x], 64);
}

template <class T>
void blend_rows(const CachedHead<T>& v, const float* weights, int64_t weights_stride, int64_t count,
                int64_t length, float* out) {
  for (int64_t x = 0, X; x < count; x += X) {
    X = std::min<int64_t>(6, count - x);
    const auto blend = X == 6   ? blend_tile<6, T>
                       : X == 5 ? blend_tile<5, T>
                       : X == 4 ? blend_tile<4, T>
                       : X == 3 ? blend_tile<3, T>
                       : X == 2 ? blend_tile<2, T>
                                : blend_tile<1, T>;
    for (int64_t column = 0; column < v.H; column += 16)
      blend(v, weights + x * weights_stride, weights_stride, length, column, out + x * v.H);
  }
}
#else
const int TILE_ROWS = 24, LEAST_ROWS = 3, TILE_SCRATCH = 0;  // at most, and from which on this pays

// The products of X queries and the keys of four consecutive positions.
template <int X, class T>
inline void score_four(const T* keys, int64_t H, const float* q, int64_t q_stride, float scale, float* scores,
                       int64_t scores_stride) {
  floats16 products[4 * X] = {};
  for (int64_t i = 0; i < H; i += 16) {
    floats16 key[4];
    for (int j = 0; j < 4; j++) key[j] = load(keys + j * H + i);
    for (int x = 0; x < X; x++) {
      const floats16 here = load(q + x * q_stride + i);
      for (int j = 0; j < 4; j++) products[4 * x + j] = fused(here, key[j], products[4 * x + j]);
    }
  }
  float out[16];
  store(out, sums<4 * X>(products) * scale);
  for (int x = 0; x < X; x++) std::memcpy(scores + x * scores_stride, out + 4 * x, 16);
}

// `score` for `count` queries. The last four keys may be stale, as in `score`.
template <class T>
void score_tile(const CachedHead<T>& k, const float* q, int64_t q_stride, int64_t count, int64_t length, float scale,
                float* scores, int64_t scores_stride, float*) {
  const int64_t H = k.H;
  k.each_block(length, [&](int64_t first, int64_t here, const T* at, const Following<T>&) {
    for (int64_t x = 0; x < count; x += 4) {
      const int64_t X = std::min<int64_t>(4, count - x);
      const auto four = X == 4   ? score_four<4, T>
                        : X == 3 ? score_four<3, T>
                        : X == 2 ? score_four<2, T>
                                 : score_four<1, T>;
      for (int64_t p = 0; p < here; p += 4)
        four(at + p * H, H, q + x * q_stride, q_stride, scale, scores + x * scores_stride + first + p, scores_stride);
    }
  });
}

// `blend` for X rows and 16 W columns: each value is read once for all of them.
template <int X, int W, class T>
void blend_tile(const CachedHead<T>& v, const float* weights, int64_t weights_stride, int64_t length, int64_t column,
                float* out) {
  const int64_t H = v.H;
  floats16 total[X][W] = {};
  v.each_block(length, [&](int64_t first, int64_t count, const T* at, const Following<T>&) {
    floats16 acc[X][W];  // in registers
    std::memcpy(acc, total, sizeof(total));
    for (int64_t p = 0; p < count; p++) {
      floats16 values[W];
#pragma GCC unroll 2
      for (int j = 0; j < W; j++) values[j] = load(at + p * H + column + 16 * j);
#pragma GCC unroll 12
      for (int x = 0; x < X; x++) {
        const floats16 weight = splat(weights[x * weights_stride + first + p]);
#pragma GCC unroll 2
        for (int j = 0; j < W; j++) acc[x][j] = fused(weight, values[j], acc[x][j]);
      }
    }
    std::memcpy(total, acc, sizeof(total));
  });
  for (int x = 0; x < X; x++)
    for (int j = 0; j < W; j++) store(out + x * H + column + 16 * j, total[x][j]);
}

template <int X, class T>
void blend_some(const CachedHead<T>& v, const float* weights, int64_t weights_stride, int64_t length, float* out) {
  int64_t column = 0;
  for (; column + 32 <= v.H; column += 32) blend_tile<X, 2>(v, weights, weights_stride, length, column, out);
  if (column < v.H) blend_tile<X, 1>(v, weights, weights_stride, length, column, out);
}

template <class T>
void blend_rows(const CachedHead<T>& v, const float* weights, int64_t weights_stride, int64_t count, int64_t length,
                float* out) {
  const int most = LANES == 16 ? 12 : 4;  // rows whose sums fit into the registers
  for (int64_t x = 0, X; x < count; x += X) {
    X = count - x >= most ? most : count - x >= 4 ? 4 : count - x >= 2 ? 2 : 1;
    const auto blend = X == 12  ? blend_some<12, T>
                       : X == 4 ? blend_some<4, T>
                       : X == 2 ? blend_some<2, T>
                                : blend_some<1, T>;
    blend(v, weights + x * weights_stride, weights_stride, length, out + x * v.H);
  }
}
#endif

// out = sum over `length` positions of weight * v, for 16 W columns of the head from `column` on.
template <int W, class T>
void blend(const CachedHead<T>& v, const float* weights, int64_t length, int64_t column, float* out) {
  const int64_t H = v.H;
#if defined(VECTORS_OF_EIGHT)
  __m256 total[2 * W] = {};
#else
  floats16 total[W] = {};
#endif
  v.each_block(length, [&](int64_t first, int64_t count, const T* at, const Following<T>& ahead) {
    std::remove_reference_t<decltype(total)> acc;  // in registers
    std::memcpy(acc, total, sizeof(total));
    for (int64_t p = 0; p < count; p++) {
      const T* here = at + p * H + column;
      if (p < ahead.count)
        for (size_t i = 0; i < 16 * W; i += 64 / sizeof(T)) fetch(ahead.at + p * H + column + i, 0);
#if defined(VECTORS_OF_EIGHT)
      const __m256 weight = _mm256_broadcast_ss(weights + first + p);
#pragma GCC unroll 16
      for (int j = 0; j < 2 * W; j++) acc[j] = _mm256_fmadd_ps(weight, eight(here + 8 * j), acc[j]);
#else
      const floats16 weight = splat(weights[first + p]);
      for (int j = 0; j < W; j++) acc[j] = fused(weight, load(here + 16 * j), acc[j]);
#endif
    }
    std::memcpy(total, acc, sizeof(total));
  });
#if defined(VECTORS_OF_EIGHT)
#pragma GCC unroll 16
  for (int j = 0; j < 2 * W; j++) _mm256_storeu_ps(out + 8 * j, total[j]);
#else
  for (int j = 0; j < W; j++) store(out + 16 * j, total[j]);
#endif
}

template <class T>
void blend(const CachedHead<T>& v, const float* weights, int64_t length, float* out) {
  const int64_t H = v.H;
  int64_t i = 0;
#if !defined(VECTORS_OF_EIGHT)
  for (; i + 128 <= H; i += 128) blend<8>(v, weights, length, i, out + i);
#endif
  for (; i + 64 <= H; i += 64) blend<4>(v, weights, length, i, out + i);
  for (; i + 16 <= H; i += 16) blend<1>(v, weights, length, i, out + i);
  for (; i < H; i++) {
    float total = 0;
    v.each_block(length, [&](int64_t first, int64_t count, const T* at, const Following<T>&) {
      for (int64_t p = 0; p < count; p++) total += weights[first + p] * value(at[p * H + i]);
    });
    out[i] = total;
  }
}

// scores -> e^(score - max); returns their sum. The buffer is padded to sixteens, and what it holds
// after the last score counts as -inf.
ONE_COPY float soften(float* scores, int64_t n) {
  const int parts = 16 / LANES;
  for (int64_t i = n; i % 16; i++) scores[i] = -INFINITY;
  floats most[parts], total[parts] = {};
  for (int j = 0; j < parts; j++) most[j] = read<floats>(scores + LANES * j);
  for (int64_t i = 16; i < n; i += 16)
    for (int j = 0; j < parts; j++) {
      const floats here = read<floats>(scores + i + LANES * j);
      most[j] = here > most[j] ? here : most[j];
    }
  float top = most[0][0];
  for (int i = 1; i < 16; i++) top = std::max(top, most[i / LANES][i % LANES]);
  for (int64_t i = 0; i < n; i += 16)
    for (int j = 0; j < parts; j++) {
      const floats e = exponential(read<floats>(scores + i + LANES * j) - top);
      write(scores + i + LANES * j, e);
      total[j] += e;
    }
  return sum(read<floats16>(total));
}

// One key head of one row: its queries against the `length` keys so far, that of the new token among
// them.
template <class T>
ONE_COPY void attend(const Model& m, const CachedHead<T>& k, const CachedHead<T>& v, int64_t length,
                     const float* q, float* scores, float* out, const Input& in, int64_t row,
                     int64_t column) {
  const int64_t H = m.H;
  const float scale = 1.0f / std::sqrt(float(H));
  for (int64_t g = 0; g < m.N / m.K; g++) {
    score(k, q + g * H, length, scale, scores);
    k.scale(scores, length);
    const float total = soften(scores, length);
    v.scale(scores, length);
    blend(v, scores, length, out);
    for (int64_t i = 0; i < H; i++) out[i] /= total;
    in.put(row, column + g * H, out, H);
  }
}

// `attend` for `count` rows of one sequence at consecutive positions, the first of which sees
// `length` keys. Scores have `scores_stride` floats per row, and so has `q` its own stride.
template <class T>
ONE_COPY void attend_tile(const Model& m, const CachedHead<T>& k, const CachedHead<T>& v, int64_t length,
                          int64_t count, const float* q, int64_t q_stride, float* scores,
                          int64_t scores_stride, float* out, float* room, const Input& in, int64_t row,
                          int64_t column) {
  const int64_t H = m.H, last = length + count - 1;
  const float scale = 1.0f / std::sqrt(float(H));
  for (int64_t g = 0; g < m.N / m.K; g++) {
    score_tile(k, q + g * H, q_stride, count, last, scale, scores, scores_stride, room);
    float totals[TILE_ROWS];
    for (int64_t x = 0; x < count; x++) {
      float* here = scores + x * scores_stride;
      k.scale(here, length + x);
      totals[x] = soften(here, length + x);
      v.scale(here, length + x);
      for (int64_t p = length + x; p < last; p++) here[p] = 0;  // keys of later rows
    }
    blend_rows(v, scores, scores_stride, count, last, out);
    for (int64_t x = 0; x < count; x++) {
      for (int64_t i = 0; i < H; i++) out[x * H + i] /= totals[x];
      in.put(row + x, column + g * H, out + x * H, H);
    }
  }
}

// silu(gate) * up, for some columns of all rows; gates and ups have rows of `stride`.
ONE_COPY void activate(const float* gates, const float* ups, int64_t stride, Range mine, int64_t R,
                       const Input& inner) {
  for (int64_t row = 0; row < R; row++, gates += stride, ups += stride) {
    float* out = inner.fp32 + row * inner.stride;
    for (int64_t n = mine.first; n < mine.last; n += LANES) {
      float last[3][LANES] = {};  // where fewer than LANES columns are left
      const int64_t bytes = (mine.last - n) * sizeof(float);
      const bool whole = n + LANES <= mine.last;
      if (!whole) {
        std::memcpy(last[0], gates + n, bytes);
        std::memcpy(last[1], ups + n, bytes);
      }
      const floats gate = read<floats>(whole ? gates + n : last[0]);
      const floats up = read<floats>(whole ? ups + n : last[1]);
      write(whole ? out + n : last[2], gate / (1.0f + exponential(-gate)) * up);
      if (!whole) std::memcpy(out + n, last[2], bytes);
    }
    if (inner.rounded)
      Input::round(inner.rounded + row * inner.stride + mine.first, out + mine.first, mine.last - mine.first);
  }
}

// The new tokens of a step. Row r is at position positions[r] of the sequence whose blocks are listed
// at tables[r].
struct Rows {
  int64_t count;
  const int64_t* const* tables;
  const int64_t* positions;
  bool shared;  // whether some rows are of one sequence, at consecutive positions

  int64_t longest;  // keys that the last of all positions sees

  // Whether row + x continues the sequence of `row`.
  bool follows(int64_t row, int64_t x) const {
    return row + x < count && tables[row + x] == tables[row] && positions[row + x] == positions[row] + x;
  }
};

// One layer's keys, values and attention for the rows of a step.
template <class T>
struct Heads {
  const Model& m;
  const Layer& l;
  int64_t layer;
  const Rows& rows;
  float* qkv;
  int64_t qkv_width;
  const Input& attended;

  // `values`: 0 for keys, 1 for values.
  CachedHead<T> cached(int64_t row, int64_t head, int64_t values) const {
    const int64_t first = ((layer * 2 + values) * m.K + head) * m.block_size;
    return {static_cast<T*>(m.kv) + first * m.H,
            m.kv_scales ? m.kv_scales + first : nullptr,
            rows.tables[row],
            m.layer_count * 2 * m.K * m.block_size,
            m.block_size,
            m.H};
  }

  // Stores the key and value of one key head of a row, and rotates the queries that read it.
  void prepare(int64_t row, int64_t head, float* rotated) const {
    const int64_t H = m.H, group = m.N / m.K, position = rows.positions[row];
    const float *cos = m.cos + position * (H / 2), *sin = m.sin + position * (H / 2);
    float* q = qkv + row * qkv_width;  // of this row: queries, keys, values
    for (int64_t n = head * group * H; n < (head + 1) * group * H; n += H) {
      head_norm_and_rotate(q + n, l.q_weight + n, l.q_bias + n, cos, sin, H, rotated);
      std::memcpy(q + n, rotated, H * sizeof(float));
    }
    const float *new_k = q + (m.N + head) * H, *new_v = new_k + m.K * H;
    head_norm_and_rotate(new_k, l.k_weight + head * H, l.k_bias + head * H, cos, sin, H, rotated);
    cached(row, head, 0).put(position, rotated);
    cached(row, head, 1).put(position, new_v);
  }

  void look_back(int64_t row, int64_t head, float* scratch) const {
    const int64_t n = head * (m.N / m.K) * m.H;
    const float* q = qkv + row * qkv_width + n;
    CachedHead<T> k = cached(row, head, 0), v = cached(row, head, 1);
    k.next = v.block(0);
    // Values are followed by the keys of the next task.
    if (head + 1 < m.K)
      v.next = cached(row, head + 1, 0).block(0);
    else if (row + 1 < rows.count)
      v.next = cached(row + 1, 0, 0).block(0);
    attend(m, k, v, rows.positions[row] + 1, q, scratch + m.H, scratch, attended, row, n);
  }

  // The same for `count` rows of one sequence.
  void look_back_tile(int64_t row, int64_t count, int64_t head, float* scratch) const {
    const int64_t n = head * (m.N / m.K) * m.H, stride = apart(rows.longest);
    float *out = scratch, *room = out + TILE_ROWS * m.H, *scores = room + TILE_SCRATCH * m.H;
    attend_tile(m, cached(row, head, 0), cached(row, head, 1), rows.positions[row] + 1, count,
                qkv + row * qkv_width + n, qkv_width, scores, stride, out, room, attended, row, n);
  }

  static int64_t scratch_size(int64_t H, int64_t longest) {
    return (TILE_ROWS + TILE_SCRATCH) * H + TILE_ROWS * apart(longest);
  }

  // Work that a row takes, in keys read; preparing it counts as some.
  int64_t work(int64_t row) const { return rows.positions[row] + 16; }

  // Tasks are pairs of a row and a key head. Each thread has a run of them with its share of the
  // work. If rows share a sequence, later ones look back at keys that other threads store, so all
  // are stored first; then the tasks of one head follow each other, so that its keys stay in the
  // processor's cache.
  void run(Barrier& barrier, float* scratch) const {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads(), R = rows.count;
    int64_t total = 0;  // of one head
    for (int64_t row = 0; row < R; row++) total += work(row);
    const int64_t first = total * m.K * thread / team, last = total * m.K * (thread + 1) / team;
    int64_t done = 0;  // work before a task: the thread in whose range it begins has the task
    if (!rows.shared) {
      for (int64_t row = 0; row < R && done < last; row++)
        for (int64_t head = 0; head < m.K; head++, done += work(row))
          if (done >= first && done < last) {
            prepare(row, head, scratch);
            look_back(row, head, scratch);
          }
      return;
    }
    for (int64_t task = thread; task < R * m.K; task += team)
      prepare(task / m.K, task % m.K, scratch);
    barrier.wait();
    for (int64_t head = first / total; head < m.K && head * total < last; head++) {
      done = head * total;
      for (int64_t row = 0; row < R && done < last;) {
        // A row's result is the same in a tile and alone, so threads may cut them anywhere.
        const bool mine = done >= first;
        int64_t count = 0;  // rows of one sequence that are all of this thread, or of none
        do done += work(row + count++);
        while (count < TILE_ROWS && rows.follows(row, count) && done < last && mine == (done >= first));
        if (mine && count >= LEAST_ROWS && m.H % 16 == 0)
          look_back_tile(row, count, head, scratch);
        else if (mine)
          for (int64_t x = 0; x < count; x++) look_back(row + x, head, scratch);
        row += count;
      }
    }
  }
};

// The products of a layer, shared among threads.
struct LayerShares {
  Shares q, k, v, o, gate_up, down;

  LayerShares(const Layer& l, int64_t R, int64_t threads)
      : q(shares(l.q_proj, R, threads)),
        k(shares(l.k_proj, R, threads)),
        v(shares(l.v_proj, R, threads)),
        o(shares(l.o_proj, R, threads)),
        gate_up(shares(l.gate_proj, R, threads)),
        down(shares(l.down_proj, R, threads)) {}
};

template <class T>
void attention(const Model& m, int64_t layer, const Rows& rows, float* qkv, int64_t qkv_width,
               const Input& attended, Barrier& barrier, float* scratch) {
  Heads<T>{m, m.layers[layer], layer, rows, qkv, qkv_width, attended}.run(barrier, scratch);
}

}  // namespace

extern "C" {

// The sizes of the structures, which cpu_step.py compares with its own.
const int64_t* earlyfusion_abi() {
  static const int64_t sizes[] = {sizeof(Matrix), sizeof(Layer), sizeof(Model), sizeof(Choice)};
  return sizes;
}

// The column drawn for each of B choices; -1 where the logits are not finite.
void earlyfusion_draw(const Choice* choices, int64_t B, int64_t* drawn, int64_t threads) {
  int64_t widest = 0;
  for (int64_t b = 0; b < B; b++) widest = std::max(widest, choices[b].columns);
#pragma omp parallel num_threads(std::min(threads, B))
  {
    Aligned<float> z(widest + 15);
    Aligned<double> e(widest + 15);
#pragma omp for
    for (int64_t b = 0; b < B; b++) drawn[b] = drawn_column(choices[b], z.data(), e.data());
  }
}

// x_RD: embedded tokens in, states after the final norm out. Each row's token is stored at its
// position and sees all up to there, what other rows of this call store included.
void earlyfusion_step(const Model* model, int64_t R, float* x_RD, const int64_t* const* tables,
                      const int64_t* positions, int64_t shared, int64_t threads) {
  const Model& m = *model;
  const Rows rows{R, tables, positions, shared != 0, *std::max_element(positions, positions + R) + 1};
  const int64_t D = m.D, qkv_width = apart((m.N + 2 * m.K) * m.H), y_width = apart(D), inner_width = apart(m.F);
  const bool bf16 = reads_bf16(m.layers[0].q_proj);  // all matrices have one format
  Lease memory;
  const Input attended = memory.input(R, m.N * m.H, bf16), inner = memory.input(R, m.F, bf16);
  float *qkv = memory->of<float>(R * qkv_width), *y = memory->of<float>(R * y_width);
  float *gates = memory->of<float>(R * inner_width), *ups = memory->of<float>(R * inner_width);
  std::vector<LayerShares> shared_work;
  for (int64_t i = 0; i < m.layer_count; i++) shared_work.emplace_back(m.layers[i], R, threads);
  Barrier barrier;
  const auto attention_in_format = m.cache_format == FP32   ? attention<float>
                                   : m.cache_format == BF16 ? attention<uint16_t>
                                                            : attention<int8_t>;
#pragma omp parallel num_threads(threads)
  {
    // Each thread has its own x and computes the same norms and sums: that needs no barrier.
    Lease own;
    const Input in = own.input(R, D, bf16);
    float *x = own->of<float>(R * D), *norm_scratch = own->of<float>(D);
    float* scratch = own->of<float>(Heads<float>::scratch_size(m.H, rows.longest));
    std::memcpy(x, x_RD, R * D * sizeof(float));
    const auto before_branch = [&](const float* norm) {
      if (m.norm_after)
        copy_rounded(x, R, D, in);
      else
        norm_rounded(x, norm, R, D, m.eps, in);
    };
    const auto after_branch = [&](const float* norm) {
      add(x, y, y_width, m.norm_after ? norm : nullptr, R, D, m.eps, norm_scratch);
    };
    for (int64_t i = 0; i < m.layer_count; i++) {
      const Layer& l = m.layers[i];
      LayerShares& work = shared_work[i];
      before_branch(l.attention_norm);
      {
        const Operand operand(l.q_proj, in, R);
        float *k = qkv + m.N * m.H, *v = k + m.K * m.H;
        work.q.each([&](Range range) { operand.multiply(l.q_proj, range, qkv, qkv_width); });
        work.k.each([&](Range range) { operand.multiply(l.k_proj, range, k, qkv_width); });
        work.v.each([&](Range range) { operand.multiply(l.v_proj, range, v, qkv_width); });
      }
      barrier.wait();
      attention_in_format(m, i, rows, qkv, qkv_width, attended, barrier, scratch);
      barrier.wait();
      {
        const Operand operand(l.o_proj, attended, R);
        work.o.each([&](Range range) { operand.multiply(l.o_proj, range, y, y_width); });
      }
      barrier.wait();
      after_branch(l.attention_norm);

      before_branch(l.feed_forward_norm);
      {
        const Operand operand(l.gate_proj, in, R);
        work.gate_up.each([&](Range range) {
          operand.multiply(l.gate_proj, range, gates, inner_width);
          operand.multiply(l.up_proj, range, ups, inner_width);
          activate(gates, ups, inner_width, range, R, inner);
        });
      }
      barrier.wait();
      {
        const Operand operand(l.down_proj, inner, R);
        work.down.each([&](Range range) { operand.multiply(l.down_proj, range, y, y_width); });
      }
      barrier.wait();
      after_branch(l.feed_forward_norm);
    }
#pragma omp single nowait
    for (int64_t row = 0; row < R; row++)
      rms_norm(x + row * D, m.final_norm, D, m.eps, x_RD + row * D);
  }
}

// y[R, rows] = x[R, columns] . matrix
void earlyfusion_multiply(const Matrix* matrix, int64_t R, const float* x, int64_t columns,
                          float* y, int64_t threads) {
  Lease memory;
  const Input in = memory.input(R, columns, reads_bf16(*matrix));
  copy_rounded(x, R, columns, in);
  Shares work = shares(*matrix, R, threads);
#pragma omp parallel num_threads(threads)
  {
    const Operand operand(*matrix, in, R);
    work.each([&](Range range) { operand.multiply(*matrix, range, y, matrix->rows); });
  }
}
}
