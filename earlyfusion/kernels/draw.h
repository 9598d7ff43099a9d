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

typedef double doubles8 __attribute__((vector_size(64)));
typedef int64_t longs8 __attribute__((vector_size(64)));
typedef float floats8 __attribute__((vector_size(32)));

// e^x to the precision of doubles, 0 below -700.
inline doubles8 exp8(doubles8 x) {
  const longs8 none = x < -700.0;
  x = none ? doubles8{} - 700.0 : x;
  const doubles8 scaled = x * 1.4426950408889634;
  const doubles8 nudge = scaled < 0.0 ? doubles8{} - 0.5 : doubles8{} + 0.5;
  const longs8 whole = __builtin_convertvector(scaled + nudge, longs8);
  const doubles8 n = __builtin_convertvector(whole, doubles8);
  const doubles8 r = (x - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  doubles8 p = doubles8{} + 1.0;
  for (int k = 13; k > 0; k--) p = p * r * (1.0 / k) + 1.0;
  const longs8 bits = (whole + 1023) << 52;
  doubles8 power;
  std::memcpy(&power, &bits, 64);
  return none ? doubles8{} : p * power;
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

// Whether a token can be drawn: no NaN, no +inf, and not everything blocked.
bool is_drawable(const float* z, int64_t n) {
  float top = -INFINITY;
  bool all = true;
  for (int64_t i = 0; i < n; i++) {
    all &= z[i] <= 3.402823466e+38f;  // false for NaN too
    top = z[i] > top ? z[i] : top;
  }
  return all && top > -INFINITY;
}

// One row of logits in z, which like the scratch e is padded to sixteens.
struct Draw {
  int64_t count, n;  // n: padded
  float* z;
  double* e;
  float top;

  Draw(int64_t count, float temperature, float* z, double* e)
      : count(count), n((count + 15) / 16 * 16), z(z), e(e) {
    for (int64_t i = count; i < n; i++) z[i] = -INFINITY;
    if (temperature != 0)
      for (int64_t i = 0; i < count; i++) z[i] /= temperature;
    floats16 most = load(z);
    for (int64_t i = 16; i < n; i += 16) {
      const floats16 here = load(z + i);
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
      ints16 count = {};
      // A comparison gives -1 where it holds.
      for (int64_t i = 0; i < n; i += 16) count -= load(z + i) >= least;
      int64_t total = 0;
      for (int i = 0; i < 16; i++) total += count[i];
      return total >= k;
    }));
  }

  // Drops the least likely while they have at most `tail` of the probability, of equals the first.
  void top_p(float tail) {
    // Each e^(z - top) is needed once per step of the search; `e` has room for them.
    float* powers = reinterpret_cast<float*>(e);
    for (int64_t i = 0; i < n; i += 16) store(powers + i, exp16(load(z + i) - top));
    auto below = [&](float least) {
      floats16 mass = {};
      for (int64_t i = 0; i < n; i += 16)
        mass += load(z + i) < least ? load(powers + i) : floats16{};
      return sum(mass);
    };
    const float limit = tail * below(INFINITY);
    const float least = largest(top, [&](float x) { return below(x) <= limit; });
    // Of those equal to the threshold, as many go as still fit into the tail; one always stays.
    int64_t equal = 0;
    for (int64_t i = 0; i < n; i++) equal += z[i] == least;
    const float each = exp16(splat(least - top))[0], rest = std::max(0.0f, limit - below(least));
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
    for (int64_t i = first; i < std::min(last, n); i += 8) {
      floats8 here;
      std::memcpy(&here, z + i, 32);
      const doubles8 value = exp8(__builtin_convertvector(here, doubles8) - double(top));
      std::memcpy(e + i, &value, 64);
    }
    return mass(first, last);
  }

  double mass(int64_t first, int64_t last) const {
    doubles8 total = {};
    for (int64_t i = first; i < std::min(last, n); i += 8) {
      doubles8 here;
      std::memcpy(&here, e + i, 64);
      total += here;
    }
    double sum = 0;
    for (int i = 0; i < 8; i++) sum += total[i];
    return sum;
  }
};

// The column drawn from a choice, -1 where its logits are not finite; z and e are room for them.
int64_t drawn_column(const Choice& c, float* z, double* e) {
  c.mix(z);
  if (!is_drawable(z, c.columns)) return -1;
  Draw row(c.columns, float(c.temperature), z, e);
  if (c.temperature == 0) return row.greedy();
  if (c.top_k > 0 && c.top_k < c.columns) row.top_k(c.top_k);
  if (c.top_p < 1) row.top_p(float(1 - c.top_p));
  if (c.min_p > 0) row.drop_below(row.top + float(std::log(c.min_p)));
  return row.pick(c.uniform);
}

}  // namespace
