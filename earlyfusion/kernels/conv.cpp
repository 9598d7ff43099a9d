// A 3 x 3 convolution by Winograd's F(4 x 4, 3 x 3), with the norm, swish, enlargement or sum beside
// it; a 1 x 1 convolution; the factors of a group norm; see conv.py.
//
// Each value is computed by the same instructions in the same order whatever the threads and the other
// pictures are.
//
// Threads own ranges of tile rows. A group of tile rows is read once, swished or enlarged, into
// `lines`; then each block of tiles is transformed, multiplied at its 36 points and transformed back
// while it is in the processor's cache. Rows at the edge of a range are copied before anybody writes,
// so that the result may overwrite the input.
//
// Layouts: x [B, Y, X, C], out and plus [B, Y, X, K], weight [K, C, 3, 3], the kernel at its points
// [36, panels, C, panel]; C is a multiple of 16. A panel is 1 to 4 vectors of output channels: those
// whose sums a product has in registers at once.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

namespace {

constexpr int64_t kLanes = 16, kPoints = 36, kBlock = 48;  // kBlock: tiles in the cache at once
constexpr float kA = 0.70710678118654752f, kB = 1.41421356237309505f;  // two of the points

// Each page of fresh memory costs a fault; large pages are 512 times fewer.
void use_large_pages(float* data, int64_t floats) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 1 << 21, start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + page - 1) / page * page, end = (start + floats * 4) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)floats;
#endif
}

struct Buffer {
  float* data;
  explicit Buffer(int64_t floats)
      : data(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 127) / 64 * 64))) {
    if (!data) throw std::bad_alloc();
    use_large_pages(data, floats);
  }
  ~Buffer() { std::free(data); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

// x / (1 + e^-x), e^-x to two units in the last place.
inline floats swish(floats x) {
  const floats low = floats{} - 87.0f, high = floats{} + 87.0f;
  floats y = -x;
  y = y < low ? low : y;
  y = y > high ? high : y;
  return x / (1.0f + exp_of(y, whole_number(y * 1.44269504088896341f)));
}

// ---- one dimension of the transforms, at the points 0, +-kA, +-kB and infinity; `step` is the
// distance between the values of an input

// 6 values of a tile to their 6 points.
inline void into_points(const floats16* d, int64_t step, floats16* r) {
  floats16 d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  floats16 even = d4 - 2.0f * d2, odd = kA * d3 - kB * d1;
  floats16 even2 = d4 - 0.5f * d2, odd2 = kB * d3 - kA * d1;
  r[0] = d[0] - 2.5f * d2 + d4;
  r[1] = even + odd;
  r[2] = even - odd;
  r[3] = even2 + odd2;
  r[4] = even2 - odd2;
  r[5] = d1 - 2.5f * d3 + d[5 * step];
}

// 6 points to the 4 results of a tile.
inline void from_points(const floats16* m, int64_t step, floats16* y) {
  floats16 s1 = m[step] + m[2 * step], t1 = m[step] - m[2 * step];
  floats16 s2 = m[3 * step] + m[4 * step], t2 = m[3 * step] - m[4 * step];
  y[0] = m[0] + s1 + s2;
  y[1] = kA * t1 + kB * t2;
  y[2] = 0.5f * s1 + 2.0f * s2;
  y[3] = 0.5f * kA * t1 + 2.0f * kB * t2 + m[5 * step];
}

// 3 values of a kernel to their 6 points.
inline void kernel_points(const floats16* w, int64_t step, floats16* r) {
  floats16 w0 = w[0], w1 = w[step], w2 = w[2 * step];
  floats16 even = (-2.0f / 3) * w0 - (1.0f / 3) * w2, odd = (-2.0f / 3 * kA) * w1;
  floats16 even2 = (1.0f / 6) * w0 + (1.0f / 3) * w2, odd2 = (kB / 6) * w1;
  r[0] = w0;
  r[1] = even + odd;
  r[2] = even - odd;
  r[3] = even2 + odd2;
  r[4] = even2 - odd2;
  r[5] = w2;
}

struct Job {
  const float *x, *weight, *bias, *plus, *scale, *shift;
  float* out;
  int64_t B, Y, X, C, K, enlarge;  // Y, X of the result; enlarge: twice the input's

  int64_t columns() const { return (K + kLanes - 1) / kLanes * kLanes; }
  // Columns per panel: as many of 4, 3, 2 vectors as divide all of them. Registers of eight floats
  // hold the sums of one.
  int64_t panel() const {
#if defined(VECTORS_OF_EIGHT)
    return kLanes;
#endif
    int64_t vectors = columns() / kLanes;
    for (int64_t n : {4, 3, 2})
      if (vectors % n == 0) return n * kLanes;
    return kLanes;
  }
  int64_t pitch() const { return (X + 2) * C; }  // of one padded row
};

// ---- the kernel at its 36 points

void transform_kernel(const Job& job, float* kernel) {
  const int64_t panel = job.panel(), panels = job.columns() / panel, vectors = panel / kLanes;
#pragma omp for collapse(2)
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t v = 0; v < vectors; ++v)
      for (int64_t c = 0; c < job.C; ++c) {
        floats16 w[9] = {}, rows[18], points[kPoints];
        const int64_t k = p * panel + v * kLanes, lanes = std::min(kLanes, job.K - k);
        const float* from = job.weight + (k * job.C + c) * 9;
        for (int64_t i = 0; i < lanes; ++i)
          for (int64_t s = 0; s < 9; ++s) w[s][i] = from[i * job.C * 9 + s];
        // rows: [column of the kernel][point]
        for (int64_t s = 0; s < 3; ++s) kernel_points(w + s, 3, rows + 6 * s);
        for (int64_t y = 0; y < 6; ++y) kernel_points(rows + y, 6, points + 6 * y);
        for (int64_t q = 0; q < kPoints; ++q)
          store(kernel + ((q * panels + p) * job.C + c) * panel + v * kLanes, points[q]);
      }
}

// ---- one block of tiles

void transform_tiles(const float* lines, const Job& job, int64_t first, int64_t count, float* tiles) {
  const int64_t across = job.X / 4, pitch = job.pitch();
  for (int64_t t = 0; t < count; ++t) {
    const float* corner = lines + (first + t) / across * 4 * pitch + (first + t) % across * 4 * job.C;
    for (int64_t c = 0; c < job.C; c += kLanes) {
      floats16 column[6], columns[36], points[6];  // columns: transformed along y
      for (int64_t x = 0; x < 6; ++x) {
        for (int64_t y = 0; y < 6; ++y) column[y] = load(corner + y * pitch + x * job.C + c);
        into_points(column, 1, columns + 6 * x);
      }
      for (int64_t y = 0; y < 6; ++y) {
        into_points(columns + y, 6, points);
        for (int64_t x = 0; x < 6; ++x)
          store(tiles + ((y * 6 + x) * kBlock + t) * job.C + c, points[x]);
      }
    }
  }
}

#if defined(VECTORS_OF_EIGHT)
template <int kRows, int>
inline void multiply_piece(const float* a, const float* b, float* out, int64_t depth, int64_t pitch) {
  __m256 low[kRows], high[kRows];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) low[r] = high[r] = _mm256_setzero_ps();
  for (int64_t c = 0; c < depth; ++c, b += kLanes) {
    const __m256 right_low = _mm256_load_ps(b), right_high = _mm256_load_ps(b + 8);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m256 left = _mm256_broadcast_ss(a + r * depth + c);
      low[r] = _mm256_fmadd_ps(left, right_low, low[r]);
      high[r] = _mm256_fmadd_ps(left, right_high, high[r]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    _mm256_store_ps(out + r * pitch, low[r]);
    _mm256_store_ps(out + r * pitch + 8, high[r]);
  }
}
#else
template <int kRows, int kVectors>
inline void multiply_piece(const float* a, const float* b, float* out, int64_t depth, int64_t pitch) {
  floats16 sum[kRows][kVectors] = {};
  for (int64_t c = 0; c < depth; ++c, b += kVectors * kLanes) {
    floats16 right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const float left = a[r * depth + c];
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fused(splat(left), right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(out + r * pitch + v * kLanes, sum[r][v]);
}
#endif

// out [count, columns] = a [count, depth] x b [panels, depth, panel]
template <int kVectors>
void multiply(const float* a, const float* b, float* out, int64_t count, const Job& job) {
  const int64_t columns = job.columns(), depth = job.C;
  for (int64_t k = 0; k < columns; k += kVectors * kLanes) {
    const float* panel = b + k * depth;
    int64_t t = 0;
    for (; t + 6 <= count; t += 6)
      multiply_piece<6, kVectors>(a + t * depth, panel, out + t * columns + k, depth, columns);
    for (; t + 2 <= count; t += 2)
      multiply_piece<2, kVectors>(a + t * depth, panel, out + t * columns + k, depth, columns);
    if (t < count)
      multiply_piece<1, kVectors>(a + t * depth, panel, out + t * columns + k, depth, columns);
  }
}

void multiply(const float* a, const float* b, float* out, int64_t count, const Job& job) {
  switch (job.panel() / kLanes) {
    case 4: multiply<4>(a, b, out, count, job); break;
    case 3: multiply<3>(a, b, out, count, job); break;
    case 2: multiply<2>(a, b, out, count, job); break;
    default: multiply<1>(a, b, out, count, job);
  }
}

void multiply_points(const float* tiles, const float* kernel, float* scores, int64_t count, const Job& job) {
  const int64_t columns = job.columns();
  for (int64_t q = 0; q < kPoints; ++q)
    multiply(tiles + q * kBlock * job.C, kernel + q * job.C * columns, scores + q * kBlock * columns, count,
             job);
}

// The first tile row of the group is `row`, counted over all pictures; kWhole: K is a multiple of 16.
template <bool kWhole>
void write_tiles(const float* scores, const Job& job, int64_t row, int64_t first, int64_t count) {
  const int64_t across = job.X / 4, columns = job.columns();
  for (int64_t t = 0; t < count; ++t) {
    const int64_t y0 = (row + (first + t) / across) * 4, x0 = (first + t) % across * 4;
    for (int64_t k = 0; k < job.K; k += kLanes) {
      const int64_t lanes = kWhole ? kLanes : std::min(kLanes, job.K - k);
      floats16 columns_back[24], result[4], bias = {};  // columns_back: transformed along y
      std::memcpy(&bias, job.bias + k, lanes * 4);
      for (int64_t x = 0; x < 6; ++x) {
        floats16 column[6];
        for (int64_t y = 0; y < 6; ++y)
          column[y] = load(scores + ((y * 6 + x) * kBlock + t) * columns + k);
        from_points(column, 1, columns_back + 4 * x);
      }
      for (int64_t y = 0; y < 4; ++y) {
        from_points(columns_back + y, 4, result);
        for (int64_t x = 0; x < 4; ++x) {
          const int64_t at = ((y0 + y) * job.X + x0 + x) * job.K + k;
          floats16 value = result[x] + bias, other = {};
          if (job.plus) {
            std::memcpy(&other, job.plus + at, lanes * 4);
            value += other;
          }
          std::memcpy(job.out + at, &value, lanes * 4);
        }
      }
    }
  }
}

// ---- rows of pixels

// A row of pixels of picture `b`, swished or enlarged, after one pixel of zeros.
void fill_line(const Job& job, const float* source, int64_t b, float* line) {
  const int64_t C = job.C;
  if (job.enlarge) {
    for (int64_t x = 0; x < job.X; ++x)
      std::memcpy(line + (x + 1) * C, source + x / 2 * C, C * 4);
  } else if (!job.scale) {
    std::memcpy(line + C, source, job.X * C * 4);
  } else {
    for (int64_t x = 0; x < job.X; ++x)
      for (int64_t c = 0; c < C; c += LANES) {
        const floats scale = read<floats>(job.scale + b * C + c), shift = read<floats>(job.shift + b * C + c);
        write(line + (x + 1) * C + c, swish(read<floats>(source + x * C + c) * scale + shift));
      }
  }
}

// The row of the input that row `y` of the result's height reads.
const float* source_row(const Job& job, int64_t b, int64_t y) {
  return job.enlarge ? job.x + (b * job.Y / 2 + y / 2) * (job.X / 2) * job.C
                     : job.x + (b * job.Y + y) * job.X * job.C;
}

// All tiles of the rows `from` to `to`; `edges` holds the input's row above and the one below.
void run(const Job& job, const float* kernel, int64_t from, int64_t to, float* edges) {
  const int64_t C = job.C, pitch = job.pitch(), across = job.X / 4, down = job.Y / 4;
  const int64_t size = job.X * C, most = std::max<int64_t>(1, kBlock / across);
  Buffer lines((4 * most + 2) * pitch), tiles(kPoints * kBlock * C);
  Buffer scores(kPoints * kBlock * job.columns());
  std::memset(lines.data, 0, (4 * most + 2) * pitch * 4);
  int64_t ready = 0;  // lines at the top that the previous group has filled
  for (int64_t row = from, rows; row < to; row += rows) {
    const int64_t b = row / down, top = row % down;
    rows = std::min({most, to - row, down - top});
    for (int64_t i = ready; i < 4 * rows + 2; ++i) {
      const int64_t y = 4 * top - 1 + i;
      float* line = lines.data + i * pitch;
      if (y < 0 || y >= job.Y) {
        std::memset(line, 0, pitch * 4);
      } else if (row == from && i == 0) {
        fill_line(job, edges, b, line);
      } else if (row + rows == to && i == 4 * rows + 1) {
        fill_line(job, edges + size, b, line);
      } else {
        fill_line(job, source_row(job, b, y), b, line);
      }
    }
    for (int64_t t = 0; t < rows * across; t += kBlock) {
      const int64_t count = std::min(kBlock, rows * across - t);
      transform_tiles(lines.data, job, t, count, tiles.data);
      multiply_points(tiles.data, kernel, scores.data, count, job);
      if (job.K % kLanes == 0)
        write_tiles<true>(scores.data, job, row, t, count);
      else
        write_tiles<false>(scores.data, job, row, t, count);
    }
    ready = top + rows < down ? 2 : 0;
    if (ready) std::memmove(lines.data, lines.data + 4 * rows * pitch, 2 * pitch * 4);
  }
}

// ---- a 1 x 1 convolution

// weight [K, C] to panels [panels, C, panel]
void order_weight(const Job& job, float* panels) {
  const int64_t panel = job.panel();
#pragma omp for
  for (int64_t first = 0; first < job.columns(); first += panel)
    for (int64_t c = 0; c < job.C; ++c)
      for (int64_t k = first; k < first + panel; ++k)
        panels[first * job.C + c * panel + k - first] = k < job.K ? job.weight[k * job.C + c] : 0;
}

void multiply_pixels(const Job& job, const float* panels, float* scores, int64_t first, int64_t count) {
  multiply(job.x + first * job.C, panels, scores, count, job);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (first + i) * job.K;
    for (int64_t k = 0; k < job.K; ++k) {
      const float value = scores[i * job.columns() + k] + job.bias[k];
      job.out[at + k] = job.plus ? value + job.plus[at + k] : value;
    }
  }
}

// ---- the factors of a group norm

constexpr int64_t kRun = 64, kPiece = 1024;  // pixels summed in floats; in doubles, by one thread

// The sums of the values and of their squares [2, C] of `count` pixels.
void sum_pixels(const float* x, int64_t count, int64_t C, float* run, double* sums) {
  std::fill(sums, sums + 2 * C, 0.0);
  for (int64_t first = 0; first < count; first += kRun) {
    std::fill(run, run + 2 * C, 0.0f);
    for (int64_t i = first; i < std::min(first + kRun, count); ++i)
      for (int64_t c = 0; c < C; c += kLanes) {
        const floats16 value = load(x + i * C + c);
        store(run + c, load(run + c) + value);
        store(run + C + c, fused(value, value, load(run + C + c)));
      }
    for (int64_t c = 0; c < 2 * C; ++c) sums[c] += run[c];
  }
}

}  // namespace

// out [N, K] = x [N, C] x weight [K, C] + bias + plus, where `plus` may be null; C is a multiple of 16.
// `panels` is room for C * K floats, K rounded up to a multiple of 16.
extern "C" void earlyfusion_conv1x1(const float* x, const float* weight, const float* bias,
                                    const float* plus, float* out, float* panels, int64_t N, int64_t C,
                                    int64_t K, int64_t threads) {
  const Job job{x, weight, bias, plus, nullptr, nullptr, out, 1, N, 1, C, K, 0};
#pragma omp parallel num_threads(threads)
  {
    Buffer scores(kBlock * job.columns());
    order_weight(job, panels);
#pragma omp for
    for (int64_t first = 0; first < N; first += kBlock)
      multiply_pixels(job, panels, scores.data, first, std::min(kBlock, N - first));
  }
}

// A group norm of x [B, N, C] as one factor and one term per picture and channel [B, C]; `sums` is room
// for 2 * B * C doubles for every 1024 pixels of a picture, or part of them.
extern "C" void earlyfusion_norm(const float* x, const float* weight, const float* bias, float* scale,
                                 float* shift, double* sums, double eps, int64_t B, int64_t N, int64_t C,
                                 int64_t groups, int64_t threads) {
  const int64_t pieces = (N + kPiece - 1) / kPiece, members = C / groups;
#pragma omp parallel num_threads(threads)
  {
    Buffer run(2 * C);
#pragma omp for
    for (int64_t i = 0; i < B * pieces; ++i) {
      const int64_t b = i / pieces, first = i % pieces * kPiece;
      sum_pixels(x + (b * N + first) * C, std::min(kPiece, N - first), C, run.data, sums + i * 2 * C);
    }
#pragma omp for
    for (int64_t b = 0; b < B; ++b) {
      double* all = sums + b * pieces * 2 * C;
      for (int64_t i = 1; i < pieces; ++i)
        for (int64_t c = 0; c < 2 * C; ++c) all[c] += all[i * 2 * C + c];
      for (int64_t g = 0; g < groups; ++g) {
        double mean = 0, square = 0;
        for (int64_t c = g * members; c < (g + 1) * members; ++c) mean += all[c], square += all[C + c];
        mean /= N * members, square /= N * members;
        // Mean square minus squared mean: cancellation does no harm in doubles.
        const double factor = 1 / std::sqrt(std::max(square - mean * mean, 0.0) + eps);
        for (int64_t c = g * members; c < (g + 1) * members; ++c) {
          scale[b * C + c] = float(factor * weight[c]);
          shift[b * C + c] = float(bias[c] - mean * factor * weight[c]);
        }
      }
    }
  }
}

// `kernel` is room for 36 * C * K floats, K rounded up to a multiple of 16. `plus` may be null, and
// so may `scale` and `shift` [B, C], whose swish comes before the convolution.
extern "C" void earlyfusion_conv3x3(const float* x, const float* weight, const float* bias,
                                    const float* plus, const float* scale, const float* shift,
                                    float* out, float* kernel, int64_t B, int64_t Y, int64_t X, int64_t C,
                                    int64_t K, int64_t enlarge, int64_t threads) {
  const Job job{x, weight, bias, plus, scale, shift, out, B, Y, X, C, K, enlarge};
  const int64_t rows = B * Y / 4, size = X * C;
  Buffer edges(threads * 2 * size);
  use_large_pages(kernel, kPoints * C * job.columns());
  if (out != x) use_large_pages(out, B * Y * X * K);
#pragma omp parallel num_threads(threads)
  {
    const int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
    const int64_t from = rows * id / all, to = rows * (id + 1) / all;
    float* own_edges = edges.data + 2 * size * id;
    if (from < to) {
      const int64_t b = from / (Y / 4), end = (to - 1) / (Y / 4);
      const int64_t above = from % (Y / 4) * 4 - 1, below = ((to - 1) % (Y / 4) + 1) * 4;
      const int64_t bytes = (enlarge ? size / 2 : size) * 4;
      if (above >= 0) std::memcpy(own_edges, source_row(job, b, above), bytes);
      if (below < Y) std::memcpy(own_edges + size, source_row(job, end, below), bytes);
    }
    transform_kernel(job, kernel);  // ends with a barrier, so that edges are copied before writes
    run(job, kernel, from, to, own_edges);
  }
}
