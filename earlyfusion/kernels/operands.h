// A weight matrix and the input of its products, for products.h, panels.h and cpu_step.cpp.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>

#include "simd.h"

namespace {

// A weight matrix, as in cpu_step.py.
enum Format : int64_t { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };  // of weights and of the cache

struct Matrix {
  const void* data;
  const void* scales;            // of int8 and int4
  int64_t rows, stride, format;  // stride: padded columns
};

inline int64_t row_bytes(const Matrix& m) {
  const int64_t bits[] = {32, 16, 8, 4};
  return m.stride * bits[m.format] / 8;
}

// How inputs that are rounded to bf16 are stored: where no instruction multiplies bf16, as floats.
#if defined(VECTORS_OF_EIGHT)
typedef float rounded_t;
inline float rounded(float x) { return as_float(as_bf16(x)); }
#else
typedef uint16_t rounded_t;
inline uint16_t rounded(float x) { return as_bf16(x); }
#endif

// The input of a product in fp32 and rounded to bf16, R rows, zero after the last column.
struct Input {
  float* fp32;
  rounded_t* rounded;  // null where the weights are fp32 or int8
  int64_t stride;

  void put(int64_t row, int64_t column, const float* x, int64_t n) const {
    std::memcpy(fp32 + row * stride + column, x, n * sizeof(float));
    if (rounded) round(rounded + row * stride + column, x, n);
  }

  static void round(rounded_t* __restrict y, const float* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = ::rounded(x[i]);
  }
};

struct Range {
  int64_t first, last;  // last: one past the end
};

// The rows of weights of one product, in parts of `size`, shared among threads. Each begins with a run of its
// own, and takes from the ends of the others' runs when that is done: on a shared machine one core may be slower
// than another.
class Shares {
 public:
  Shares(int64_t rows, int64_t size, int64_t threads)
      : rows_(rows), size_(size), threads_(threads), runs_(new Run[threads]) {
    const uint64_t parts = (rows + size - 1) / size;
    for (uint64_t t = 0; t < uint64_t(threads); t++)
      runs_[t].ends = parts * t / threads << 32 | parts * (t + 1) / threads;
  }

  // Calls `work` with ranges of rows until all have been given to some thread.
  template <class Work>
  void each(Work work) {
    const int64_t thread = omp_get_thread_num();
    for (int64_t other = 0; other < threads_; other++) {
      std::atomic<uint64_t>& run = runs_[(thread + other) % threads_].ends;
      for (uint64_t now = run; now >> 32 < uint32_t(now);) {
        const uint64_t one = uint64_t(1), next = other ? now - one : now + (one << 32);
        if (!run.compare_exchange_weak(now, next)) continue;
        const int64_t first = size_ * (other ? uint32_t(next) : now >> 32);
        work(Range{first, std::min(first + size_, rows_)});
        now = run;
      }
    }
  }

 private:
  // First part and one past the last, in the halves of a number; on a line of its own, as each thread writes its own.
  struct alignas(64) Run {
    std::atomic<uint64_t> ends;
  };

  int64_t rows_, size_, threads_;
  std::unique_ptr<Run[]> runs_;
};

// Memory that a thread uses again and again: new pages would have to be cleared first.
class Room {
 public:
  float* of(int64_t floats) {
    if (int64_t(memory_.size()) < floats) memory_.resize(floats);
    return memory_.data();
  }

 private:
  Aligned<float> memory_;
};

int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

// From one row of a buffer to the next: one or two lines more than the columns take, as the caches have few places
// for addresses that differ by a power of two.
int64_t apart(int64_t columns) { return padded(columns) + 32; }

// The memory of a step, given piece by piece and used again by the next step: new pages would have to be cleared
// first. It holds whatever it held before.
class Arena {
 public:
  template <class T>
  T* of(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (chunks_.empty() || used_ + bytes > chunks_.back().size()) {
      chunks_.emplace_back(std::max<size_t>(bytes, size_t(1) << 20));
      used_ = 0;
    }
    used_ += bytes;
    return reinterpret_cast<T*>(chunks_.back().data() + used_ - bytes);
  }

  // For the next step: one chunk of the size of all.
  void clear() {
    size_t total = 0;
    for (const Aligned<char>& chunk : chunks_) total += chunk.size();
    if (chunks_.size() > 1) {
      chunks_.clear();
      chunks_.emplace_back(total);
    }
    used_ = 0;
  }

 private:
  std::vector<Aligned<char>> chunks_;
  size_t used_ = 0;
};

// An arena for one call. Several threads may make calls at once, and each gets another one.
class Lease {
 public:
  Lease() {
    const std::lock_guard<std::mutex> guard(lock_);
    if (free_.empty()) free_.push_back(std::make_unique<Arena>());
    arena_ = std::move(free_.back());
    free_.pop_back();
  }
  ~Lease() {
    arena_->clear();
    const std::lock_guard<std::mutex> guard(lock_);
    free_.push_back(std::move(arena_));
  }
  Lease(const Lease&) = delete;
  Arena* operator->() { return arena_.get(); }

  Input input(int64_t R, int64_t columns, bool rounded) {
    const int64_t stride = apart(columns), used = padded(columns);
    const Input in{arena_->of<float>(R * stride), rounded ? arena_->of<rounded_t>(R * stride) : nullptr, stride};
    for (int64_t at = columns; at < R * stride; at += stride) {
      std::fill_n(in.fp32 + at, used - columns, 0);
      if (rounded) std::fill_n(in.rounded + at, used - columns, 0);
    }
    return in;
  }

 private:
  static inline std::mutex lock_;
  static inline std::vector<std::unique_ptr<Arena>> free_;
  std::unique_ptr<Arena> arena_;
};

#define INLINE inline __attribute__((always_inline))

// ---- for panels of weights that are turned around

// An output has sixteen sums, a lane of a vector each, which are added up in the order of `sums`: sum i and i + 8, then
// these of i and i + 4, and so on. Computed in this order, each can be added to what is there already: the k-th one to
// as many sums of sums as k ends with ones in binary. Panels and inputs hold them in this order too.
const int64_t SUMS = 16;
const int ORDER[SUMS] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

// The rows of input in tiles of at most MOST rows, as even as possible.
template <int64_t MOST>
struct TilesOf {
  int64_t R, count;

  explicit TilesOf(int64_t R) : R(R), count((R + MOST - 1) / MOST) {}
  int64_t first(int64_t tile) const { return R * tile / count; }
  int64_t rows(int64_t tile) const { return first(tile + 1) - first(tile); }
};

// Where the input of a tile lies that is turned around as the panels are, in the order in which a panel passes it: for
// each group of tiles [sums at a time, tile, sum, step, row of the tile].
template <class Tiles, int64_t GROUP>
struct PlacesOf {
  Tiles tiles;
  int64_t steps;
  int together;  // sums at a time

  // Of the sums from the k-th one on that are computed at a time.
  int64_t at(int64_t group, int64_t tile, int64_t k) const {
    const int64_t first = tiles.first(group), rows = tiles.first(std::min(group + GROUP, tiles.count)) - first;
    return steps * (SUMS * first + k * rows + together * (tiles.first(tile) - first));
  }

  // Of one sum, in the order of columns, of a tile.
  int64_t of_sum(int64_t tile, int sum) const {
    const int k = ORDER[sum];  // the order is its own inverse
    return at(tile / GROUP * GROUP, tile, k / together * together) + k % together * steps * tiles.rows(tile);
  }
};

// Fetches what is needed next into the second-level cache, some lines at a time.
struct Ahead {
  const char* at;
  int64_t left;  // lines

  INLINE void fetch(int64_t lines) {
    lines = std::min(lines, left);
    left -= lines;
    for (; lines > 0; lines--, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

// int4: 32 bytes hold 64 columns, the first 32 in the low nibbles, the others in the high ones; each
// 32 columns have a bf16 scale. A level times its scale is exact in fp32.
//
// n columns of a row, a multiple of 64.
inline void unpack_int4(const uint8_t* w, const uint16_t* scales, int64_t n, float* __restrict out) {
  for (int64_t c = 0; c < n; c += 64) {
    const float scale_1 = as_float(scales[c / 32]), scale_2 = as_float(scales[c / 32 + 1]);
    const uint8_t* at = w + c / 2;
    for (int i = 0; i < 32; i++) out[c + i] = float(int(at[i] & 15) - 8) * scale_1;
    for (int i = 0; i < 32; i++) out[c + 32 + i] = float(int(at[i] >> 4) - 8) * scale_2;
  }
}

// Whether a product with such a matrix reads its input in bf16.
bool reads_bf16(const Matrix& m) {
#if defined(VECTORS_OF_EIGHT) || defined(VECTORS_OF_SIXTEEN)
  return m.format == BF16;  // where int4 and int8 are multiplied in whole numbers, these round the input themselves
#else
  return m.format == BF16 || m.format == INT4;
#endif
}

}  // namespace
