// Sampling of a token: guidance, mask, repetition penalty, temperature, top-k, top-p, min-p, then
// inverse transform sampling. Thresholds are found by bisection over the floats instead of sorting.
//
// The results are those of `guidance.combine`, `penalise`, `warp` and `pick` of generation/, up to
// the order of sums. Part of cpu_step.cpp.

#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {

const int DOUBLE_LANES = LANES / 2;  // doubles in a register
const int64_t PADDING = 2 * LANES;   // rows of logits are padded to a multiple of two registers
typedef double doubles __attribute__((vector_size(8 * DOUBLE_LANES)));
typedef int64_t longs __attribute__((vector_size(8 * DOUBLE_LANES)));
typedef float narrow_floats __attribute__((vector_size(4 * DOUBLE_LANES)));

// e^x to the precision of doubles, 0 below -700.
inline doubles vector_exp(doubles x) {
  const longs underflow = x < -700.0;
  x = underflow ? doubles{} - 700.0 : x;
  // Adding 1.5 * 2^52 leaves no bits for a fraction; the last bits are then those of the integer.
  const double magic = 6755399441055744.0;
  const doubles moved = x * 1.4426950408889634 + magic, n = moved - magic;
  const doubles r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  doubles p = doubles{} + 1.0;
  for (int k = 13; k > 0; k--) p = p * r * (1.0 / k) + 1.0;
  const longs bits = (load_vector<longs>(&moved) + 1023) << 52;
  return underflow ? doubles{} : p * load_vector<doubles>(&bits);
}

// The float with this ordinal. A float's ordinal is its bits as an integer, for negative floats
// with all bits but the sign flipped: so ordinals are in the order of the floats.
inline float float_of_ordinal(int32_t ordinal) {
  const int32_t bits = ordinal < 0 ? ordinal ^ 0x7fffffff : ordinal;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The largest float up to `top` for which `holds` is true; it must then be true for all smaller
// ones.
template <class Holds>
float largest_where(float top, Holds holds) {
  int32_t bits;
  std::memcpy(&bits, &top, 4);
  int64_t low = -0x7f7fffffLL - 1, high = bits < 0 ? bits ^ 0x7fffffff : bits;  // -FLT_MAX, top
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (holds(float_of_ordinal(int32_t(middle))))
      low = middle;
    else
      high = middle - 1;
  }
  return float_of_ordinal(int32_t(low));
}

// What one token is sampled from; `Choice` in cpu_step.py. The three rows of logits are those of
// the conditions of guidance; without guidance all three are the same row. `blocked` (may not be
// sampled) and `seen` (gets the penalty) mark columns, or are null. Temperature 0 is greedy; top_k
// and min_p are off at 0, top_p and penalty at 1.
struct Choice {
  const float *full, *image_only, *unconditional;
  const uint8_t *blocked, *seen;
  int64_t columns, top_k;
  double text, image;  // guidance scales
  double temperature, top_p, min_p, penalty, uniform;

  // The logits after guidance, mask and penalty, in this order.
  void combine(float* __restrict z) const {
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

// The largest of n floats, n a multiple of LANES; NaN is ignored.
inline float max_of(const float* z, int64_t n) {
  floats max_lanes = floats{} - INFINITY;
  for (int64_t i = 0; i < n; i += LANES) {
    const floats here = load_vector<floats>(z + i);
    max_lanes = here > max_lanes ? here : max_lanes;
  }
  float top = max_lanes[0];
  for (int i = 1; i < LANES; i++) top = std::max(top, max_lanes[i]);
  return top;
}

// One row of logits z and scratch e, both padded to a multiple of PADDING.
struct LogitsRow {
  int64_t count, n;  // n: `count`, padded
  float* z;
  double* e;
  float top;
  bool can_sample;  // all logits are finite or -inf, and at least one is not blocked

  LogitsRow(int64_t count, float temperature, float* z, double* e)
      : count(count), n((count + PADDING - 1) / PADDING * PADDING), z(z), e(e) {
    for (int64_t i = count; i < n; i++) z[i] = -INFINITY;
    top = max_of(z, n);
    can_sample = top > -INFINITY && is_finite();
    if (temperature == 0) return;
    for (int64_t i = 0; i < count; i++) z[i] /= temperature;
    top /= temperature;
  }

  // Whether no logit is NaN or +inf.
  bool is_finite() const {
    ints finite = ints{} - 1;  // a comparison gives -1 where it is true, 0 for NaN
    for (int64_t i = 0; i < n; i += LANES) finite &= load_vector<floats>(z + i) <= 3.402823466e+38f;
    bool all = true;
    for (int i = 0; i < LANES; i++) all &= finite[i] != 0;
    return all;
  }

  int64_t greedy() const { return std::find(z, z + count - 1, top) - z; }

  void mask_below(float least) {
    for (int64_t i = 0; i < n; i++) z[i] = z[i] < least ? -INFINITY : z[i];
  }

  // Columns that equal the k-th largest stay too.
  void top_k(int64_t k) {
    mask_below(largest_where(top, [&](float least) {
      ints count = {};
      for (int64_t i = 0; i < n; i += LANES) count -= load_vector<floats>(z + i) >= least;
      int64_t total = 0;
      for (int i = 0; i < LANES; i++) total += count[i];
      return total >= k;
    }));
  }

  // Masks the least likely columns while they have at most `tail` of the probability; of equal ones
  // the first.
  void top_p(float tail) {
    // Each e^(z - top) is needed once per step of the bisection; `e` has room for them.
    float* powers = reinterpret_cast<float*>(e);
    for (int64_t i = 0; i < n; i += LANES)
      store_vector(powers + i, vector_exp(load_vector<floats>(z + i) - top));
    auto below = [&](float least) {
      floats mass[2] = {};  // two, to hide the latency of the addition
      for (int64_t i = 0; i < n; i += 2 * LANES)
        for (int j = 0; j < 2; j++) {
          const int64_t at = i + LANES * j;
          mass[j] +=
              load_vector<floats>(z + at) < least ? load_vector<floats>(powers + at) : floats{};
        }
      float total = 0;
      for (int i = 0; i < LANES; i++) total += mass[0][i] + mass[1][i];
      return total;
    };
    const float limit = tail * below(INFINITY);
    const float least = largest_where(top, [&](float x) { return below(x) <= limit; });
    // Of the columns that equal the threshold, as many are masked as still fit into the tail; one
    // always stays.
    int64_t equal = 0;
    for (int64_t i = 0; i < n; i++) equal += z[i] == least;
    const float weight = vector_exp(floats{} + (least - top))[0],
                rest = std::max(0.0f, limit - below(least));
    int64_t left = std::min<int64_t>(equal - 1, int64_t(rest / weight));
    mask_below(least);
    for (int64_t i = 0; left > 0; i++)
      if (z[i] == least) z[i] = -INFINITY, left--;
  }

  // The first column whose cumulative probability exceeds `uniform`. Sums of blocks find the block;
  // then its elements are added one by one.
  int64_t pick(double uniform) {
    const int64_t block = 64;
    double total = 0;
    for (int64_t first = 0; first < n; first += block) total += exponentiate(first, first + block);
    // Less than the total, or rounding might leave no column to pick.
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

  // e = e^(z - top). Returns the sum.
  double exponentiate(int64_t first, int64_t last) {
    for (int64_t i = first; i < std::min(last, n); i += DOUBLE_LANES) {
      const doubles here = __builtin_convertvector(load_vector<narrow_floats>(z + i), doubles);
      store_vector(e + i, vector_exp(here - double(top)));
    }
    return mass(first, last);
  }

  double mass(int64_t first, int64_t last) const {
    doubles total[2] = {};
    for (int64_t i = first; i < std::min(last, n); i += LANES)
      for (int j = 0; j < 2; j++) total[j] += load_vector<doubles>(e + i + DOUBLE_LANES * j);
    double sum = 0;
    for (int i = 0; i < DOUBLE_LANES; i++) sum += total[0][i] + total[1][i];
    return sum;
  }
};

// The column sampled from a choice; -1 if its logits are not finite. z and e hold `columns`, padded
// to a multiple of PADDING.
int64_t sample_column(const Choice& c, float* z, double* e) {
  c.combine(z);
  LogitsRow row(c.columns, float(c.temperature), z, e);
  if (!row.can_sample) return -1;
  if (c.temperature == 0) return row.greedy();
  if (c.top_k > 0 && c.top_k < c.columns) row.top_k(c.top_k);
  if (c.top_p < 1) row.top_p(float(1 - c.top_p));
  if (c.min_p > 0) row.mask_below(row.top + float(std::log(c.min_p)));
  return row.pick(c.uniform);
}

}  // namespace
