// Convolutions and norms of the VQ-GAN for conv.py: 3 x 3 by Winograd's F(4 x 4, 3 x 3), with the
// norm and swish or upsampling before it and the sum with the shortcut after it; 1 x 1 as a GEMM;
// and the factors of a group norm.
//
// Each value is computed by the same instructions in the same order, whatever the number of threads
// and the other images of the batch.
//
// The transformed filters may be kept from call to call, with a copy of the weights that they were
// computed from: where the weights differ from it, they are computed again.
//
// 3 x 3: a thread has a range of tile rows. A group of tile rows is read once, with norm and swish
// or upsampling, into `padded_rows`. Then each block of tiles goes through the input transform, the
// 36 GEMMs of the transformed domain, and the output transform while it is in the cache. The rows
// around a range (its halo) are copied before any thread writes, so that the result may overwrite
// the input.
//
// Layouts: x [B, Y, X, C], out and plus [B, Y, X, K], weight [K, C, 3, 3], transformed filters [36,
// panels, C, panel]; C is a multiple of 16. A panel is 1 to 4 vectors of output channels, whose
// sums the microkernel has in registers.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

namespace {

// POINTS: elements of a transformed tile; TILE_BLOCK: tiles in the cache at once.
constexpr int64_t VECTOR = 16, POINTS = 36, TILE_BLOCK = 36;
// Two of the interpolation points, sqrt(1/2) and sqrt(2).
constexpr float POINT_A = 0.70710678118654752f, POINT_B = 1.41421356237309505f;

// Fresh memory costs a page fault per page; huge pages are 512 times fewer.
void use_large_pages(float* data, int64_t floats) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t page = 1 << 21, start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + page - 1) / page * page,
                  end = (start + floats * 4) / page * page;
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

// x / (1 + e^-x), with e^-x to two units in the last place.
inline floats swish(floats x) {
  const floats low = floats{} - 87.0f, high = floats{} + 87.0f;
  floats y = -x;
  y = y < low ? low : y;
  y = y > high ? high : y;
  return x / (1.0f + exp_split(y, round_to_integer(y * 1.44269504088896341f)));
}

// ---- the transforms in one dimension, for the interpolation points 0, +-POINT_A, +-POINT_B and
// infinity; `step` is the distance between the values of the input

// Input transform B^T d: 6 values of a tile to 6 transformed ones.
inline void input_transform(const floats16* d, int64_t step, floats16* r) {
  floats16 d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step];
  floats16 even = d4 - 2.0f * d2, odd = POINT_A * d3 - POINT_B * d1;
  floats16 even2 = d4 - 0.5f * d2, odd2 = POINT_B * d3 - POINT_A * d1;
  r[0] = d[0] - 2.5f * d2 + d4;
  r[1] = even + odd;
  r[2] = even - odd;
  r[3] = even2 + odd2;
  r[4] = even2 - odd2;
  r[5] = d1 - 2.5f * d3 + d[5 * step];
}

// Output transform A^T m: 6 transformed values to the 4 results of a tile.
inline void output_transform(const floats16* m, int64_t step, floats16* y) {
  floats16 s1 = m[step] + m[2 * step], t1 = m[step] - m[2 * step];
  floats16 s2 = m[3 * step] + m[4 * step], t2 = m[3 * step] - m[4 * step];
  y[0] = m[0] + s1 + s2;
  y[1] = POINT_A * t1 + POINT_B * t2;
  y[2] = 0.5f * s1 + 2.0f * s2;
  y[3] = 0.5f * POINT_A * t1 + 2.0f * POINT_B * t2 + m[5 * step];
}

// Filter transform G w: 3 weights to 6 transformed ones.
inline void filter_transform(const floats16* w, int64_t step, floats16* r) {
  floats16 w0 = w[0], w1 = w[step], w2 = w[2 * step];
  floats16 even = (-2.0f / 3) * w0 - (1.0f / 3) * w2, odd = (-2.0f / 3 * POINT_A) * w1;
  floats16 even2 = (1.0f / 6) * w0 + (1.0f / 3) * w2, odd2 = (POINT_B / 6) * w1;
  r[0] = w0;
  r[1] = even + odd;
  r[2] = even - odd;
  r[3] = even2 + odd2;
  r[4] = even2 - odd2;
  r[5] = w2;
}

struct Conv {
  const float *x, *weight, *bias, *plus, *scale, *shift;
  float* out;
  int64_t B, Y, X, C, K;  // Y, X: of the result
  int64_t upsample;       // 1 if the input has half of Y and X, else 0

  int64_t columns() const { return (K + VECTOR - 1) / VECTOR * VECTOR; }
  // Output channels of a panel: the largest of 4, 3, 2 vectors that divides all of them. On AVX2
  // the registers hold the sums of one.
  int64_t panel() const {
#if defined(USE_AVX2)
    return VECTOR;
#endif
    int64_t vectors = columns() / VECTOR;
    for (int64_t n : {4, 3, 2})
      if (vectors % n == 0) return n * VECTOR;
    return VECTOR;
  }
  int64_t pitch() const { return (X + 2) * C; }  // floats of a padded row
};

// ---- filter transform

void transform_filters(const Conv& conv, float* filters) {
  const int64_t panel = conv.panel(), panels = conv.columns() / panel, vectors = panel / VECTOR;
  // Of VECTOR input channels: stores to 36 places that are a power of two apart evict each other.
  Buffer block(POINTS * VECTOR * panel);
#pragma omp for collapse(2)
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t first = 0; first < conv.C; first += VECTOR) {
      for (int64_t v = 0; v < vectors; ++v)
        for (int64_t c = 0; c < VECTOR; ++c) {
          floats16 w[9] = {}, rows[18], points[POINTS];
          const int64_t k = p * panel + v * VECTOR, lanes = std::min(VECTOR, conv.K - k);
          const float* from = conv.weight + (k * conv.C + first + c) * 9;
          for (int64_t i = 0; i < lanes; ++i)
            for (int64_t s = 0; s < 9; ++s) w[s][i] = from[i * conv.C * 9 + s];
          // rows: transformed along y, [column of the filter][6]
          for (int64_t s = 0; s < 3; ++s) filter_transform(w + s, 3, rows + 6 * s);
          for (int64_t y = 0; y < 6; ++y) filter_transform(rows + y, 6, points + 6 * y);
          for (int64_t q = 0; q < POINTS; ++q)
            store(block.data + (q * VECTOR + c) * panel + v * VECTOR, points[q]);
        }
      for (int64_t q = 0; q < POINTS; ++q)
        std::memcpy(filters + ((q * panels + p) * conv.C + first) * panel,
                    block.data + q * VECTOR * panel, VECTOR * panel * 4);
    }
}

// ---- a block of tiles

// Input transform of `count` tiles, from the group's tile `first` on: [36, TILE_BLOCK, C].
void transform_inputs(const float* padded_rows, const Conv& conv, int64_t first, int64_t count,
                      float* tiles) {
  const int64_t tiles_x = conv.X / 4, pitch = conv.pitch();
  for (int64_t t = 0; t < count; ++t) {
    const float* corner =
        padded_rows + (first + t) / tiles_x * 4 * pitch + (first + t) % tiles_x * 4 * conv.C;
    for (int64_t c = 0; c < conv.C; c += VECTOR) {
      floats16 column[6], columns_y[36], transformed[6];  // columns_y: transformed along y
      for (int64_t x = 0; x < 6; ++x) {
        for (int64_t y = 0; y < 6; ++y) column[y] = load(corner + y * pitch + x * conv.C + c);
        input_transform(column, 1, columns_y + 6 * x);
      }
      for (int64_t y = 0; y < 6; ++y) {
        input_transform(columns_y + y, 6, transformed);
        for (int64_t x = 0; x < 6; ++x)
          store(tiles + ((y * 6 + x) * TILE_BLOCK + t) * conv.C + c, transformed[x]);
      }
    }
  }
}

// out [MR, NV * VECTOR] = a [MR, depth] . b [depth, NV * VECTOR], whose sums stay in registers;
// rows of `out` are `pitch` floats apart. On AVX2 NV is 1.
#if defined(USE_AVX2)
template <int MR, int>
inline void microkernel(const float* a, const float* b, float* out, int64_t depth, int64_t pitch) {
  __m256 low[MR], high[MR];
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r) low[r] = high[r] = _mm256_setzero_ps();
  for (int64_t c = 0; c < depth; ++c, b += VECTOR) {
    const __m256 right_low = _mm256_load_ps(b), right_high = _mm256_load_ps(b + 8);
#pragma GCC unroll 6
    for (int r = 0; r < MR; ++r) {
      const __m256 left = _mm256_broadcast_ss(a + r * depth + c);
      low[r] = _mm256_fmadd_ps(left, right_low, low[r]);
      high[r] = _mm256_fmadd_ps(left, right_high, high[r]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < MR; ++r) {
    _mm256_store_ps(out + r * pitch, low[r]);
    _mm256_store_ps(out + r * pitch + 8, high[r]);
  }
}
#else
template <int MR, int NV>
inline void microkernel(const float* a, const float* b, float* out, int64_t depth, int64_t pitch) {
  floats16 sum[MR][NV] = {};
  for (int64_t c = 0; c < depth; ++c, b += NV * VECTOR) {
    floats16 right[NV];
    for (int v = 0; v < NV; ++v) right[v] = load(b + v * VECTOR);
    for (int r = 0; r < MR; ++r) {
      const float left = a[r * depth + c];
      for (int v = 0; v < NV; ++v) sum[r][v] = fmadd(broadcast(left), right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < MR; ++r)
    for (int v = 0; v < NV; ++v) store(out + r * pitch + v * VECTOR, sum[r][v]);
}
#endif

// out [count, columns] = a [count, depth] . b [panels, depth, panel]
template <int NV>
void gemm(const float* a, const float* b, float* out, int64_t count, const Conv& conv) {
  const int64_t columns = conv.columns(), depth = conv.C;
  for (int64_t k = 0; k < columns; k += NV * VECTOR) {
    const float* panel = b + k * depth;
    int64_t t = 0;
    for (; t + 6 <= count; t += 6)
      microkernel<6, NV>(a + t * depth, panel, out + t * columns + k, depth, columns);
    for (; t + 4 <= count; t += 4)  // an image of 8 x 8 has four tiles
      microkernel<4, NV>(a + t * depth, panel, out + t * columns + k, depth, columns);
    for (; t + 2 <= count; t += 2)
      microkernel<2, NV>(a + t * depth, panel, out + t * columns + k, depth, columns);
    if (t < count) microkernel<1, NV>(a + t * depth, panel, out + t * columns + k, depth, columns);
  }
}

void gemm(const float* a, const float* b, float* out, int64_t count, const Conv& conv) {
  switch (conv.panel() / VECTOR) {
    case 4: gemm<4>(a, b, out, count, conv); break;
    case 3: gemm<3>(a, b, out, count, conv); break;
    case 2: gemm<2>(a, b, out, count, conv); break;
    default: gemm<1>(a, b, out, count, conv);
  }
}

// The 36 products of the transformed domain: [36, TILE_BLOCK, columns].
void batched_gemm(const float* tiles, const float* filters, float* products, int64_t count,
                  const Conv& conv) {
  const int64_t columns = conv.columns();
  for (int64_t q = 0; q < POINTS; ++q)
    gemm(tiles + q * TILE_BLOCK * conv.C, filters + q * conv.C * columns,
         products + q * TILE_BLOCK * columns, count, conv);
}

// Output transform of a block of tiles, plus bias and `plus`. `row` is the group's first tile row,
// counted over all images. FULL: K is a multiple of 16.
template <bool FULL>
void transform_outputs(const float* products, const Conv& conv, int64_t row, int64_t first,
                       int64_t count) {
  const int64_t tiles_x = conv.X / 4, columns = conv.columns();
  for (int64_t t = 0; t < count; ++t) {
    const int64_t y0 = (row + (first + t) / tiles_x) * 4, x0 = (first + t) % tiles_x * 4;
    for (int64_t k = 0; k < conv.K; k += VECTOR) {
      const int64_t lanes = FULL ? VECTOR : std::min(VECTOR, conv.K - k);
      floats16 columns_y[24], result[4], bias = {};  // columns_y: transformed along y
      std::memcpy(&bias, conv.bias + k, lanes * 4);
      for (int64_t x = 0; x < 6; ++x) {
        floats16 column[6];
        for (int64_t y = 0; y < 6; ++y)
          column[y] = load(products + ((y * 6 + x) * TILE_BLOCK + t) * columns + k);
        output_transform(column, 1, columns_y + 4 * x);
      }
      for (int64_t y = 0; y < 4; ++y) {
        output_transform(columns_y + y, 4, result);
        for (int64_t x = 0; x < 4; ++x) {
          const int64_t at = ((y0 + y) * conv.X + x0 + x) * conv.K + k;
          floats16 value = result[x] + bias, other = {};
          if (conv.plus) {
            std::memcpy(&other, conv.plus + at, lanes * 4);
            value += other;
          }
          std::memcpy(conv.out + at, &value, lanes * 4);
        }
      }
    }
  }
}

// ---- rows of pixels

// Fills a padded row with a row of pixels of image `b`, after norm and swish or upsampling, with
// one pixel of zeros before it.
void prepare_row(const Conv& conv, const float* source, int64_t b, float* padded_row) {
  const int64_t C = conv.C;
  if (conv.upsample) {
    for (int64_t x = 0; x < conv.X; ++x)
      std::memcpy(padded_row + (x + 1) * C, source + x / 2 * C, C * 4);
  } else if (!conv.scale) {
    std::memcpy(padded_row + C, source, conv.X * C * 4);
  } else {
    for (int64_t x = 0; x < conv.X; ++x)
      for (int64_t c = 0; c < C; c += LANES) {
        const floats scale = load_vector<floats>(conv.scale + b * C + c),
                     shift = load_vector<floats>(conv.shift + b * C + c);
        store_vector(padded_row + (x + 1) * C + c,
                     swish(load_vector<floats>(source + x * C + c) * scale + shift));
      }
  }
}

// The row of the input that becomes row `y`, after upsampling if there is any.
const float* source_row(const Conv& conv, int64_t b, int64_t y) {
  return conv.upsample ? conv.x + (b * conv.Y / 2 + y / 2) * (conv.X / 2) * conv.C
                       : conv.x + (b * conv.Y + y) * conv.X * conv.C;
}

// Convolves the tile rows `from` to `to`; `halo` holds the input's row above them and the one
// below.
void convolve(const Conv& conv, const float* filters, int64_t from, int64_t to, float* halo) {
  const int64_t C = conv.C, pitch = conv.pitch(), tiles_x = conv.X / 4, tiles_y = conv.Y / 4;
  const int64_t row_size = conv.X * C, max_rows = std::max<int64_t>(1, TILE_BLOCK / tiles_x);
  Buffer padded_rows((4 * max_rows + 2) * pitch), tiles(POINTS * TILE_BLOCK * C);
  Buffer products(POINTS * TILE_BLOCK * conv.columns());
  std::memset(padded_rows.data, 0, (4 * max_rows + 2) * pitch * 4);
  int64_t ready = 0;  // rows at the top that the previous group has filled
  for (int64_t row = from, rows; row < to; row += rows) {
    const int64_t b = row / tiles_y, top = row % tiles_y;
    rows = std::min({max_rows, to - row, tiles_y - top});
    for (int64_t i = ready; i < 4 * rows + 2; ++i) {
      const int64_t y = 4 * top - 1 + i;
      float* padded_row = padded_rows.data + i * pitch;
      if (y < 0 || y >= conv.Y) {
        std::memset(padded_row, 0, pitch * 4);
      } else if (row == from && i == 0) {
        prepare_row(conv, halo, b, padded_row);
      } else if (row + rows == to && i == 4 * rows + 1) {
        prepare_row(conv, halo + row_size, b, padded_row);
      } else {
        prepare_row(conv, source_row(conv, b, y), b, padded_row);
      }
    }
    for (int64_t t = 0; t < rows * tiles_x; t += TILE_BLOCK) {
      const int64_t count = std::min(TILE_BLOCK, rows * tiles_x - t);
      transform_inputs(padded_rows.data, conv, t, count, tiles.data);
      batched_gemm(tiles.data, filters, products.data, count, conv);
      if (conv.K % VECTOR == 0)
        transform_outputs<true>(products.data, conv, row, t, count);
      else
        transform_outputs<false>(products.data, conv, row, t, count);
    }
    ready = top + rows < tiles_y ? 2 : 0;
    if (ready) std::memmove(padded_rows.data, padded_rows.data + 4 * rows * pitch, 2 * pitch * 4);
  }
}

// ---- a 1 x 1 convolution

// Packs weight [K, C] into panels [panels, C, panel].
void pack_weights(const Conv& conv, float* panels) {
  const int64_t panel = conv.panel();
#pragma omp for
  for (int64_t first = 0; first < conv.columns(); first += panel)
    for (int64_t c = 0; c < conv.C; ++c)
      for (int64_t k = first; k < first + panel; ++k)
        panels[first * conv.C + c * panel + k - first] =
            k < conv.K ? conv.weight[k * conv.C + c] : 0;
}

void conv1x1_block(const Conv& conv, const float* panels, float* products, int64_t first,
                   int64_t count) {
  gemm(conv.x + first * conv.C, panels, products, count, conv);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = (first + i) * conv.K;
    for (int64_t k = 0; k < conv.K; ++k) {
      const float value = products[i * conv.columns() + k] + conv.bias[k];
      conv.out[at + k] = conv.plus ? value + conv.plus[at + k] : value;
    }
  }
}

// ---- group norm

// FLOAT_PIXELS: pixels summed in floats; SUM_PIXELS: pixels summed in doubles by one thread.
constexpr int64_t FLOAT_PIXELS = 64, SUM_PIXELS = 1024;

// The sums of the values and of their squares [2, C] of `count` pixels; `partial` is scratch for 2
// * C floats.
void sum_moments(const float* x, int64_t count, int64_t C, float* partial, double* sums) {
  std::fill(sums, sums + 2 * C, 0.0);
  for (int64_t first = 0; first < count; first += FLOAT_PIXELS) {
    std::fill(partial, partial + 2 * C, 0.0f);
    for (int64_t i = first; i < std::min(first + FLOAT_PIXELS, count); ++i)
      for (int64_t c = 0; c < C; c += VECTOR) {
        const floats16 value = load(x + i * C + c);
        store(partial + c, load(partial + c) + value);
        store(partial + C + c, fmadd(value, value, load(partial + C + c)));
      }
    for (int64_t c = 0; c < 2 * C; ++c) sums[c] += partial[c];
  }
}

// A group norm of x [B, N, C] as scale and shift [B, C] per image and channel, so that it is
// x * scale + shift.
struct GroupNorm {
  const float *x, *weight, *bias;
  float *scale, *shift;
  int64_t B, N, C, groups;
  double eps;

  int64_t parts() const { return (N + SUM_PIXELS - 1) / SUM_PIXELS; }
  int64_t num_sums() const { return B * parts() * 2 * C; }

  // For all threads of a team; `sums` is scratch for `num_sums()` doubles. Ends with a barrier.
  void run(double* sums) const {
    const int64_t group_size = C / groups;
    Buffer partial(2 * C);
#pragma omp for
    for (int64_t i = 0; i < B * parts(); ++i) {
      const int64_t b = i / parts(), first = i % parts() * SUM_PIXELS;
      sum_moments(x + (b * N + first) * C, std::min(SUM_PIXELS, N - first), C, partial.data,
                  sums + i * 2 * C);
    }
#pragma omp for
    for (int64_t b = 0; b < B; ++b) {
      double* all = sums + b * parts() * 2 * C;
      for (int64_t i = 1; i < parts(); ++i)
        for (int64_t c = 0; c < 2 * C; ++c) all[c] += all[i * 2 * C + c];
      for (int64_t g = 0; g < groups; ++g) {
        double mean = 0, square = 0;
        for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c)
          mean += all[c], square += all[C + c];
        mean /= N * group_size, square /= N * group_size;
        // Mean square minus squared mean: its cancellation does no harm in doubles.
        const double factor = 1 / std::sqrt(std::max(square - mean * mean, 0.0) + eps);
        for (int64_t c = g * group_size; c < (g + 1) * group_size; ++c) {
          scale[b * C + c] = float(factor * weight[c]);
          shift[b * C + c] = float(bias[c] - mean * factor * weight[c]);
        }
      }
    }
  }
};

}  // namespace

// out [N, K] = x [N, C] . weight [K, C]^T + bias + plus, where `plus` may be null; C is a multiple
// of 16. `panels` is scratch for C * K floats, K rounded up to a multiple of 16.
extern "C" void earlyfusion_conv1x1(const float* x, const float* weight, const float* bias,
                                    const float* plus, float* out, float* panels, int64_t N,
                                    int64_t C, int64_t K, int64_t threads) {
  const Conv conv{x, weight, bias, plus, nullptr, nullptr, out, 1, N, 1, C, K, 0};
#pragma omp parallel num_threads(threads)
  {
    Buffer products(TILE_BLOCK * conv.columns());
    pack_weights(conv, panels);
#pragma omp for
    for (int64_t first = 0; first < N; first += TILE_BLOCK)
      conv1x1_block(conv, panels, products.data, first, std::min(TILE_BLOCK, N - first));
  }
}

// A group norm of x [B, N, C] as scale and shift [B, C] per image and channel.
extern "C" void earlyfusion_group_norm(const float* x, const float* weight, const float* bias,
                                       float* scale, float* shift, double eps, int64_t B, int64_t N,
                                       int64_t C, int64_t groups, int64_t threads) {
  const GroupNorm norm{x, weight, bias, scale, shift, B, N, C, groups, eps};
  std::vector<double> sums(norm.num_sums());
#pragma omp parallel num_threads(threads)
  norm.run(sums.data());
}

// A 3 x 3 convolution with a border of zeros. `plus` may be null, and so may `norm_weight` and
// `norm_bias` [C] of a group norm, which comes with a swish before the convolution. `filters` is
// for 36 * C * K floats, K rounded up to a multiple of 16. If they are kept from call to call,
// `filters_of` has the weights that they were computed from; else it is null.
extern "C" void earlyfusion_conv3x3(const float* x, const float* weight, const float* bias,
                                    const float* plus, const float* norm_weight,
                                    const float* norm_bias, float* out, float* filters,
                                    float* filters_of, double eps, int64_t groups, int64_t B,
                                    int64_t Y, int64_t X, int64_t C, int64_t K, int64_t upsample,
                                    int64_t threads) {
  const int64_t rows = B * Y / 4, row_size = X * C;
  Buffer halo(threads * 2 * row_size), factors(norm_weight ? 2 * B * C : 0);
  float *scale = norm_weight ? factors.data : nullptr, *shift = factors.data + B * C;
  const GroupNorm norm{x, norm_weight, norm_bias, scale, shift, B, Y * X, C, groups, eps};
  std::vector<double> sums(norm_weight ? norm.num_sums() : 0);
  const Conv conv{x, weight, bias, plus, scale, shift, out, B, Y, X, C, K, upsample};
  std::atomic<bool> is_stale{filters_of == nullptr};
  use_large_pages(filters, POINTS * C * conv.columns());
  if (out != x) use_large_pages(out, B * Y * X * K);
#pragma omp parallel num_threads(threads)
  {
    const int64_t id = omp_get_thread_num(), all = omp_get_num_threads();
    const int64_t from = rows * id / all, to = rows * (id + 1) / all;
    float* own_halo = halo.data + 2 * row_size * id;
    if (from < to) {
      const int64_t b = from / (Y / 4), end = (to - 1) / (Y / 4);
      const int64_t above = from % (Y / 4) * 4 - 1, below = ((to - 1) % (Y / 4) + 1) * 4;
      const int64_t bytes = (upsample ? row_size / 2 : row_size) * 4;
      if (above >= 0) std::memcpy(own_halo, source_row(conv, b, above), bytes);
      if (below < Y) std::memcpy(own_halo + row_size, source_row(conv, end, below), bytes);
    }
    const int64_t first = K * C * 9 * id / all, bytes = (K * C * 9 * (id + 1) / all - first) * 4;
    if (filters_of && std::memcmp(weight + first, filters_of + first, bytes)) is_stale = true;
    if (norm_weight) norm.run(sums.data());
    // All halos are copied before any thread writes, and all weights compared.
#pragma omp barrier
    if (is_stale) {
      transform_filters(conv, filters);  // ends with a barrier
      if (filters_of) std::memcpy(filters_of + first, weight + first, bytes);
    }
    convolve(conv, filters, from, to, own_halo);
  }
}
