// What all kernels of gemm.h share: the weight matrix, the input, the partition of work among
// threads, memory, and the layout of packed operands.
//
// A product is y [R, rows] = x [R, columns] W^T: R rows of input, and a weight matrix stored by
// rows. Names follow BLIS: a microkernel computes a tile of MR rows of input by NR rows of weights,
// KC is a block of columns.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>

#include "simd.h"
// Older versions of Clang spell these macros in their own way.
#if (defined(__AMX_BF16__) && defined(__AMX_INT8__)) || \
    (defined(__AMXBF16__) && defined(__AMXINT8__))
#if defined(USE_AVX512) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define USE_AMX
#endif
#endif

namespace {

enum Format : int64_t { FP32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };  // of weights and of the cache

// A weight matrix, as in cpu_step.py.
struct Matrix {
  const void* data;
  const void* scales;            // int8: one fp32 per row; int4: one bf16 per 32 columns of a row
  int64_t rows, stride, format;  // rows: a multiple of 4; stride: columns, padded to 64
};

inline int64_t row_bytes(const Matrix& m) {
  const int64_t bits[] = {32, 16, 8, 4};
  return m.stride * bits[m.format] / 8;
}

// Whether products with this matrix read the input in bf16.
bool takes_bf16_input(const Matrix& m) {
#if defined(USE_AVX2) || defined(USE_AVX512)
  return m.format == BF16;  // the kernels for int8 and int4 quantise the fp32 input themselves
#else
  return m.format == BF16 || m.format == INT4;
#endif
}

// ---- AMX

#if defined(USE_AMX)
// Linux gives a process the tile registers when it asks for them. False in a sandbox that forbids
// the question.
inline bool amx_permitted() {
  const int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool permitted =
      syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return permitted;
}
#endif

// Whether products with this matrix read the input as tiles.
inline bool takes_tiles(const Matrix& m) {
#if defined(USE_AMX)
  return m.format == BF16 && amx_permitted();
#else
  return false;
#endif
}

// An input element rounded to bf16. On AVX2, which has no product of bf16, it is stored as a float.
#if defined(USE_AVX2)
typedef float bf16_operand_t;
inline float to_bf16_operand(float x) { return bf16_to_float(float_to_bf16(x)); }
#else
typedef uint16_t bf16_operand_t;
inline uint16_t to_bf16_operand(float x) { return float_to_bf16(x); }
#endif

const int64_t TILE = 16;  // rows of a tile of AMX, and words of 32 bits of its rows

// The input of a product, R rows in fp32 and, where the weights call for it, also rounded to bf16.
// Columns are padded with zeros to a multiple of 64. For bf16 weights on AMX it is tiles instead:
// of 16 rows each, transposed, so that `width` words with the same two columns lie side by side.
struct Input {
  float* fp32;
  bf16_operand_t* bf16;  // null if `takes_bf16_input` is false
  int64_t stride;
  uint32_t* tiles = nullptr;  // [tile, stride / 2, width]; null if `takes_tiles` is false
  int64_t width = 0;          // of a tile: 16, or R if that is less

  uint32_t* tile(int64_t number) const { return tiles + number * (stride / 2) * width; }

  // Stores n columns of a row; `column` and n are even.
  void store(int64_t row, int64_t column, const float* x, int64_t n) const {
    if (tiles) {
      uint32_t* at = tile(row / TILE) + column / 2 * width + row % TILE;
      for (int64_t i = 0; i < n; i += 2, at += width)
        *at = float_to_bf16(x[i]) | uint32_t(float_to_bf16(x[i + 1])) << 16;
      return;
    }
    std::memcpy(fp32 + row * stride + column, x, n * sizeof(float));
    if (bf16) to_bf16(bf16 + row * stride + column, x, n);
  }

  static void to_bf16(bf16_operand_t* __restrict y, const float* __restrict x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = to_bf16_operand(x[i]);
  }
};

// Rows `begin` to `end` - 1 of weights, which are columns of y.
struct Range {
  int64_t begin, end;
};

// The rows of weights of one product, in chunks, partitioned among threads with work stealing. A
// thread takes chunks from the front of its own queue, then from the back of the others': on a
// shared machine one core may be slower than another.
class RowPartition {
 public:
  RowPartition(int64_t rows, int64_t chunk, int64_t threads)
      : rows_(rows), chunk_(chunk), threads_(threads), queues_(new Queue[threads]) {
    const uint64_t chunks = (rows + chunk - 1) / chunk;
    for (uint64_t t = 0; t < uint64_t(threads); t++)
      queues_[t].chunks = chunks * t / threads << 32 | chunks * (t + 1) / threads;
  }

  // Every thread calls this once. Calls `work` with ranges of rows until no queue has any left.
  template <class Work>
  void for_each(Work work) {
    const int64_t thread = omp_get_thread_num();
    for (int64_t other = 0; other < threads_; other++) {
      std::atomic<uint64_t>& queue = queues_[(thread + other) % threads_].chunks;
      for (uint64_t now = queue; now >> 32 < uint32_t(now);) {
        const uint64_t one = uint64_t(1), next = other ? now - one : now + (one << 32);
        if (!queue.compare_exchange_weak(now, next)) continue;
        const int64_t begin = chunk_ * (other ? uint32_t(next) : now >> 32);
        work(Range{begin, std::min(begin + chunk_, rows_)});
        now = queue;
      }
    }
  }

 private:
  // The first chunk in the upper 32 bits, one past the last in the lower ones. Aligned to a cache
  // line against false sharing.
  struct alignas(64) Queue {
    std::atomic<uint64_t> chunks;
  };

  int64_t rows_, chunk_, threads_;
  std::unique_ptr<Queue[]> queues_;
};

// Memory that one thread reuses from call to call, as fresh memory costs a page fault per page.
class Workspace {
 public:
  // Uninitialised; a larger request may move it.
  float* reserve(int64_t floats) {
    if (int64_t(memory_.size()) < floats) memory_.resize(floats);
    return memory_.data();
  }

 private:
  AlignedVector<float> memory_;
};

// Columns with their padding.
int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

// The distance between rows of a buffer: the padded columns and one or two cache lines more, as
// addresses that differ by a power of two compete for the same few places of a cache.
int64_t leading_dimension(int64_t columns) { return padded(columns) + 32; }

// A bump allocator for the buffers of one call, whose memory the next call reuses.
class Arena {
 public:
  // Uninitialised, and aligned to a cache line.
  template <class T>
  T* allocate(int64_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (chunks_.empty() || used_ + bytes > chunks_.back().size()) {
      chunks_.emplace_back(std::max<size_t>(bytes, size_t(1) << 20));
      used_ = 0;
    }
    used_ += bytes;
    return reinterpret_cast<T*>(chunks_.back().data() + used_ - bytes);
  }

  // Frees everything. Several chunks become one of their total size.
  void clear() {
    size_t total = 0;
    for (const AlignedVector<char>& chunk : chunks_) total += chunk.size();
    if (chunks_.size() > 1) {
      chunks_.clear();
      chunks_.emplace_back(total);
    }
    used_ = 0;
  }

 private:
  std::vector<AlignedVector<char>> chunks_;
  size_t used_ = 0;
};

// Borrows an arena from a pool while it is in scope. Several threads may call at once, and each
// gets another one.
class ScopedArena {
 public:
  ScopedArena() {
    const std::lock_guard<std::mutex> guard(lock_);
    if (free_.empty()) free_.push_back(std::make_unique<Arena>());
    arena_ = std::move(free_.back());
    free_.pop_back();
  }
  ~ScopedArena() {
    arena_->clear();
    const std::lock_guard<std::mutex> guard(lock_);
    free_.push_back(std::move(arena_));
  }
  ScopedArena(const ScopedArena&) = delete;
  Arena* operator->() { return arena_.get(); }

  // For products with matrices like `m`.
  Input allocate_input(const Matrix& m, int64_t R, int64_t columns) {
    const int64_t stride = leading_dimension(columns), used = padded(columns);
    if (takes_tiles(m)) {
      const int64_t width = std::min(R, TILE), tiles = (R + TILE - 1) / TILE;
      const Input in{nullptr, nullptr, used,
                     arena_->allocate<uint32_t>(tiles * used / 2 * width), width};
      // Also the rows beyond R of the last tile, so that no product meets old values.
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t whole = R - t * TILE < width ? 0 : columns / 2 * width;
        std::fill_n(in.tile(t) + whole, used / 2 * width - whole, 0);
      }
      return in;
    }
    const bool bf16 = takes_bf16_input(m);
    const Input in{arena_->allocate<float>(R * stride),
                   bf16 ? arena_->allocate<bf16_operand_t>(R * stride) : nullptr, stride};
    for (int64_t at = columns; at < R * stride; at += stride) {
      std::fill_n(in.fp32 + at, used - columns, 0);
      if (bf16) std::fill_n(in.bf16 + at, used - columns, 0);
    }
    return in;
  }

 private:
  static inline std::mutex lock_;
  static inline std::vector<std::unique_ptr<Arena>> free_;
  std::unique_ptr<Arena> arena_;
};

#define ALWAYS_INLINE inline __attribute__((always_inline))

// ---- the layout of packed operands
//
// Every kernel adds up an output in the same order, so that it does not depend, to the bit, on the
// kernel. There are 16 partial sums: of columns 0, 16, 32 ..., of columns 1, 17, 33 ..., and so on.
// `horizontal_sums` then adds them pairwise: i and i + 8, these pairs i and i + 4, and so on.
//
// Kernels with packed operands compute partial sums one after the other, in bit-reversed order.
// Then each can be added at once to a pending subtotal: the k-th partial sum is added to as many
// subtotals as k has trailing ones in binary, as in pairwise summation. Packed operands hold the
// columns of a partial sum together, and the partial sums in this order.
const int64_t PARTIALS = 16;
const int BIT_REVERSED[PARTIALS] = {0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15};

// R rows of input in tiles of at most MAX_MR rows, as even as possible.
template <int64_t MAX_MR>
struct RowTiles {
  int64_t R, count;

  explicit RowTiles(int64_t R) : R(R), count((R + MAX_MR - 1) / MAX_MR) {}
  int64_t first(int64_t tile) const { return R * tile / count; }
  int64_t rows(int64_t tile) const { return first(tile + 1) - first(tile); }
};

// Offsets into the packed input. GROUP tiles are multiplied with the columns of `per_pass` partial
// sums of a panel before the next columns; a group is stored in this order: [PARTIALS / per_pass,
// tile, per_pass, steps, rows of the tile]. A step is one column (on AVX-512 one word) of each
// partial sum.
template <class Tiles, int64_t GROUP>
struct PackedInputLayout {
  Tiles tiles;
  int64_t steps;
  int per_pass;

  // Of the pass that begins with the k-th partial sum.
  int64_t offset(int64_t group, int64_t tile, int64_t k) const {
    const int64_t first = tiles.first(group),
                  rows = tiles.first(std::min(group + GROUP, tiles.count)) - first;
    return steps * (PARTIALS * first + k * rows + per_pass * (tiles.first(tile) - first));
  }

  // Of the columns `partial`, `partial` + 16, ... of a tile.
  int64_t offset_of_partial(int64_t tile, int partial) const {
    const int k = BIT_REVERSED[partial];  // the order is its own inverse
    return offset(tile / GROUP * GROUP, tile, k / per_pass * per_pass) +
           k % per_pass * steps * tiles.rows(tile);
  }
};

// Prefetches a range of memory into the L2 cache, some cache lines at a time.
struct LinearPrefetch {
  const char* at;
  int64_t left;  // cache lines

  ALWAYS_INLINE void prefetch(int64_t lines) {
    lines = std::min(lines, left);
    left -= lines;
    for (; lines > 0; lines--, at += 64) ::prefetch(at, 0);
  }
};

// n int4 weights of a row to fp32, n a multiple of 64. 32 bytes hold 64 columns as levels plus 8:
// the first 32 in the low nibbles, the next 32 in the high ones. A level times its bf16 scale is
// exact.
inline void dequantise_int4(const uint8_t* w, const uint16_t* scales, int64_t n,
                            float* __restrict out) {
  for (int64_t c = 0; c < n; c += 64) {
    const float scale_1 = bf16_to_float(scales[c / 32]),
                scale_2 = bf16_to_float(scales[c / 32 + 1]);
    const uint8_t* at = w + c / 2;
    for (int i = 0; i < 32; i++) out[c + i] = float(int(at[i] & 15) - 8) * scale_1;
    for (int i = 0; i < 32; i++) out[c + 32 + i] = float(int(at[i] >> 4) - 8) * scale_2;
  }
}

}  // namespace
