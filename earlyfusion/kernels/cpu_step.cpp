// One step of the transformer on a CPU: every layer inside one parallel region.
//
// A step has R rows, one new token each, that share each read of the weights; those of a prompt
// stand in one slot, at places that follow each other. Threads own ranges of weight rows; each keeps
// its own copy of the residual stream and of what a product reads, so that a layer needs five
// barriers: after the queries, the attention, its output, the gates and the end (a sixth with rows
// that share a slot).
//
// What a row comes to, to the bit, follows from its token, its place and what its slot holds before
// it: not from the rows beside it, from how a prompt was cut, or from the number of threads. For
// this every sum is added up in one order, and every function that rounds has one instance or says
// how it rounds.
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
#include <new>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define VECTORS_OF_EIGHT  // sixteen registers of eight floats, so vectors of sixteen are two
#endif

namespace {

typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));

enum Kind : int64_t { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };  // of weights and of the cache

struct Matrix {
  const void* data;
  const void* scales;
  int64_t rows, stride, kind;  // stride: padded columns
};

struct Layer {
  Matrix q, k_new, v_new, o, gate, up, down;
  const float *norm_1, *norm_2, *q_weight, *q_bias, *k_weight, *k_bias;
  void *k, *v;                // cached: [slots, K, places, H]
  float *k_scales, *v_scales;  // of an int8 cache: [slots, K, places]
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

// N vectors, at most sixteen, to the sums of their entries, the first in the first place and so on;
// pairs of vectors fold into one, four times.
template <int N>
inline __attribute__((always_inline)) f16 sums(f16* v) {
  const i16 half_1 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  const i16 half_2 = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  const i16 half_3 = {0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29};
  const i16 half_4 = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const f16 none = {};
  auto fold = [&](int i, int n, i16 half, int32_t step) __attribute__((always_inline)) {
    if (2 * i >= n) return;
    const f16 a = v[2 * i], b = 2 * i + 1 < n ? v[2 * i + 1] : none;
    v[i] = __builtin_shuffle(a, b, half) + __builtin_shuffle(a, b, half + step);
  };
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) fold(i, N, half_1, 8);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) fold(i, (N + 1) / 2, half_2, 4);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) fold(i, (N + 3) / 4, half_3, 2);
  fold(0, (N + 7) / 8, half_4, 1);
  return v[0];
}

// In the order of `sums`, so that one vector comes to the same alone and among others.
inline float sum(f16 v) { return sums<1>(&v)[0]; }

inline f16 splat(float x) { return f16{} + x; }

// a * b + c, rounded once. Left to the compiler, it may be rounded twice in one instance of a
// template and once in another, and then rows would differ with how many stand beside them.
inline f16 fused(f16 a, f16 b, f16 c) {
#if defined(__AVX512F__)
  return f16(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#else
  return a * b + c;
#endif
}

// How far ahead of a row of weights to fetch: the same place of the next four rows where rows are
// too short for the processor to follow them by itself, else `bytes` further on.
inline int64_t ahead(int64_t row_bytes, int64_t bytes) {
  return row_bytes <= 4096 ? 4 * row_bytes : bytes;
}

inline void fetch(const void* at, int64_t distance) {
  __builtin_prefetch(static_cast<const char*>(at) + distance);
}

#if defined(VECTORS_OF_EIGHT)
inline __m256 eight(const float* p) { return _mm256_loadu_ps(p); }

inline __m256 eight(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

inline __m256 eight(const int8_t* p) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
}

// Four vectors of sixteen to the sums of their entries, added up in the order of `sums`.
inline __m128 four_sums(const __m256* low, const __m256* high) {
  __m128 t[4];
  for (int r = 0; r < 4; r++) {
    const __m256 v = _mm256_add_ps(low[r], high[r]);
    t[r] = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  }
  _MM_TRANSPOSE4_PS(t[0], t[1], t[2], t[3]);
  return _mm_add_ps(_mm_add_ps(t[0], t[2]), _mm_add_ps(t[1], t[3]));
}

// What `dots4` below gives: X rows of input and four rows of weights. Vectors of sixteen are summed
// in halves, one after the other in a block of columns, where both do not fit into the registers.
template <int X, class W, class A>
inline f16 eights(const W* w, int64_t stride, const A* given, int64_t given_stride,
                  int64_t distance) {
  const int64_t block = 512;
  const int together = X == 1 ? 2 : 1;
  __m256 acc[X][2][4];
  for (int i = 0; i < X; i++)
    for (int r = 0; r < 4; r++) acc[i][0][r] = acc[i][1][r] = _mm256_setzero_ps();
  for (int64_t first = 0; first < stride; first += block) {
    const int64_t last = std::min(stride, first + block);
    for (int half = 0; half < 2; half += together) {
      __m256 a[X][together][4];
      for (int i = 0; i < X; i++)
        for (int h = 0; h < together; h++)
          for (int r = 0; r < 4; r++) a[i][h][r] = acc[i][half + h][r];
      for (int64_t c = first + 8 * half; c < last; c += 16)
#pragma GCC unroll 2
        for (int h = 0; h < together; h++) {
          __m256 x[X];
#pragma GCC unroll 4
          for (int i = 0; i < X; i++) x[i] = eight(given + i * given_stride + c + 8 * h);
#pragma GCC unroll 4
          for (int r = 0; r < 4; r++) {
            if (distance) fetch(w + r * stride + c, distance);
            const __m256 v = eight(w + r * stride + c + 8 * h);
#pragma GCC unroll 4
            for (int i = 0; i < X; i++) a[i][h][r] = _mm256_fmadd_ps(v, x[i], a[i][h][r]);
          }
        }
      for (int i = 0; i < X; i++)
        for (int h = 0; h < together; h++)
          for (int r = 0; r < 4; r++) acc[i][half + h][r] = a[i][h][r];
    }
  }
  float out[16] = {};
  for (int i = 0; i < X; i++) _mm_storeu_ps(out + 4 * i, four_sums(acc[i][0], acc[i][1]));
  return load(out);
}
#endif

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

// Vectors that start at a line of the processor's cache, so that no read of sixteen takes two.
template <class T>
struct Lines {
  typedef T value_type;
  Lines() = default;
  template <class U>
  Lines(const Lines<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  template <class U>
  bool operator==(const Lines<U>&) const { return true; }
  template <class U>
  bool operator!=(const Lines<U>&) const { return false; }
};

typedef std::vector<float, Lines<float>> Floats;

// ---- products: what a product reads, in both precisions, zero behind the last column

struct Input {
  float* full;
  uint16_t* half;  // only where the products of this model read it
  int64_t stride;

  void put(int64_t row, int64_t column, const float* x, int64_t n) const {
    std::memcpy(full + row * stride + column, x, n * sizeof(float));
    if (half) round(half + row * stride + column, x, n);
  }

  static void round(uint16_t* __restrict y, const float* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = as_bf16(x[i]);
  }
};

// Keeps a vector in its register: compilers read it from memory again for each use, and reading is
// what these loops have too little time for. With one row, X = 1, there is one use, and reading it
// is part of the product.
template <int X>
inline void hold(f16& v) {
#if defined(__AVX512F__)
  if (X > 1) asm("" : "+v"(v));
#endif
}

// Products of X rows of input and four rows of weights: each vector of weights feeds X sums. The
// sums of row x stand at 4 * x of what is given back. Each is added up over the columns in the same
// order whatever X is: what a row comes to does not depend on the rows beside it.
template <int X, class W, class A>
f16 plain4(const W* w, int64_t stride, const A* given, int64_t given_stride, int64_t distance) {
#if defined(VECTORS_OF_EIGHT)
  return eights<X>(w, stride, given, given_stride, distance);
#else
  f16 acc[4 * X] = {};
  for (int64_t c = 0; c < stride; c += 16) {
    f16 x[X];
    for (int i = 0; i < X; i++) hold<X>(x[i] = load(given + i * given_stride + c));
    for (int r = 0; r < 4; r++) {
      if (distance) fetch(w + r * stride + c, distance);
      f16 v = load(w + r * stride + c);
      hold<X>(v);
      for (int i = 0; i < X; i++) acc[4 * i + r] = fused(v, x[i], acc[4 * i + r]);
    }
  }
  return sums<4 * X>(acc);
#endif
}

template <int X>
f16 dots4(const float* w, int64_t stride, const Input& in, int64_t row) {
  const int64_t distance = X > 1 ? ahead(4 * stride, 1024) : 0;
  return plain4<X>(w, stride, in.full + row * in.stride, in.stride, distance);
}

template <int X>
f16 dots4(const int8_t* w, const float* scale, int64_t stride, const Input& in, int64_t row) {
  const float* given = in.full + row * in.stride;
  f16 scales;
  for (int i = 0; i < 16; i++) scales[i] = scale[i % 4];
  return plain4<X>(w, stride, given, in.stride, ahead(stride, 1024)) * scales;
}

// Thirty-two bf16, of which sixteen pairs are multiplied at once.
inline f16 pairs(const uint16_t* p) {
  f16 v;
  std::memcpy(&v, p, 64);
  return v;
}

template <int X>
f16 dots4(const uint16_t* w, int64_t stride, const Input& in, int64_t row) {
  const int64_t distance = ahead(2 * stride, 1024);
  const uint16_t* given = in.half + row * in.stride;
#if defined(__AVX512BF16__)
  f16 acc[4 * X] = {};
  for (int64_t c = 0; c < stride; c += 32) {
    f16 x[X];
    for (int i = 0; i < X; i++) hold<X>(x[i] = pairs(given + i * in.stride + c));
    for (int r = 0; r < 4; r++) {
      fetch(w + r * stride + c, distance);
      f16 v = pairs(w + r * stride + c);
      hold<X>(v);
      for (int i = 0; i < X; i++)
        acc[4 * i + r] = f16(_mm512_dpbf16_ps(__m512(acc[4 * i + r]), __m512bh(v), __m512bh(x[i])));
    }
  }
  return sums<4 * X>(acc);
#else
  return plain4<X>(w, stride, given, in.stride, distance);
#endif
}

// int4: 32 bytes hold 64 columns, the first 32 in the low nibbles; two bf16 scales follow suit.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
template <int X>
f16 dots4(const uint8_t* w, const uint16_t* scales, int64_t stride, const Input& in, int64_t row) {
  alignas(64) uint16_t levels[32];
  for (int i = 0; i < 32; i++) levels[i] = as_bf16(float(i % 16 - 8));
  const __m512i table = _mm512_load_si512(levels), nibble = _mm512_set1_epi16(15);
  const __m512 none = _mm512_setzero_ps();
  f16 acc[4 * X] = {};
  const int64_t distance = ahead(stride / 2, 512);
  for (int64_t c = 0; c < stride; c += 64) {
    __m512bh low[X], high[X];
    for (int x = 0; x < X; x++) {
      low[x] = (__m512bh)_mm512_loadu_si512(in.half + (row + x) * in.stride + c);
      high[x] = (__m512bh)_mm512_loadu_si512(in.half + (row + x) * in.stride + c + 32);
    }
    for (int r = 0; r < 4; r++) {
      const uint8_t* at = w + (r * stride + c) / 2;
      fetch(at, distance);
      __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)at));
      __m512bh first =
          (__m512bh)_mm512_permutexvar_epi16(_mm512_and_si512(bytes, nibble), table);
      __m512bh second = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table);
      uint32_t pair;
      std::memcpy(&pair, scales + (r * stride + c) / 32, 4);
      __m512 scale_1 = _mm512_castsi512_ps(_mm512_set1_epi32(int32_t(pair << 16)));
      __m512 scale_2 = _mm512_castsi512_ps(_mm512_set1_epi32(int32_t(pair & 0xffff0000u)));
      for (int x = 0; x < X; x++) {
        __m512 total = __m512(acc[4 * x + r]);
        total = _mm512_fmadd_ps(_mm512_dpbf16_ps(none, first, low[x]), scale_1, total);
        total = _mm512_fmadd_ps(_mm512_dpbf16_ps(none, second, high[x]), scale_2, total);
        acc[4 * x + r] = f16(total);
      }
    }
  }
  return sums<4 * X>(acc);
}
const bool UNPACKS_INT4 = false;
#else
// Other processors unpack four rows first; a level times its scale is a float without rounding.
template <int X>
f16 dots4(const uint8_t*, const uint16_t*, int64_t, const Input&, int64_t) { return f16{}; }
const bool UNPACKS_INT4 = true;
#endif

void unpack_int4(const uint8_t* w, const uint16_t* scales, int64_t n, float* __restrict out) {
  for (int64_t c = 0; c < n; c += 64) {
    const float scale_1 = as_float(scales[c / 32]), scale_2 = as_float(scales[c / 32 + 1]);
    const uint8_t* at = w + c / 2;
    for (int i = 0; i < 32; i++) out[c + i] = float(int(at[i] & 15) - 8) * scale_1;
    for (int i = 0; i < 32; i++) out[c + 32 + i] = float(int(at[i] >> 4) - 8) * scale_2;
  }
}

// `unpacked` are the four rows of an int4 matrix as floats, where they were unpacked.
template <int X>
f16 four_rows(const Matrix& m, int64_t first, const Input& in, int64_t row, const float* unpacked) {
  const int64_t at = first * m.stride;
  if (unpacked) return plain4<X>(unpacked, m.stride, in.half + row * in.stride, in.stride, 0);
  switch (m.kind) {
    case FP32:
      return dots4<X>(static_cast<const float*>(m.data) + at, m.stride, in, row);
    case BF16:
      return dots4<X>(static_cast<const uint16_t*>(m.data) + at, m.stride, in, row);
    case INT8:
      return dots4<X>(static_cast<const int8_t*>(m.data) + at,
                      static_cast<const float*>(m.scales) + first, m.stride, in, row);
    default:
      return dots4<X>(static_cast<const uint8_t*>(m.data) + at / 2,
                      static_cast<const uint16_t*>(m.scales) + at / 32, m.stride, in, row);
  }
}

template <int X>
void put_four(const Matrix& m, int64_t first, const Input& in, int64_t row, const float* unpacked,
              float* y, int64_t y_stride) {
  float out[16];
  store(out, four_rows<X>(m, first, in, row, unpacked));
  for (int x = 0; x < X; x++) std::memcpy(y + (row + x) * y_stride + first, out + 4 * x, 16);
}

struct Range {
  int64_t first, last;
};

// This thread's share of the rows, in fours; matrices have a multiple of four rows.
Range share(int64_t rows) {
  const int64_t fours = rows / 4, thread = omp_get_thread_num(), threads = omp_get_num_threads();
  return {fours * thread / threads * 4, fours * (thread + 1) / threads * 4};
}

#if defined(VECTORS_OF_EIGHT)
const int64_t TILE = 3;  // rows of input whose sums fit into the registers
#else
const int64_t TILE = 4;
#endif

// Columns first to first + 4 of y, for the tile of rows from `row` on.
void put_tile(const Matrix& m, int64_t first, const Input& in, int64_t row, int64_t R,
              const float* unpacked, float* y, int64_t y_stride) {
  switch (std::min(TILE, R - row)) {
    case 1: return put_four<1>(m, first, in, row, unpacked, y, y_stride);
    case 2: return put_four<2>(m, first, in, row, unpacked, y, y_stride);
    case 3: return put_four<3>(m, first, in, row, unpacked, y, y_stride);
    default: return put_four<4>(m, first, in, row, unpacked, y, y_stride);
  }
}

// How many rows of weights the rows of input pass at a time: four while their inputs stay in the
// first cache, else as many as half of the second cache holds, so that inputs are read less often.
int64_t panel(const Matrix& m, int64_t R) {
  const int64_t bits[] = {32, 16, 8, 4}, row_bytes = m.stride * bits[m.kind] / 8;
  const bool unpacks = m.kind == INT4 && UNPACKS_INT4;
  return R <= 16 || unpacks ? 4 : std::max<int64_t>(4, (int64_t(1) << 17) / row_bytes / 4 * 4);
}

// y[row, n] = in[row] . m[n] for all rows and the n of this thread.
Range multiply(const Matrix& m, const Input& in, int64_t R, float* y, int64_t y_stride) {
  const Range mine = share(m.rows);
  const int64_t width = panel(m, R);
  const bool unpacks = m.kind == INT4 && UNPACKS_INT4;
  Floats unpacked(unpacks ? 4 * m.stride : 0);
  for (int64_t first = mine.first; first < mine.last; first += width) {
    const int64_t last = std::min(first + width, mine.last), at = first * m.stride;
    if (unpacks)
      unpack_int4(static_cast<const uint8_t*>(m.data) + at / 2,
                  static_cast<const uint16_t*>(m.scales) + at / 32, 4 * m.stride, unpacked.data());
    for (int64_t row = 0; row < R; row += TILE)
      for (int64_t n = first; n < last; n += 4)
        put_tile(m, n, in, row, R, unpacks ? unpacked.data() : nullptr, y, y_stride);
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

// Inlined in two places, a function may be rounded in two ways (see `fused`).
#define ONE_COPY __attribute__((noinline))

// The sum of (x - mean)^2.
float squares(const float* x, int64_t n, float mean) {
  f16 total = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const f16 off = load(x + i) - mean;
    total += off * off;
  }
  float s = sum(total);
  for (; i < n; i++) s += (x[i] - mean) * (x[i] - mean);
  return s;
}

ONE_COPY void rms_norm(const float* __restrict x, const float* __restrict weight, int64_t n, float eps,
              float* __restrict y) {
  const float scale = 1.0f / std::sqrt(squares(x, n, 0) / n + eps);
  for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

void normed(const float* x, const float* weight, int64_t R, int64_t D, float eps, const Input& in) {
  for (int64_t row = 0; row < R; row++) {
    float* y = in.full + row * in.stride;
    if (weight)
      rms_norm(x + row * D, weight, D, eps, y);
    else
      std::memcpy(y, x + row * D, D * sizeof(float));
    if (in.half) Input::round(in.half + row * in.stride, y, D);
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

float total(const float* x, int64_t n) {
  f16 parts = {};
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) parts += load(x + i);
  float s = sum(parts);
  for (; i < n; i++) s += x[i];
  return s;
}

ONE_COPY void head_norm_and_turn(const float* x, const float* weight, const float* bias, const float* cos,
                        const float* sin, int64_t H, float* __restrict y) {
  const float mean = total(x, H) / H, scale = 1.0f / std::sqrt(squares(x, H, mean) / H + 1e-5f);
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

// Rounds to int8; gives back the scale.
inline float keep(int8_t* at, const float* x, int64_t n) {
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
  f16 total = {};
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

// One query and the keys of sixteen places that follow each other.
template <class T>
f16 dots16(const float* q, const T* k, int64_t H) {
  for (int64_t i = 0; i < 16 * H; i += 64 / sizeof(T)) fetch(k + i, 16 * H * sizeof(T));
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
  f16 products[16] = {};
  for (int64_t i = 0; i < H; i += 16) {
    const f16 here = load(q + i);
    for (int p = 0; p < 16; p++) products[p] = fused(here, load(k + p * H + i), products[p]);
  }
  return sums<16>(products);
#endif
}

// out = sum over places of weight * v, for W vectors of the head.
template <int W, class T>
void blend(const float* weights, const T* v, int64_t places, int64_t H, float* out) {
#if defined(VECTORS_OF_EIGHT)
  __m256 acc[2 * W] = {};
  for (int64_t p = 0; p < places; p++) {
    const __m256 weight = _mm256_broadcast_ss(weights + p);
    for (size_t i = 0; i < 16 * W; i += 64 / sizeof(T)) fetch(v + p * H + i, 4096);
#pragma GCC unroll 16
    for (int j = 0; j < 2 * W; j++)
      acc[j] = _mm256_fmadd_ps(weight, eight(v + p * H + 8 * j), acc[j]);
  }
#pragma GCC unroll 16
  for (int j = 0; j < 2 * W; j++) _mm256_storeu_ps(out + 8 * j, acc[j]);
#else
  f16 acc[W] = {};
  for (int64_t p = 0; p < places; p++) {
    for (size_t i = 0; i < 16 * W; i += 64 / sizeof(T)) fetch(v + p * H + i, 4096);
    for (int j = 0; j < W; j++) acc[j] = fused(splat(weights[p]), load(v + p * H + 16 * j), acc[j]);
  }
  for (int j = 0; j < W; j++) store(out + 16 * j, acc[j]);
#endif
}

template <class T>
void blend(const float* weights, const T* v, int64_t places, int64_t H, float* out) {
  int64_t i = 0;
#if !defined(VECTORS_OF_EIGHT)
  for (; i + 128 <= H; i += 128) blend<8>(weights, v + i, places, H, out + i);
#endif
  for (; i + 64 <= H; i += 64) blend<4>(weights, v + i, places, H, out + i);
  for (; i + 16 <= H; i += 16) blend<1>(weights, v + i, places, H, out + i);
  for (; i < H; i++) {
    float total = 0;
    for (int64_t p = 0; p < places; p++) total += weights[p] * value(v[p * H + i]);
    out[i] = total;
  }
}

// scores -> e^(score - max); returns their sum. The buffer is padded to sixteens.
float soften(float* scores, int64_t n) {
  for (int64_t i = n; i % 16; i++) scores[i] = -INFINITY;
  f16 most = load(scores);
  for (int64_t i = 16; i < n; i += 16) {
    const f16 here = load(scores + i);
    most = here > most ? here : most;
  }
  float top = most[0];
  for (int i = 1; i < 16; i++) top = std::max(top, most[i]);
  f16 total = {};
  for (int64_t i = 0; i < n; i += 16) {
    f16 e = exp16(load(scores + i) - top);
    for (int64_t j = n - i; j < 16; j++) e[j] = 0;
    store(scores + i, e);
    total += e;
  }
  return sum(total);
}

// Keys or values of one head in one slot; `scales` only in int8, one a place.
template <class T>
struct Kept {
  T* data;
  float* scales;

  Kept(void* data, float* scales, int64_t first, int64_t H)
      : data(static_cast<T*>(data) + first * H), scales(scales ? scales + first : nullptr) {}

  void put(int64_t place, const float* x, int64_t H) const {
    if constexpr (std::is_same_v<T, int8_t>)
      scales[place] = keep(data + place * H, x, H);
    else
      keep(data + place * H, x, H);
  }

  void scale(float* __restrict weights, int64_t places) const {
    if (scales)
      for (int64_t p = 0; p < places; p++) weights[p] *= scales[p];
  }
};

// One key head of one row: its queries against the places so far, the new token among them.
template <class T>
ONE_COPY void attend(const Model& m, const Kept<T>& k, const Kept<T>& v, int64_t places, const float* q,
            float* scores, float* out, const Input& in, int64_t row, int64_t column) {
  const int64_t H = m.H;
  const float scale = 1.0f / std::sqrt(float(H));
  for (int64_t g = 0; g < m.N / m.K; g++) {
    int64_t p = 0;
    // Behind the last place stands what is left of others, and is left out below.
    for (; H % 16 == 0 && p < places && p + 16 <= m.places; p += 16)
      store(scores + p, dots16(q + g * H, k.data + p * H, H) * scale);
    for (; p < places; p++) scores[p] = dot(q + g * H, k.data + p * H, H) * scale;
    k.scale(scores, places);
    const float total = soften(scores, places);
    v.scale(scores, places);
    blend(scores, v.data, places, H, out);
    for (int64_t i = 0; i < H; i++) out[i] /= total;
    in.put(row, column + g * H, out, H);
  }
}

// silu(gate) * up, for the columns of one thread
ONE_COPY void activate(const float* gates, const float* ups, Range mine, const Input& inner, int64_t row) {
  for (int64_t n = mine.first; n < mine.last; n += 16) {
    const int64_t count = std::min<int64_t>(16, mine.last - n);
    f16 gate = {}, up = {};
    std::memcpy(&gate, gates + n, count * sizeof(float));
    std::memcpy(&up, ups + n, count * sizeof(float));
    const f16 out = gate / (1.0f + exp16(-gate)) * up;
    float here[16];
    store(here, out);
    inner.put(row, n, here, count);
  }
}

// One layer's keys, values and attention for the rows of a step.
template <class T>
struct Heads {
  const Model& m;
  const Layer& l;
  const int64_t *slots, *lengths;
  float* qkv;
  int64_t qkv_width;
  const Input& attended;

  Kept<T> kept(void* data, float* scales, int64_t row, int64_t head) const {
    return Kept<T>(data, scales, (slots[row] * m.K + head) * m.places, m.H);
  }

  // Stores the key and value of one key head of a row, and turns the queries that read it.
  void prepare(int64_t row, int64_t head, float* turned) const {
    const int64_t H = m.H, group = m.N / m.K, place = lengths[row];
    const float *cos = m.cos + place * (H / 2), *sin = m.sin + place * (H / 2);
    float* given = qkv + row * qkv_width;
    for (int64_t n = head * group * H; n < (head + 1) * group * H; n += H) {
      head_norm_and_turn(given + n, l.q_weight + n, l.q_bias + n, cos, sin, H, turned);
      std::memcpy(given + n, turned, H * sizeof(float));
    }
    const float *new_k = given + (m.N + head) * H, *new_v = new_k + m.K * H;
    head_norm_and_turn(new_k, l.k_weight + head * H, l.k_bias + head * H, cos, sin, H, turned);
    kept(l.k, l.k_scales, row, head).put(place, turned, H);
    kept(l.v, l.v_scales, row, head).put(place, new_v, H);
  }

  void look_back(int64_t row, int64_t head, float* scratch) const {
    const int64_t n = head * (m.N / m.K) * m.H;
    const Kept<T> k = kept(l.k, l.k_scales, row, head), v = kept(l.v, l.v_scales, row, head);
    const float* q = qkv + row * qkv_width + n;
    attend(m, k, v, lengths[row] + 1, q, scratch + m.H, scratch, attended, row, n);
  }

  // Threads take turns. Where rows share a slot, later ones look back at keys that other threads
  // store, so all are stored first; and the heads stand outside, for their keys to stay in cache.
  void all(int64_t R, bool shared, Meeting& meeting, float* scratch) const {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads(), tasks = R * m.K;
    if (!shared) {
      for (int64_t task = thread; task < tasks; task += team) {
        prepare(task / m.K, task % m.K, scratch);
        look_back(task / m.K, task % m.K, scratch);
      }
      return;
    }
    for (int64_t task = thread; task < tasks; task += team)
      prepare(task / m.K, task % m.K, scratch);
    meeting.wait();
    for (int64_t task = thread; task < tasks; task += team) look_back(task % R, task / R, scratch);
  }
};

template <class T>
void attention(const Model& m, const Layer& l, const int64_t* slots, const int64_t* lengths,
               float* qkv, int64_t qkv_width, const Input& attended, int64_t R, bool shared,
               Meeting& meeting, float* scratch) {
  Heads<T>{m, l, slots, lengths, qkv, qkv_width, attended}.all(R, shared, meeting, scratch);
}

bool any_twice(const int64_t* slots, int64_t R) {
  std::vector<int64_t> sorted(slots, slots + R);
  std::sort(sorted.begin(), sorted.end());
  return std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end();
}

int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

struct Buffers {
  Floats full;
  std::vector<uint16_t, Lines<uint16_t>> half;
  int64_t stride;

  Buffers(int64_t R, int64_t columns, bool rounded)
      : full(R * padded(columns)),
        half(rounded ? R * padded(columns) : 0),
        stride(padded(columns)) {}
  Input input() { return {full.data(), half.empty() ? nullptr : half.data(), stride}; }
};

// Whether a product with such a matrix reads what it is given in bf16.
bool rounds(const Matrix& m) { return m.kind == BF16 || m.kind == INT4; }

// ---- the draw of a token: temperature, top-k, top-p, min-p, then the inverse of the cumulative
// probability. Instead of sorting, thresholds are found by halving the range of floats.

typedef double f8 __attribute__((vector_size(64)));
typedef int64_t l8 __attribute__((vector_size(64)));
typedef float half_f16 __attribute__((vector_size(32)));

// e^x to the precision of doubles, 0 far below.
inline f8 exp8(f8 x) {
  const l8 none = x < -700.0;
  x = none ? f8{} - 700.0 : x;
  const f8 scaled = x * 1.4426950408889634;
  const l8 whole = __builtin_convertvector(scaled + (scaled < 0.0 ? f8{} - 0.5 : f8{} + 0.5), l8);
  const f8 n = __builtin_convertvector(whole, f8);
  const f8 r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  f8 p = f8{} + 1.0;
  for (int k = 13; k > 0; k--) p = p * r * (1.0 / k) + 1.0;
  const l8 bits = (whole + 1023) << 52;
  f8 power;
  std::memcpy(&power, &bits, 64);
  return none ? f8{} : p * power;
}

// Floats in order are these integers in order.
inline float of_order(int32_t order) {
  const int32_t bits = order < 0 ? order ^ 0x7fffffff : order;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The largest float up to `top` for which `holds`, which then holds for all below.
template <class Holds>
float largest(float top, Holds holds) {
  int32_t bits;
  std::memcpy(&bits, &top, 4);
  int64_t low = -0x7f7fffffLL - 1, high = bits < 0 ? bits ^ 0x7fffffff : bits;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (holds(of_order(int32_t(middle))))
      low = middle;
    else
      high = middle - 1;
  }
  return of_order(int32_t(low));
}

// What one token is drawn from. The three rows of logits are guidance's; without guidance they are
// one. `blocked` and `seen` mark columns, where there are any. Temperature 0 takes the largest;
// top_k and min_p are off at 0, top_p and penalty at 1.
struct Choice {
  const float *full, *image_only, *unconditional;
  const uint8_t *blocked, *seen;
  int64_t columns, top_k;
  double text, image, temperature, top_p, min_p, penalty, uniform;

  void mix(float* __restrict z) const {
    const float t = float(text), i = float(image), p = float(penalty);
    if (full == image_only && full == unconditional)
      std::memcpy(z, full, columns * sizeof(float));
    else
      for (int64_t c = 0; c < columns; c++)
        z[c] = unconditional[c] + i * (image_only[c] - unconditional[c]) +
               t * (full[c] - image_only[c]);
    if (blocked)
      for (int64_t c = 0; c < columns; c++) z[c] = blocked[c] ? -INFINITY : z[c];
    if (seen)
      for (int64_t c = 0; c < columns; c++)
        z[c] = seen[c] ? (z[c] > 0 ? z[c] / p : z[c] * p) : z[c];
  }
};

// Whether something can be drawn: no NaN, nothing infinite but what may not come.
bool sound(const float* z, int64_t n) {
  float top = -INFINITY;
  bool all = true;
  for (int64_t i = 0; i < n; i++) {
    all &= z[i] <= 3.402823466e+38f;
    top = z[i] > top ? z[i] : top;
  }
  return all && top > -INFINITY;
}

// One row of logits in z, which like the scratch e is padded to sixteens.
struct Draw {
  int64_t count, n;
  float* z;
  double* e;
  float top;

  Draw(int64_t count, float temperature, float* z, double* e)
      : count(count), n((count + 15) / 16 * 16), z(z), e(e) {
    for (int64_t i = count; i < n; i++) z[i] = -INFINITY;
    if (temperature != 0)
      for (int64_t i = 0; i < count; i++) z[i] /= temperature;
    f16 most = load(z);
    for (int64_t i = 16; i < n; i += 16) {
      const f16 here = load(z + i);
      most = here > most ? here : most;
    }
    top = most[0];
    for (int i = 1; i < 16; i++) top = std::max(top, most[i]);
  }

  int64_t greedy() const { return std::find(z, z + count - 1, top) - z; }

  void drop_below(float least) {
    for (int64_t i = 0; i < n; i++) z[i] = z[i] < least ? -INFINITY : z[i];
  }

  // Those that equal the least of the k largest stay too.
  void top_k(int64_t k) {
    drop_below(largest(top, [&](float least) {
      i16 count = {};
      for (int64_t i = 0; i < n; i += 16) count -= load(z + i) >= least;
      int64_t total = 0;
      for (int i = 0; i < 16; i++) total += count[i];
      return total >= k;
    }));
  }

  // Drops the least while they have at most `tail` of the probability; of equal ones the first.
  void top_p(float tail) {
    auto below = [&](float least) {
      f16 mass = {};
      for (int64_t i = 0; i < n; i += 16) {
        const f16 here = load(z + i);
        mass += here < least ? exp16(here - top) : f16{};
      }
      return sum(mass);
    };
    const float limit = tail * below(INFINITY);
    const float least = largest(top, [&](float x) { return below(x) <= limit; });
    int64_t equal = 0;
    for (int64_t i = 0; i < n; i++) equal += z[i] == least;
    const float each = exp16(splat(least - top))[0], rest = std::max(0.0f, limit - below(least));
    int64_t more = std::min<int64_t>(equal - 1, int64_t(rest / each));
    drop_below(least);
    for (int64_t i = 0; more > 0; i++)
      if (z[i] == least) z[i] = -INFINITY, more--;
  }

  // Sums of blocks tell the block, then its entries are added one by one.
  int64_t pick(double uniform) {
    const int64_t block = 64;
    double total = 0;
    for (int64_t first = 0; first < n; first += block) total += soften(first, first + block);
    const double target = std::min(uniform * total, std::nextafter(total, 0.0));
    double sum = 0;
    int64_t first = 0;
    for (; first + block < n; first += block) {
      const double after = sum + mass(first, first + block);
      if (after > target) break;
      sum = after;
    }
    int64_t last = 0;
    for (int64_t i = first; i < n; i++) {
      if ((sum += e[i]) > target) return i;
      if (e[i] > 0) last = i;
    }
    return last;
  }

  double soften(int64_t first, int64_t last) {
    for (int64_t i = first; i < std::min(last, n); i += 8) {
      half_f16 here;
      std::memcpy(&here, z + i, 32);
      const f8 value = exp8(__builtin_convertvector(here, f8) - double(top));
      std::memcpy(e + i, &value, 64);
    }
    return mass(first, last);
  }

  double mass(int64_t first, int64_t last) const {
    f8 total = {};
    for (int64_t i = first; i < std::min(last, n); i += 8) {
      f8 here;
      std::memcpy(&here, e + i, 64);
      total += here;
    }
    double sum = 0;
    for (int i = 0; i < 8; i++) sum += total[i];
    return sum;
  }
};

}  // namespace

extern "C" {

// The column that each of B choices comes to; -1 where the logits are not finite.
void earlyfusion_draw(const Choice* choices, int64_t B, int64_t* drawn, int64_t threads) {
  int64_t widest = 0;
  for (int64_t b = 0; b < B; b++) widest = std::max(widest, choices[b].columns);
#pragma omp parallel num_threads(std::min(threads, B))
  {
    Floats z(widest + 15);
    std::vector<double, Lines<double>> e(widest + 15);
#pragma omp for
    for (int64_t b = 0; b < B; b++) {
      const Choice& c = choices[b];
      c.mix(z.data());
      if (!sound(z.data(), c.columns)) {
        drawn[b] = -1;
        continue;
      }
      Draw row(c.columns, float(c.temperature), z.data(), e.data());
      if (c.temperature == 0) {
        drawn[b] = row.greedy();
        continue;
      }
      if (c.top_k > 0 && c.top_k < c.columns) row.top_k(c.top_k);
      if (c.top_p < 1) row.top_p(float(1 - c.top_p));
      if (c.min_p > 0) row.drop_below(row.top + float(std::log(c.min_p)));
      drawn[b] = row.pick(c.uniform);
    }
  }
}

// x_RD: embedded tokens in, states behind the last norm out. Each row's token goes to place
// lengths[row] of its slot, and sees what the slot holds up to there: also what other rows store.
void earlyfusion_step(const Model* model, int64_t R, float* x_RD, const int64_t* slots,
                      const int64_t* lengths, int64_t threads) {
  const Model& m = *model;
  const bool shared = any_twice(slots, R);
  const int64_t D = m.D, qkv_width = (m.N + 2 * m.K) * m.H;
  int64_t longest = 0;
  for (int64_t row = 0; row < R; row++) longest = std::max(longest, lengths[row] + 1);
  const bool half = rounds(m.layer[0].q);
  Buffers attended_buffer(R, m.N * m.H, half), inner_buffer(R, m.F, half);
  const Input attended = attended_buffer.input(), inner = inner_buffer.input();
  Floats qkv(R * qkv_width), gates(R * m.F), ups(R * m.F), y(R * D);
  Meeting meeting;
#pragma omp parallel num_threads(threads)
  {
    Buffers own(R, D, half);
    const Input in = own.input();
    Floats x(x_RD, x_RD + R * D), norm_scratch(D);
    Floats scratch(m.H + padded(longest));
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
      const auto attention_here = m.cache_kind == FP32   ? attention<float>
                                  : m.cache_kind == BF16 ? attention<uint16_t>
                                                         : attention<int8_t>;
      attention_here(m, l, slots, lengths, qkv.data(), qkv_width, attended, R, shared, meeting,
                     scratch.data());
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
  Buffers own(R, columns, rounds(*matrix));
  const Input in = own.input();
  normed(x, nullptr, R, columns, 0, in);
#pragma omp parallel num_threads(threads)
  multiply(*matrix, in, R, y, matrix->rows);
}
}
