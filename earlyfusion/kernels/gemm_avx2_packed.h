// GEMM with fp32 and bf16 weights for many rows of input on AVX2, with packed operands, as in
// GotoBLAS and BLIS.
//
// In the kernels of gemm.h a lane holds a partial sum of one output, so that weights are read as
// they lie; with many rows of input they are bound by loads. Here a lane is another output: the
// microkernel multiplies one column of 16 rows of weights, two vectors, with a broadcast element of
// the input. The 16 partial sums of an output are computed one after the other and added up in the
// order of all kernels (operands.h).
//
// NR rows of weights are packed into a panel of floats, which stays in the L2 cache while all rows
// of input are multiplied with it. The part of a panel that belongs to one partial sum, or to a
// few, stays in the L1 cache for GROUP_TILES tiles of input. The weights of the next panel are
// prefetched meanwhile.

#pragma once

#include "operands.h"

#if defined(USE_AVX2)

namespace {

const int64_t NR = 16;              // rows of weights of a panel
const int64_t PACKED_MR = 6;        // rows of input of a tile: its sums take 2 * 6 of 16 registers
const int64_t GROUP_TILES = 8;      // tiles multiplied with a part of a panel while it is in L1
const int64_t PREFETCH_STEPS = 32;  // steps after which more of the next panel is prefetched

const int64_t PACKED_MIN_ROWS = 22;  // of input: with fewer, `gemm_blocked` is faster

// Eight rows of a matrix. In place of rows beyond the matrix its last row is read again; their
// results are not used.
struct EightRows {
  const char* row[8];

  EightRows(const Matrix& m, int64_t first) {
    const int64_t bytes = row_bytes(m);
    for (int64_t r = 0; r < 8; r++) {
      const int64_t number = std::min(first + r, m.rows - 1);
      row[r] = static_cast<const char*>(m.data) + number * bytes;
    }
  }

  // The same for `count` rows of floats.
  EightRows(const float* first, int64_t stride, int64_t count) {
    for (int64_t r = 0; r < 8; r++)
      row[r] = reinterpret_cast<const char*>(first + std::min(r, count - 1) * stride);
  }
};

// 16 bytes of row r in the low half, of row r + 4 in the high half.
ALWAYS_INLINE __m256 load_row_pair(const EightRows& w, int r, int64_t at) {
  const __m128 low = _mm_loadu_ps(reinterpret_cast<const float*>(w.row[r] + at));
  const __m128 high = _mm_loadu_ps(reinterpret_cast<const float*>(w.row[r + 4] + at));
  return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
}

// Transposes 8 rows x 8 elements of 32 bits, from byte `at` of each row on.
ALWAYS_INLINE void transpose8x8(const EightRows& w, int64_t at, __m256i* out) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    __m256 v[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) v[r] = load_row_pair(w, r, at + 16 * half);
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
    out[4 * half] = _mm256_castpd_si256(_mm256_unpacklo_pd(a, c));
    out[4 * half + 1] = _mm256_castpd_si256(_mm256_unpackhi_pd(a, c));
    out[4 * half + 2] = _mm256_castpd_si256(_mm256_unpacklo_pd(b, d));
    out[4 * half + 3] = _mm256_castpd_si256(_mm256_unpackhi_pd(b, d));
  }
}

// `for_each_column` transposes the 32 bytes of eight rows that begin at column c, and calls
// `visit(k, column)` in order with columns c + k of the eight rows, as floats.
template <Format F>
struct ColumnGroup;

template <>
struct ColumnGroup<FP32> {
  static const int64_t columns = 8;
  template <class Visit>
  static ALWAYS_INLINE void for_each_column(const EightRows& w, int64_t c, Visit visit) {
    __m256i v[8];
    transpose8x8(w, 4 * c, v);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) visit(i, _mm256_castsi256_ps(v[i]));
  }
};

template <>
struct ColumnGroup<BF16> {
  static const int64_t columns = 16;
  template <class Visit>
  static ALWAYS_INLINE void for_each_column(const EightRows& w, int64_t c, Visit visit) {
    __m256i v[8];
    transpose8x8(w, 2 * c, v);
    const __m256i upper = _mm256_set1_epi32(int32_t(0xffff0000u));
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
      visit(2 * i, _mm256_castsi256_ps(_mm256_slli_epi32(v[i], 16)));
      visit(2 * i + 1, _mm256_castsi256_ps(_mm256_and_si256(v[i], upper)));
    }
  }
};

// Where the columns of the k-th partial sum begin in a panel. A cache line is left free after each,
// as addresses that differ by a power of two compete for the same few places of a cache.
ALWAYS_INLINE int64_t partial_offset(int64_t k, int64_t steps) { return k * (steps + 1) * NR; }

// Packs rows n to n + 15 of a matrix: [PARTIALS, steps + 1, NR], the last step of each unused.
template <Format F>
void pack_panel(const Matrix& m, int64_t n, float* panel) {
  const int64_t steps = m.stride / PARTIALS;
  for (int g = 0; g < 2; g++) {
    const EightRows rows(m, n + 8 * g);
    float* partials[PARTIALS];
    for (int i = 0; i < PARTIALS; i++)
      partials[i] = panel + partial_offset(BIT_REVERSED[i], steps) + 8 * g;
    for (int64_t c = 0; c < m.stride; c += ColumnGroup<F>::columns) {
      float* const* out = partials + c % PARTIALS;
      const int64_t at = c / PARTIALS * NR;
      ColumnGroup<F>::for_each_column(
          rows, c, [&](int k, __m256 column) __attribute__((always_inline)) {
            _mm256_store_ps(out[k % PARTIALS] + at + k / PARTIALS * NR, column);
          });
    }
  }
}

typedef RowTiles<PACKED_MR> Tiles;  // of 5 or 6 rows, as there are at least PACKED_MIN_ROWS

// How many partial sums a microkernel computes before the next tile, so that their part of the
// panel and of the input stays in the L1 cache.
inline int partials_per_pass(int64_t steps) {
  return steps <= 16 ? PARTIALS : steps <= 64 ? 4 : steps <= 128 ? 2 : 1;
}

// The input, packed in the order in which the microkernel reads it: see `PackedInputLayout`.
struct PackedInput {
  Tiles tiles;
  int64_t steps;
  float* data;
  PackedInputLayout<Tiles, GROUP_TILES> layout{tiles, steps, partials_per_pass(steps)};

  void pack(const float* x, int64_t x_stride) const {
    for (int64_t tile = 0; tile < tiles.count; tile++) {
      const int64_t row = tiles.first(tile), mr = tiles.rows(tile);
      for (int64_t partial = 0; partial < PARTIALS; partial += 8) {
        float* out[8];
        for (int i = 0; i < 8; i++) out[i] = data + layout.offset_of_partial(tile, partial + i);
        const float* columns = x + row * x_stride + partial;
        (mr == 6 ? transpose_columns<6> : transpose_columns<5>)(columns, x_stride, steps, out);
      }
    }
  }

  // Transposes 8 columns of MR rows per step, where a step is 16 columns: out[i] gets column i of
  // each step, [steps, MR].
  template <int MR>
  static void transpose_columns(const float* x, int64_t x_stride, int64_t steps,
                                float* const* out) {
    for (int64_t step = 0; step < steps; step++, x += PARTIALS) {
      __m256 v[8], a[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++)
        v[i] = i < MR ? _mm256_loadu_ps(x + i * x_stride) : _mm256_setzero_ps();
#pragma GCC unroll 4
      for (int i = 0; i < 8; i += 2) {  // of columns 0 1 4 5 and 2 3 6 7
        a[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2; i++) {
        const __m256d even = _mm256_castps_pd(a[i]), odd = _mm256_castps_pd(a[i + 2]);
        // Rows 0 to 3 of columns 2 i and 2 i + 4, then of 2 i + 1 and 2 i + 5.
        v[2 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(even, odd));
        v[2 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd));
      }
#pragma GCC unroll 4
      for (int k = 0; k < 4; k++) {
        const __m256 rest = a[4 + k / 2];  // rows 4 and 5
        const __m128 low = _mm256_castps256_ps128(rest), high = _mm256_extractf128_ps(rest, 1);
        store_column<MR>(out[k] + step * MR, _mm256_castps256_ps128(v[k]),
                         k % 2 ? _mm_movehl_ps(low, low) : low);
        store_column<MR>(out[k + 4] + step * MR, _mm256_extractf128_ps(v[k], 1),
                         k % 2 ? _mm_movehl_ps(high, high) : high);
      }
    }
  }

  template <int MR>
  static ALWAYS_INLINE void store_column(float* at, __m128 four, __m128 last) {
    _mm_storeu_ps(at, four);
    if (MR == 6)
      _mm_storel_pi(reinterpret_cast<__m64*>(at + 4), last);
    else
      _mm_store_ss(at + 4, last);
  }
};

// Computes `count` partial sums, from the k-th on, for MR rows of input and a panel, and adds them
// to the `subtotals` [level, MR, NR]; the last partial sum leaves the outputs in level 4. After
// each PREFETCH_STEPS steps `lines` cache lines are prefetched.
template <int MR>
void packed_microkernel(const float* panel, int64_t steps, const float* input, int k, int count,
                        float* subtotals, LinearPrefetch& ahead, int64_t lines) {
  for (const int last = k + count; k < last; k++) {
    __m256 sum[MR][2];
#pragma GCC unroll 6
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = _mm256_setzero_ps();
    const float* w = panel + partial_offset(k, steps);
    for (int64_t step = 0; step < steps; step += 4, w += 4 * NR, input += 4 * MR) {
      if (step % PREFETCH_STEPS == 0) ahead.prefetch(lines);
#pragma GCC unroll 4
      for (int s = 0; s < 4; s++) {
        __m256 low = _mm256_load_ps(w + s * NR), high = _mm256_load_ps(w + s * NR + 8);
        keep_in_register(low);
        keep_in_register(high);
#pragma GCC unroll 6
        for (int i = 0; i < MR; i++) {
          const __m256 element = _mm256_broadcast_ss(input + s * MR + i);
          sum[i][0] = _mm256_fmadd_ps(low, element, sum[i][0]);
          sum[i][1] = _mm256_fmadd_ps(high, element, sum[i][1]);
        }
      }
    }
    float* level = subtotals;
    for (int ones = k; ones % 2; ones /= 2, level += MR * NR)
#pragma GCC unroll 6
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
        for (int g = 0; g < 2; g++)
          sum[i][g] = _mm256_add_ps(_mm256_load_ps(level + i * NR + 8 * g), sum[i][g]);
#pragma GCC unroll 6
    for (int i = 0; i < MR; i++)
#pragma GCC unroll 2
      for (int g = 0; g < 2; g++) _mm256_store_ps(level + i * NR + 8 * g, sum[i][g]);
  }
}

// y[row, n + i] = x[row] . m[n + i] for all rows of input and i < count <= NR.
template <Format F>
void gemm_panel(const Matrix& m, int64_t n, int64_t count, const PackedInput& input,
                Workspace& workspace, float* y, int64_t y_stride) {
  const int64_t steps = input.steps, size = partial_offset(PARTIALS, steps),
                subtotals_size = 5 * PACKED_MR * NR;
  float *panel = workspace.reserve(size + GROUP_TILES * subtotals_size), *subtotals = panel + size;
  pack_panel<F>(m, n, panel);
  const int64_t bytes = row_bytes(m), next = std::max<int64_t>(0, std::min(NR, m.rows - n - NR));
  LinearPrefetch ahead{static_cast<const char*>(m.data) + (n + NR) * bytes, next * bytes / 64};
  const Tiles& tiles = input.tiles;
  const int64_t calls = tiles.count * PARTIALS * ((steps + PREFETCH_STEPS - 1) / PREFETCH_STEPS),
                lines = (ahead.left + calls - 1) / calls;
  for (int64_t group = 0; group < tiles.count; group += GROUP_TILES) {
    const int64_t end = std::min(group + GROUP_TILES, tiles.count);
    const int per_pass = input.layout.per_pass;
    for (int k = 0; k < PARTIALS; k += per_pass)
      for (int64_t t = group; t < end; t++) {
        const bool six = tiles.rows(t) == 6;
        (six ? packed_microkernel<6>
             : packed_microkernel<5>)(panel, steps, input.data + input.layout.offset(group, t, k),
                                      k, per_pass, subtotals + (t - group) * subtotals_size, ahead,
                                      lines);
      }
    for (int64_t t = group; t < end; t++) {
      const int64_t row = tiles.first(t), mr = tiles.rows(t);
      const float* out = subtotals + (t - group) * subtotals_size + 4 * mr * NR;
      for (int64_t i = 0; i < mr; i++)
        std::memcpy(y + (row + i) * y_stride + n, out + i * NR, count * sizeof(float));
    }
  }
}

// y[row, n] = x[row] . m[n] for all rows of input and the n of the range.
void gemm_packed(const Matrix& m, Range range, const PackedInput& input, Workspace& workspace,
                 float* y, int64_t y_stride) {
  const auto gemm = m.format == FP32 ? gemm_panel<FP32> : gemm_panel<BF16>;
  for (int64_t n = range.begin; n < range.end; n += NR)
    gemm(m, n, std::min(NR, range.end - n), input, workspace, y, y_stride);
}

}  // namespace

#endif
