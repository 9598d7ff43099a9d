// Vectors of 16 floats, conversion to and from bf16, horizontal sums, exp: shared by cpu_step.cpp,
// conv.cpp and unpack.cpp. They are the compiler's vector types, so that one source serves every
// processor. Intrinsics are used only where compilers do not find the instruction themselves.

#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define USE_AVX2  // registers hold 8 floats, so a vector of 16 takes two of them
#endif
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define USE_AVX512  // registers hold 16 floats, or 16 other elements of 32 bits
#endif
#if defined(__AVX512F__)
#define LANES 16
#elif defined(USE_AVX2)
#define LANES 8
#else
#define LANES 4
#endif

namespace {

typedef float floats16 __attribute__((vector_size(64)));
typedef int32_t ints16 __attribute__((vector_size(64)));
// One register of the processor. Compilers compare and convert wider vectors element by element.
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

// ---- bf16: the upper two bytes of a float

inline float bf16_to_float(uint16_t v) {
  uint32_t bits = uint32_t(v) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Rounds to nearest, ties to even. A NaN may become infinite: callers pass finite values.
inline uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// ---- load and store, at any address

inline floats16 load(const float* p) {
  floats16 v;
  std::memcpy(&v, p, 64);
  return v;
}

inline floats16 load(const uint16_t* p) {
#if defined(__AVX512F__)
  __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return floats16(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16)));
#else
  floats16 v;
  for (int i = 0; i < 16; i++) v[i] = bf16_to_float(p[i]);
  return v;
#endif
}

inline floats16 load(const int8_t* p) {
#if defined(__AVX512F__)
  __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return floats16(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)));
#else
  floats16 v;
  for (int i = 0; i < 16; i++) v[i] = p[i];
  return v;
#endif
}

inline void store(float* p, floats16 v) { std::memcpy(p, &v, 64); }

// The same for vectors of any type.
template <class V>
inline V load_vector(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
inline void store_vector(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// A subtraction, as compilers leave it out: 0 + x is not x for x = -0.
inline floats16 broadcast(float x) { return x - floats16{}; }

// A std::vector that begins at a cache line, so that no load of 16 floats touches two lines. A
// large one begins at a huge page and asks Linux for huge pages.
template <class T>
struct CacheLineAllocator {
  typedef T value_type;
  static const size_t HUGE_PAGE = size_t(2) << 20;
  static std::align_val_t alignment(size_t n) {
    return std::align_val_t(n * sizeof(T) >= HUGE_PAGE ? HUGE_PAGE : 64);
  }
  CacheLineAllocator() = default;
  template <class U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}
  T* allocate(size_t n) {
    void* memory = ::operator new(n * sizeof(T), alignment(n));
#if defined(MADV_HUGEPAGE)
    if (n * sizeof(T) >= HUGE_PAGE) madvise(memory, n * sizeof(T), MADV_HUGEPAGE);
#endif
    return static_cast<T*>(memory);
  }
  void deallocate(T* p, size_t n) { ::operator delete(p, alignment(n)); }
  template <class U>
  bool operator==(const CacheLineAllocator<U>&) const {
    return true;
  }
  template <class U>
  bool operator!=(const CacheLineAllocator<U>&) const {
    return false;
  }
};

template <class T>
using AlignedVector = std::vector<T, CacheLineAllocator<T>>;

// ---- arithmetic

// a * b + c, rounded once. Left to the compiler, one instance of a template may round twice and
// another once; then the result of a row would depend on how many other rows a step has.
inline floats16 fmadd(floats16 a, floats16 b, floats16 c) {
#if defined(__AVX512F__)
  return floats16(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#else
  return a * b + c;
#endif
}

// Forces a vector into a register. Otherwise compilers turn each use into a memory operand, and
// microkernels with several rows of input are bound by loads.
#if defined(__AVX512F__)
inline void keep_in_register(floats16& v) { asm("" : "+v"(v)); }
inline void keep_in_register(__m512i& v) { asm("" : "+v"(v)); }
#elif defined(USE_AVX2)
inline void keep_in_register(__m256& v) { asm("" : "+x"(v)); }
inline void keep_in_register(__m256i& v) { asm("" : "+x"(v)); }
#endif

// Prefetches into the L2 cache: in L1, weights, keys and values that are read later would take the
// place of what is in use.
inline void prefetch(const void* at, int64_t distance) {
  __builtin_prefetch(static_cast<const char*>(at) + distance, 0, 2);
}

// The sums of the two halves of each run of 2 HALF elements of the pair (a, b).
template <int HALF, class V, int... I>
inline __attribute__((always_inline)) V add_halves(V a, V b, std::integer_sequence<int, I...>) {
  // Element I is the sum of these elements of the pair: of the lower half and of the upper one.
#define LOWER (I / HALF * 2 * HALF + I % HALF)
#if defined(__clang__)
  return __builtin_shufflevector(a, b, LOWER...) + __builtin_shufflevector(a, b, LOWER + HALF...);
#else  // before 12, GCC has only this built-in; clang does not have it
  const ints16 lower = {LOWER...};
  return __builtin_shuffle(a, b, lower) + __builtin_shuffle(a, b, lower + HALF);
#endif
#undef LOWER
}

// The horizontal sums of N vectors, at most 16: element i of the result is the sum of vector i.
// Each of four steps adds the two halves of every vector and packs the results of two vectors into
// one.
template <int N, class V>
inline __attribute__((always_inline)) V horizontal_sums(V* v) {
  const V zero = {};
  auto fold = [&](int i, int n, auto half) __attribute__((always_inline)) {
    if (2 * i >= n) return;
    const V a = v[2 * i], b = 2 * i + 1 < n ? v[2 * i + 1] : zero;
    v[i] = add_halves<half.value>(a, b, std::make_integer_sequence<int, 16>());
  };
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) fold(i, N, std::integral_constant<int, 8>());
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) fold(i, (N + 1) / 2, std::integral_constant<int, 4>());
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++) fold(i, (N + 3) / 4, std::integral_constant<int, 2>());
  fold(0, (N + 7) / 8, std::integral_constant<int, 1>());
  return v[0];
}

// Adds in the order of `horizontal_sums`, so that a vector has the same sum alone and among others.
inline float horizontal_sum(floats16 v) { return horizontal_sums<1>(&v)[0]; }

#if defined(USE_AVX2)
inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }

inline __m256 load8(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

inline __m256 load8(const int8_t* p) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
}

// The sums of four vectors of 16, each given as its low and high half; added in the order of
// `horizontal_sums`.
inline __m128 horizontal_sums4(const __m256* low, const __m256* high) {
  __m128 t[4];
  for (int r = 0; r < 4; r++) {
    const __m256 v = _mm256_add_ps(low[r], high[r]);
    t[r] = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  }
  _MM_TRANSPOSE4_PS(t[0], t[1], t[2], t[3]);
  return _mm_add_ps(_mm_add_ps(t[0], t[2]), _mm_add_ps(t[1], t[3]));
}

// The sums of four vectors of 8.
inline __m128 horizontal_sums4(const __m256* v) {
  const __m256 a = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
  const __m256 b = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}
#endif

// e^x for x = n * ln 2 + r, where n is x / ln 2 rounded to an integer and 2^n is a normal number.
inline floats exp_split(floats x, floats n) {
  // ln 2 in two parts, so that the product of n and the first one is exact.
  const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if LANES == 16
  return floats(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
  const ints bits = (__builtin_convertvector(n, ints) + 127) << 23;  // 2^n: n in a float's exponent
  return p * load_vector<floats>(&bits);
#endif
}

inline floats round_to_integer(floats x) {
  // Adding 1.5 * 2^23 leaves no bits for a fraction.
  const float magic = 12582912.0f;
  return (x + magic) - magic;
}

// e^x to about one part in 10^7; 0 below -87, and at most e^88.
inline floats vector_exp(floats x) {
#if LANES == 16
  const __mmask16 normal = _mm512_cmp_ps_mask(__m512(x), _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  x = floats(_mm512_min_ps(_mm512_set1_ps(88.0f), __m512(x)));
  const floats e = exp_split(x, round_to_integer(x * 1.44269504f));
  return floats(_mm512_maskz_mov_ps(normal, __m512(e)));
#else
  const ints underflow = x < -87.0f;
  x = underflow ? floats{} - 87.0f : x;
  x = x > 88.0f ? floats{} + 88.0f : x;
  const floats e = exp_split(x, round_to_integer(x * 1.44269504f));
  return underflow ? floats{} : e;
#endif
}

}  // namespace
