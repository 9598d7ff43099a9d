// One decode step of the transformer on a CPU: every layer inside one parallel region.
//
// A step has R rows, one new token each, that share each read of the weights. Threads own ranges of
// weight rows; each keeps its own copy of the residual stream and of what a product reads, so that
// a layer needs five barriers: after the queries, the attention, its output, the gates and the end.
//
// Weights are fp32, bf16, int8 (one scale a row) or int4 (one bf16 scale for 32 columns). A table
// turns nibbles into bf16, so that int4 costs one shuffle more than bf16 and activations are not
// quantised. Columns are padded with zeros to a multiple of 64.
//
// Names: R rows, D width, N query heads, K key heads, H head width, F inner width.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));

enum Kind : int64_t { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };

struct Matrix {
  const void* data;
  const void* scales;
  int64_t rows, stride, kind;  // stride: padded columns
};

struct Layer {
  Matrix q, k_new, v_new, o, gate, up, down;
  const float *norm_1, *norm_2, *q_weight, *q_bias, *k_weight, *k_bias;
  void *k, *v;  // cached: [slots, K, places, H]
};

struct Model {
  int64_t layers, D, N, K, H, F, norm_after, cache_kind, places;
  float eps;
  const Layer* layer;
  const float *final_norm, *cos, *sin;  // cos, sin: [positions, H / 2]
};

// ---- vectors of sixteen

inline f16 load(const float* p) {
  f16 v;
  std::memcpy(&v, p, 64);
  return v;
}

inline void store(float* p, f16 v) { std::memcpy(p, &v, 64); }

inline float as_float(uint16_t v) {
  uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline uint16_t as_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline f16 load(const uint16_t* p) {
#if defined(__AVX512F__)
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return f16(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)));
#else
  f16 v;
  for (int i = 0; i < 16; i++) v[i] = as_float(p[i]);
  return v;
#endif
}

inline f16 load(const int8_t* p) {
#if defined(__AVX512F__)
  __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return f16(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)));
#else
  f16 v;
  for (int i = 0; i < 16; i++) v[i] = p[i];
  return v;
#endif
}

inline float sum(f16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(__m512(v));
#else
  float s = 0;
  for (int i = 0; i < 16; i++) s += v[i];
  return s;
#endif
}

// Sixteen vectors to the sixteen sums of their entries; pairs of vectors fold into one, four times.
inline f16 sums16(f16* v) {
  const i16 half_1 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const i16 half_2 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  const i16 half_3 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
  const i16 half_4 = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  auto fold = [](f16 a, f16 b, i16 half, int32_t step) {
    return __builtin_shuffle(a, b, half) + __builtin_shuffle(a, b, half + step);
  };
  for (int i = 0; i < 8; i++) v[i] = fold(v[2 * i], v[2 * i + 1], half_1, 8);
  for (int i = 0; i < 4; i++) v[i] = fold(v[2 * i], v[2 * i + 1], half_2, 4);
  for (int i = 0; i < 2; i++) v[i] = fold(v[2 * i], v[2 * i + 1], half_3, 2);
  return fold(v[0], v[1], half_4, 1);
}

inline f16 splat(float x) { return f16{} + x; }

// e^x to about one part in 10^7; x is clamped to the range of normal numbers.
inline f16 exp16(f16 x) {
  x = x < -87.0f ? splat(-87.0f) : x;
  x = x > 88.0f ? splat(88.0f) : x;
  f16 scaled = x * 1.44269504f;
  i16 whole = __builtin_convertvector(scaled + (scaled < 0.0f ? splat(-0.5f) : splat(0.5f)), i16);
  f16 n = __builtin_convertvector(whole, f16);
  f16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  f16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  i16 bits = (whole + 127) << 23;
  f16 power;
  std::memcpy(&power, &bits, 64);
  return p * power;
}

// ---- products: what a product reads, in both precisions, zero behind the last column

struct Input {
  float* full;
  uint16_t* half;
  int64_t stride;

  void put(int64_t row, int64_t column, float x) const {
    full[row * stride + column] = x;
    half[row * stride + column] = as_bf16(x);
  }
};

template <int X>
void dots4(const float* w, int64_t stride, const Input& in, int64_t row, float out[X][4]) {
  f16 acc[X][4] = {};
  for (int64_t c = 0; c < stride; c += 16)
    for (int r = 0; r < 4; r++) {
      f16 v = load(w + r * stride + c);
      for (int x = 0; x < X; x++) acc[x][r] += v * load(in.full + (row + x) * in.stride + c);
    }
  for (int x = 0; x < X; x++)
    for (int r = 0; r < 4; r++) out[x][r] = sum(acc[x][r]);
}

template <int X>
void dots4(const int8_t* w, const float* scale, int64_t stride, const Input& in, int64_t row,
           float out[X][4]) {
  f16 acc[X][4] = {};
  for (int64_t c = 0; c < stride; c += 16)
    for (int r = 0; r < 4; r++) {
      __builtin_prefetch(w + r * stride + c + 1024);
      f16 v = load(w + r * stride + c);
      for (int x = 0; x < X; x++) acc[x][r] += v * load(in.full + (row + x) * in.stride + c);
    }
  for (int x = 0; x < X; x++)
    for (int r = 0; r < 4; r++) out[x][r] = sum(acc[x][r]) * scale[r];
}

template <int X>
void dots4(const uint16_t* w, int64_t stride, const Input& in, int64_t row, float out[X][4]) {
#if defined(__AVX512BF16__)
  __m512 acc[X][4];
  for (int x = 0; x < X; x++)
    for (int r = 0; r < 4; r++) acc[x][r] = _mm512_setzero_ps();
  for (int64_t c = 0; c < stride; c += 32) {
    __m512bh given[X];
    for (int x = 0; x < X; x++)
      given[x] = (__m512bh)_mm512_loadu_si512(in.half + (row + x) * in.stride + c);
    for (int r = 0; r < 4; r++) {
      _mm_prefetch(reinterpret_cast<const char*>(w + r * stride + c) + 1024, _MM_HINT_T0);
      __m512bh v = (__m512bh)_mm512_loadu_si512(w + r * stride + c);
      for (int x = 0; x < X; x++) acc[x][r] = _mm512_dpbf16_ps(acc[x][r], v, given[x]);
    }
  }
  for (int x = 0; x < X; x++)
    for (int r = 0; r < 4; r++) out[x][r] = _mm512_reduce_add_ps(acc[x][r]);
#else
  f16 acc[X][4] = {};
  for (int64_t c = 0; c < stride; c += 16)
    for (int r = 0; r < 4; r++) {
      f16 v = load(w + r * stride + c);
      for (int x = 0; x < X; x++) acc[x][r] += v * load(in.half + (row + x) * in.stride + c);
    }
  for (int x = 0; x < X; x++)
    for (int r = 0; r < 4; r++) out[x][r] = sum(acc[x][r]);
#endif
}

// int4: 32 bytes hold 64 columns, the first 32 in the low nibbles; two bf16 scales follow suit.
template <int X>
void dots4(const uint8_t* w, const uint16_t* scales, int64_t stride, const Input& in, int64_t row,
           float out[X][4]) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  alignas(64) uint16_t levels[32];
  for (int i = 0; i < 32; i++) levels[i] = as_bf16(float(i % 16 - 8));
  const __m512i table = _mm512_load_si512(levels), nibble = _mm512_set1_epi16(15);
  __m512 acc[X][4];
  for (int x = 0; x < X; x++)
    for (int r = 0; r < 4; r++) acc[x][r] = _mm512_setzero_ps();
  for (int64_t c = 0; c < stride; c += 64) {
    __m512bh low[X], high[X];
    for (int x = 0; x < X; x++) {
      low[x] = (__m512bh)_mm512_loadu_si512(in.half + (row + x) * in.stride + c);
      high[x] = (__m512bh)_mm512_loadu_si512(in.half + (row + x) * in.stride + c + 32);
    }
    for (int r = 0; r < 4; r++) {
      const uint8_t* at = w + (r * stride + c) / 2;
      _mm_prefetch(reinterpret_cast<const char*>(at) + 512, _MM_HINT_T0);
      __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)at));
      __m512bh first =
          (__m512bh)_mm512_permutexvar_epi16(_mm512_and_si512(bytes, nibble), table);
      __m512bh second = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
      uint32_t pair;
      std::memcpy(&pair, scales + (r * stride + c) / 32, 4);
      __m512 scale_1 = _mm512_castsi512_ps(_mm512_set1_epi32(int32_t(pair << 16)));
      __m512 scale_2 = _mm512_castsi512_ps(_mm512_set1_epi32(int32_t(pair & 0xffff0000u)));
      const __m512 none = _mm512_setzero_ps();
      for (int x = 0; x < X; x++) {
        acc[x][r] = _mm512_fmadd_ps(_mm512_dpbf16_ps(none, first, low[x]), scale_1, acc[x][r]);
        acc[x][r] = _mm512_fmadd_ps(_mm512_dpbf16_ps(none, second, high[x]), scale_2, acc[x][r]);
      }
    }
  }
  for (int x = 0; x < X; x++)
    for (int r = 0; r < 4; r++) out[x][r] = _mm512_reduce_add_ps(acc[x][r]);
#else
  for (int x = 0; x < X; x++)
    for (int r = 0; r < 4; r++) {
      float total = 0;
      for (int64_t c = 0; c < stride; c += 32) {
        const uint8_t* at = w + (r * stride + c / 64 * 64) / 2;
        const uint16_t* given = in.half + (row + x) * in.stride + c;
        float part = 0;
        for (int j = 0; j < 32; j++) {
          int level = c % 64 ? at[j] >> 4 : at[j] & 15;
          part += float(level - 8) * as_float(given[j]);
        }
        total += part * as_float(scales[(r * stride + c) / 32]);
      }
      out[x][r] = total;
    }
#endif
}

template <int X>
void four_rows(const Matrix& m, int64_t first, const Input& in, int64_t row, float out[X][4]) {
  const int64_t at = first * m.stride;
  switch (m.kind) {
    case FP32:
      return dots4<X>(static_cast<const float*>(m.data) + at, m.stride, in, row, out);
    case BF16:
      return dots4<X>(static_cast<const uint16_t*>(m.data) + at, m.stride, in, row, out);
    case INT8:
      return dots4<X>(static_cast<const int8_t*>(m.data) + at,
                      static_cast<const float*>(m.scales) + first, m.stride, in, row, out);
    default:
      return dots4<X>(static_cast<const uint8_t*>(m.data) + at / 2,
                      static_cast<const uint16_t*>(m.scales) + at / 32, m.stride, in, row, out);
  }
}

template <int X>
void put_four(const Matrix& m, int64_t first, const Input& in, int64_t row, float* y,
              int64_t y_stride) {
  float out[X][4];
  four_rows<X>(m, first, in, row, out);
  for (int x = 0; x < X; x++) std::memcpy(y + (row + x) * y_stride + first, out[x], 16);
}

struct Range {
  int64_t first, last;
};

// This thread's share of the rows, in fours; matrices have a multiple of four rows.
Range share(int64_t rows) {
  const int64_t fours = rows / 4, thread = omp_get_thread_num(), threads = omp_get_num_threads();
  return {fours * thread / threads * 4, fours * (thread + 1) / threads * 4};
}

// y[row, n] = in[row] . m[n] for all rows and the n of this thread.
Range multiply(const Matrix& m, const Input& in, int64_t R, float* y, int64_t y_stride) {
  const Range mine = share(m.rows);
  for (int64_t n = mine.first; n < mine.last; n += 4) {
    int64_t row = 0;
    for (; row + 4 <= R; row += 4) put_four<4>(m, n, in, row, y, y_stride);
    if (R - row == 3) put_four<3>(m, n, in, row, y, y_stride);
    if (R - row == 2) put_four<2>(m, n, in, row, y, y_stride);
    if (R - row == 1) put_four<1>(m, n, in, row, y, y_stride);
  }
  return mine;
}

// Threads meet here. OpenMP's own barrier spins on, which costs whole time slices where a thread has
// to share its core with another process; this one lets the other go first after a while.
class Meeting {
 public:
  void wait() {
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

// ---- the parts of a layer

void rms_norm(const float* x, const float* weight, int64_t n, float eps, float* y) {
  double squares = 0;
  for (int64_t i = 0; i < n; i++) squares += double(x[i]) * x[i];
  const float scale = 1.0f / std::sqrt(float(squares / n) + eps);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

void normed(const float* x, const float* weight, int64_t R, int64_t D, float eps, const Input& in) {
  for (int64_t row = 0; row < R; row++) {
    float* y = in.full + row * in.stride;
    if (weight)
      rms_norm(x + row * D, weight, D, eps, y);
    else
      std::memcpy(y, x + row * D, D * sizeof(float));
    for (int64_t i = 0; i < D; i++) in.half[row * in.stride + i] = as_bf16(y[i]);
  }
}

// x += y, or x += norm(y) where the norms stand behind the branches
void add(float* x, const float* y, const float* weight, int64_t R, int64_t D, float eps,
         float* scratch) {
  for (int64_t row = 0; row < R; row++) {
    const float* branch = y + row * D;
    if (weight) {
      rms_norm(branch, weight, D, eps, scratch);
      branch = scratch;
    }
    for (int64_t i = 0; i < D; i++) x[row * D + i] += branch[i];
  }
}

void head_norm_and_turn(const float* x, const float* weight, const float* bias, const float* cos,
                        const float* sin, int64_t H, float* y) {
  float mean = 0, square = 0;
  for (int64_t i = 0; i < H; i++) mean += x[i];
  mean /= H;
  for (int64_t i = 0; i < H; i++) square += (x[i] - mean) * (x[i] - mean);
  const float scale = 1.0f / std::sqrt(square / H + 1e-5f);
  const int64_t half = H / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = (x[i] - mean) * scale * weight[i] + bias[i];
    const float b = (x[i + half] - mean) * scale * weight[i + half] + bias[i + half];
    y[i] = a * cos[i] - b * sin[i];
    y[i + half] = b * cos[i] + a * sin[i];
  }
}

inline void keep(float* at, const float* x, int64_t n) { std::memcpy(at, x, n * sizeof(float)); }
inline void keep(uint16_t* at, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) at[i] = as_bf16(x[i]);
}

inline float value(float x) { return x; }
inline float value(uint16_t x) { return as_float(x); }

template <class T>
float dot(const float* q, const T* k, int64_t H) {
  f16 total = {};
  int64_t i = 0;
  for (; i + 16 <= H; i += 16) total += load(q + i) * load(k + i);
  float s = sum(total);
  for (; i < H; i++) s += q[i] * value(k[i]);
  return s;
}

// One query and the keys of sixteen places that follow each other.
template <class T>
f16 dots16(const float* q, const T* k, int64_t H) {
  f16 products[16] = {};
  for (int64_t i = 0; i < H; i += 16) {
    const f16 here = load(q + i);
    for (int p = 0; p < 16; p++) products[p] += here * load(k + p * H + i);
  }
  return sums16(products);
}

// out = sum over places of weight * v, a few vectors of the head at a time
template <class T>
void blend(const float* weights, const T* v, int64_t places, int64_t H, float* out) {
  int64_t i = 0;
  for (; i + 64 <= H; i += 64) {
    f16 acc[4] = {};
    for (int64_t p = 0; p < places; p++)
      for (int j = 0; j < 4; j++) acc[j] += weights[p] * load(v + p * H + i + 16 * j);
    for (int j = 0; j < 4; j++) store(out + i + 16 * j, acc[j]);
  }
  for (; i < H; i++) {
    float total = 0;
    for (int64_t p = 0; p < places; p++) total += weights[p] * value(v[p * H + i]);
    out[i] = total;
  }
}

// scores -> e^(score - max); returns their sum. The buffer is padded to sixteens.
float soften(float* scores, int64_t n) {
  float top = scores[0];
  for (int64_t i = 1; i < n; i++) top = scores[i] > top ? scores[i] : top;
  for (int64_t i = n; i % 16; i++) scores[i] = -INFINITY;
  f16 total = {};
  for (int64_t i = 0; i < n; i += 16) {
    f16 e = exp16(load(scores + i) - top);
    for (int64_t j = n - i; j < 16; j++) e[j] = 0;
    store(scores + i, e);
    total += e;
  }
  return sum(total);
}

// One key head of one row: its queries against the places so far, the new token among them.
template <class T>
void attend(const Model& m, const T* k, const T* v, int64_t places, const float* q, float* scores,
            float* out, const Input& in, int64_t row, int64_t column) {
  const float scale = 1.0f / std::sqrt(float(m.H));
  for (int64_t g = 0; g < m.N / m.K; g++) {
    int64_t p = 0;
    for (; m.H % 16 == 0 && p + 16 <= places; p += 16)
      store(scores + p, dots16(q + g * m.H, k + p * m.H, m.H) * scale);
    for (; p < places; p++) scores[p] = dot(q + g * m.H, k + p * m.H, m.H) * scale;
    const float total = soften(scores, places);
    blend(scores, v, places, m.H, out);
    for (int64_t i = 0; i < m.H; i++) in.put(row, column + g * m.H + i, out[i] / total);
  }
}

// silu(gate) * up, for the columns of one thread
void activate(const float* gates, const float* ups, Range mine, const Input& inner, int64_t row) {
  for (int64_t n = mine.first; n < mine.last; n += 16) {
    const int64_t count = std::min<int64_t>(16, mine.last - n);
    f16 gate = {}, up = {};
    std::memcpy(&gate, gates + n, count * sizeof(float));
    std::memcpy(&up, ups + n, count * sizeof(float));
    const f16 out = gate / (1.0f + exp16(-gate)) * up;
    for (int64_t i = 0; i < count; i++) inner.put(row, n + i, out[i]);
  }
}

struct Step {
  const Model& model;
  const int64_t *slots, *lengths;

  template <class T>
  void heads(int64_t layer, int64_t row, int64_t head, const float* qkv, float* scratch,
             const Input& attended) const {
    const Model& m = model;
    const Layer& l = m.layer[layer];
    const int64_t H = m.H, group = m.N / m.K, length = lengths[row];
    const int64_t at = (slots[row] * m.K + head) * m.places * H;
    T* k = static_cast<T*>(l.k) + at;
    T* v = static_cast<T*>(l.v) + at;
    const float *cos = m.cos + length * (H / 2), *sin = m.sin + length * (H / 2);
    float *q = scratch, *turned = q + group * H, *out = turned + H, *scores = out + H;
    for (int64_t g = 0; g < group; g++) {
      const int64_t n = (head * group + g) * H;
      head_norm_and_turn(qkv + n, l.q_weight + n, l.q_bias + n, cos, sin, H, q + g * H);
    }
    const float* new_k = qkv + (m.N + head) * H;
    const float* new_v = qkv + (m.N + m.K + head) * H;
    head_norm_and_turn(new_k, l.k_weight + head * H, l.k_bias + head * H, cos, sin, H, turned);
    keep(k + length * H, turned, H);
    keep(v + length * H, new_v, H);
    attend(m, k, v, length + 1, q, scores, out, attended, row, head * group * H);
  }
};

int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

struct Buffers {
  std::vector<float> full;
  std::vector<uint16_t> half;
  int64_t stride;

  Buffers(int64_t R, int64_t columns)
      : full(R * padded(columns)), half(R * padded(columns)), stride(padded(columns)) {}
  Input input() { return {full.data(), half.data(), stride}; }
};

}  // namespace

extern "C" {

// x_RD: embedded tokens in, states behind the last norm out. Each row's token goes to place
// lengths[row] of its slot.
void earlyfusion_step(const Model* model, int64_t R, float* x_RD, const int64_t* slots,
                      const int64_t* lengths, int64_t threads) {
  const Model& m = *model;
  const Step step{m, slots, lengths};
  const int64_t D = m.D, qkv_width = (m.N + 2 * m.K) * m.H;
  int64_t longest = 0;
  for (int64_t row = 0; row < R; row++) longest = std::max(longest, lengths[row] + 1);
  Buffers attended_buffer(R, m.N * m.H), inner_buffer(R, m.F);
  const Input attended = attended_buffer.input(), inner = inner_buffer.input();
  std::vector<float> qkv(R * qkv_width), gates(R * m.F), ups(R * m.F), y(R * D);
  Meeting meeting;
#pragma omp parallel num_threads(threads)
  {
    Buffers own(R, D);
    const Input in = own.input();
    std::vector<float> x(x_RD, x_RD + R * D), norm_scratch(D);
    std::vector<float> scratch((m.N / m.K + 2) * m.H + padded(longest));
    for (int64_t i = 0; i < m.layers; i++) {
      const Layer& l = m.layer[i];
      const float* before_1 = m.norm_after ? nullptr : l.norm_1;
      const float* before_2 = m.norm_after ? nullptr : l.norm_2;
      const float* after_1 = m.norm_after ? l.norm_1 : nullptr;
      const float* after_2 = m.norm_after ? l.norm_2 : nullptr;

      normed(x.data(), before_1, R, D, m.eps, in);
      multiply(l.q, in, R, qkv.data(), qkv_width);
      multiply(l.k_new, in, R, qkv.data() + m.N * m.H, qkv_width);
      multiply(l.v_new, in, R, qkv.data() + (m.N + m.K) * m.H, qkv_width);
      meeting.wait();
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      for (int64_t task = thread; task < R * m.K; task += team) {
        const int64_t row = task / m.K, head = task % m.K;
        const float* given = qkv.data() + row * qkv_width;
        if (m.cache_kind == FP32)
          step.heads<float>(i, row, head, given, scratch.data(), attended);
        else
          step.heads<uint16_t>(i, row, head, given, scratch.data(), attended);
      }
      meeting.wait();
      multiply(l.o, attended, R, y.data(), D);
      meeting.wait();
      add(x.data(), y.data(), after_1, R, D, m.eps, norm_scratch.data());
      normed(x.data(), before_2, R, D, m.eps, in);
      const Range mine = multiply(l.gate, in, R, gates.data(), m.F);
      multiply(l.up, in, R, ups.data(), m.F);  // the same rows of this thread
      for (int64_t row = 0; row < R; row++)
        activate(gates.data() + row * m.F, ups.data() + row * m.F, mine, inner, row);
      meeting.wait();
      multiply(l.down, inner, R, y.data(), D);
      meeting.wait();
      add(x.data(), y.data(), after_2, R, D, m.eps, norm_scratch.data());
    }
#pragma omp single nowait
    for (int64_t row = 0; row < R; row++)
      rms_norm(x.data() + row * D, m.final_norm, D, m.eps, x_RD + row * D);
  }
}

// y[R, rows] = x[R, columns] . matrix
void earlyfusion_multiply(const Matrix* matrix, int64_t R, const float* x, int64_t columns,
                          float* y, int64_t threads) {
  Buffers own(R, columns);
  const Input in = own.input();
  normed(x, nullptr, R, columns, 0, in);
#pragma omp parallel num_threads(threads)
  multiply(*matrix, in, R, y, matrix->rows);
}
}
