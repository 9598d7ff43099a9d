// The draw of a token: guidance, mask, penalty, temperature, top-k, top-p, min-p, then the inverse
// of the cumulative probability. Instead of sorting, thresholds are found by bisection over floats.
//
// It gives what `guidance.combine`, `penalise`, `warp` and `pick` of generation/ give, up to the
// order of sums. Part of cpu_step.cpp.

#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {

const int HALF = LANES / 2;  // doubles in a register
typedef double doubles __attribute__((vector_size(8 * HALF)));
typedef int64_t longs __attribute__((vector_size(8 * HALF)));
typedef float few_floats __attribute__((vector_size(4 * HALF)));

// e^x to the precision of doubles, 0 below -700.
inline doubles exponential(doubles x) {
  const longs none = x < -700.0;
  x = none ? doubles{} - 700.0 : x;
  // Adding 1.5 * 2^52 leaves no bits for a fraction; the last bits are then those of the whole number.
  const double magic = 6755399441055744.0;
  const doubles moved = x * 1.4426950408889634 + magic, n = moved - magic;
  const doubles r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  doubles p = doubles{} + 1.0;
  for (int k = 13; k > 0; k--) p = p * r * (1.0 / k) + 1.0;
  const longs bits = (read<longs>(&moved) + 1023) << 52;
  return none ? doubles{} : p * read<doubles>(&bits);
}

// The float whose place among all floats is `order`: a float's bits as an integer, with those of
// negative ones turned round, ascend with its value.
inline float of_order(int32_t order) {
  const int32_t bits = order < 0 ? order ^ 0x7fffffff : order;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// The largest float up to `top` for which `holds`; it must then hold for all smaller ones.
template <class Holds>
float largest(float top, Holds holds) {
  int32_t bits;
  std::memcpy(&bits, &top, 4);
  int64_t low = -0x7f7fffffLL - 1, high = bits < 0 ? bits ^ 0x7fffffff : bits;  // -FLT_MAX, top
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (holds(of_order(int32_t(middle))))
      low = middle;
    else
      high = middle - 1;
  }
  return of_order(int32_t(low));
}

// From what a token is drawn; `Choice` in cpu_step.py. The three rows of logits are guidance's, and
// one and the same without it. `blocked` and `seen` mark columns, or are null. Temperature 0 takes
// the largest; top_k and min_p are off at 0, top_p and penalty at 1.
struct Choice {
  const float *full, *image_only, *unconditional;
  const uint8_t *blocked, *seen;
  int64_t columns, top_k;
  double text, image;  // strengths of guidance
  double temperature, top_p, min_p, penalty, uniform;

  // The logits after guidance, mask and penalty, in this order.
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

// The largest of n floats, a multiple of LANES; NaN counts as nothing.
inline float largest_of(const float* z, int64_t n) {
  floats most = floats{} - INFINITY;
  for (int64_t i = 0; i < n; i += LANES) {
    const floats here = read<floats>(z + i);
    most = here > most ? here : most;
  }
  float top = most[0];
  for (int i = 1; i < LANES; i++) top = std::max(top, most[i]);
  return top;
}

// One row of logits in z, which like the scratch e is padded to sixteens.
struct Draw {
  int64_t count, n;  // n: padded
  float* z;
  double* e;
  float top;
  bool drawable;  // not everything is blocked, and all is finite

  Draw(int64_t count, float temperature, float* z, double* e)
      : count(count), n((count + 15) / 16 * 16), z(z), e(e) {
    for (int64_t i = count; i < n; i++) z[i] = -INFINITY;
    top = largest_of(z, n);
    drawable = top > -INFINITY && is_finite();
    if (temperature == 0) return;
    for (int64_t i = 0; i < count; i++) z[i] /= temperature;
    top /= temperature;
  }

  // Whether there is no NaN and no +inf.
  bool is_finite() const {
    ints finite = ints{} - 1;  // a comparison gives -1 where it holds; false for NaN
    for (int64_t i = 0; i < n; i += LANES) finite &= read<floats>(z + i) <= 3.402823466e+38f;
    bool all = true;
    for (int i = 0; i < LANES; i++) all &= finite[i] != 0;
    return all;
  }

  int64_t greedy() const { return std::find(z, z + count - 1, top) - z; }

  void drop_below(float least) {
    for (int64_t i = 0; i < n; i++) z[i] = z[i] < least ? -INFINITY : z[i];
  }

  // Those that equal the least of the k largest stay too.
  void top_k(int64_t k) {
    drop_below(largest(top, [&](float least) {
      ints count = {};
      for (int64_t i = 0; i < n; i += LANES) count -= read<floats>(z + i) >= least;
      int64_t total = 0;
      for (int i = 0; i < LANES; i++) total += count[i];
      return total >= k;
    }));
  }

  // Drops the least likely while they have at most `tail` of the probability, of equals the first.
  void top_p(float tail) {
    // Each e^(z - top) is needed once per step of the search; `e` has room for them.
    float* powers = reinterpret_cast<float*>(e);
    for (int64_t i = 0; i < n; i += LANES)
      write(powers + i, exponential(read<floats>(z + i) - top));
    auto below = [&](float least) {
      floats mass[2] = {};  // two, as an addition takes longer than the rest of a turn
      for (int64_t i = 0; i < n; i += 2 * LANES)
        for (int j = 0; j < 2; j++) {
          const int64_t at = i + LANES * j;
          mass[j] += read<floats>(z + at) < least ? read<floats>(powers + at) : floats{};
        }
      float total = 0;
      for (int i = 0; i < LANES; i++) total += mass[0][i] + mass[1][i];
      return total;
    };
    const float limit = tail * below(INFINITY);
    const float least = largest(top, [&](float x) { return below(x) <= limit; });
    // Of those equal to the threshold, as many go as still fit into the tail; one always stays.
    int64_t equal = 0;
    for (int64_t i = 0; i < n; i++) equal += z[i] == least;
    const float each = exponential(floats{} + (least - top))[0], rest = std::max(0.0f, limit - below(least));
    int64_t more = std::min<int64_t>(equal - 1, int64_t(rest / each));
    drop_below(least);
    for (int64_t i = 0; more > 0; i++)
      if (z[i] == least) z[i] = -INFINITY, more--;
  }

  // The first column whose cumulative probability exceeds `uniform`. Sums of blocks tell the block,
  // then its entries are added one by one.
  int64_t pick(double uniform) {
    const int64_t block = 64;
    double total = 0;
    for (int64_t first = 0; first < n; first += block) total += soften(first, first + block);
    // Never all of it, or rounding would leave nothing to pick.
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

  // e = e^(z - top), and their sum.
  double soften(int64_t first, int64_t last) {
    for (int64_t i = first; i < std::min(last, n); i += HALF) {
      const doubles here = __builtin_convertvector(read<few_floats>(z + i), doubles);
      write(e + i, exponential(here - double(top)));
    }
    return mass(first, last);
  }

  double mass(int64_t first, int64_t last) const {
    doubles total[2] = {};
    for (int64_t i = first; i < std::min(last, n); i += LANES)
      for (int j = 0; j < 2; j++) total[j] += read<doubles>(e + i + HALF * j);
    double sum = 0;
    for (int i = 0; i < HALF; i++) sum += total[0][i] + total[1][i];
    return sum;
  }
};

// The column drawn from a choice, -1 where its logits are not finite; z and e are room for them.
int64_t drawn_column(const Choice& c, float* z, double* e) {
  c.mix(z);
  Draw row(c.columns, float(c.temperature), z, e);
  if (!row.drawable) return -1;
  if (c.temperature == 0) return row.greedy();
  if (c.top_k > 0 && c.top_k < c.columns) row.top_k(c.top_k);
  if (c.top_p < 1) row.top_p(float(1 - c.top_p));
  if (c.min_p > 0) row.drop_below(row.top + float(std::log(c.min_p)));
  return row.pick(c.uniform);
}

}  // namespace
