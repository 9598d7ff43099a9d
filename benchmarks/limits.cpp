// What the processor can do at most: loops of its widest multiply-add, and loops that read memory,
// on several threads. Built and called by many.py.

#include <immintrin.h>
#include <omp.h>

#include <chrono>
#include <cstdint>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

#if defined(__AMX_BF16__) && defined(__linux__)
const int64_t LOOPS = 20000, OPERATIONS = 8 * 2 * 16 * 16 * 32;  // of a loop: 8 products of tiles

struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = 64;  // bytes of a row
      config[48 + tile] = 16;      // rows
    }
    // Not the intrinsic: g++ 12's lets the compiler leave out the stores above.
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { _tile_release(); }
};

// Linux gives the registers to a process that asks for them.
bool permitted() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

void amx() {
  Tiles tiles;
  for (int64_t i = 0; i < LOOPS; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}
#endif

// Steps of `multiply_add` on 12 independent sums. All loops over them are unrolled, so that
// compilers keep them in registers.
template <class V, class F>
V chain(int64_t loops, V start, F multiply_add) {
  V sums[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; i++) sums[i] = start;
  for (int64_t loop = 0; loop < loops; loop++) {
#pragma GCC unroll 12
    for (int i = 0; i < 12; i++) {
      sums[i] = multiply_add(sums[i]);
      asm volatile("" : "+v"(sums[i]));  // keeps compilers from merging the steps
    }
  }
  V total = sums[0];
#pragma GCC unroll 12
  for (int i = 1; i < 12; i++) total += sums[i];
  return total;
}

// Operations per second of `loop`, which does `operations` on each thread, for all threads
// together: the best of several runs.
template <class F>
double fastest(int threads, double operations, F loop) {
  double best = 0;
  for (int run = 0; run < 10; run++) {
    double began = now();
#pragma omp parallel num_threads(threads)
    loop();
    double rate = threads * operations / (now() - began);
    best = rate > best ? rate : best;
  }
  return best;
}

volatile float sink;

}  // namespace

// Operations per second of the multiply-add for bf16 (`bits` 16) or fp32 (32); 0 if this processor
// has none that this file knows.
extern "C" double peak(int threads, int bits) {
  const int64_t loops = 200000;
#if defined(__AMX_BF16__) && defined(__linux__)
  if (bits == 16 && permitted()) return fastest(threads, double(LOOPS * OPERATIONS), amx);
#endif
#if defined(__AVX512BF16__)
  if (bits == 16)
    return fastest(threads, loops * 12.0 * 64, [=] {
      __m512bh one = __m512bh(_mm512_set1_epi16(0x3f80));
      const auto step = [=](__m512 s) { return _mm512_dpbf16_ps(s, one, one); };
      sink = chain(loops, _mm512_set1_ps(1), step)[0];
    });
#endif
#if defined(__AVX512F__)
  if (bits == 32)
    return fastest(threads, loops * 12.0 * 32, [=] {
      __m512 half = _mm512_set1_ps(0.5f);
      sink = chain(loops, half, [=](__m512 s) { return _mm512_fmadd_ps(s, half, half); })[0];
    });
#elif defined(__AVX2__) && defined(__FMA__)
  if (bits == 32)
    return fastest(threads, loops * 12.0 * 16, [=] {
      __m256 half = _mm256_set1_ps(0.5f);
      sink = chain(loops, half, [=](__m256 s) { return _mm256_fmadd_ps(s, half, half); })[0];
    });
#endif
  return 0;
}

// Bytes per second at which the threads read `count` floats, each its own share: the best of
// several runs.
extern "C" double bandwidth(int threads, const float* data, int64_t count) {
  double best = 0;
  for (int run = 0; run < 4; run++) {
    double began = now();
    float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
    for (int64_t block = 0; block < count / 4096; block++) {
      float sums[64] = {};
      const float* p = data + block * 4096;
      for (int i = 0; i < 4096; i += 64)
#pragma omp simd
        for (int lane = 0; lane < 64; lane++) sums[lane] += p[i + lane];
      for (float sum : sums) total += sum;
    }
    sink = total;
    double rate = 4.0 * count / (now() - began);
    best = rate > best ? rate : best;
  }
  return best;
}
