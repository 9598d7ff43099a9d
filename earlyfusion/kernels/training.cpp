// Passes of a training step on a CPU, forward and backward, for fused.py: attention within packed
// documents, QK-norm with rotation, RMSNorm, SwiGLU. Inputs and results are bf16 or fp32, all
// arithmetic is fp32.
//
// Each value is computed by the same instructions in the same order, whatever the number of
// threads: gradients of weights are summed over chunks of tokens, and the chunks in order.
//
// Layouts, S tokens of all rows in order: q and out [S, N, H], k and v [S, K, H], states [S, D];
// H and D are multiples of 16.

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {

constexpr int64_t VECTOR = 16;
constexpr int64_t QUERIES = 32;     // of a tile of attention
constexpr int64_t CHUNK = 64;       // tokens whose gradients of weights are summed at a time
// Rows, and vectors of columns, of the tile of a product whose sums stay in registers.
constexpr int64_t ROWS = 4, COLUMN_VECTORS = LANES == 16 ? 4 : 1;

typedef uint16_t shorts16 __attribute__((vector_size(32)));
typedef uint32_t words16 __attribute__((vector_size(64)));

inline void store(uint16_t* p, floats16 v) {
  words16 bits;
  std::memcpy(&bits, &v, 64);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const shorts16 rounded = __builtin_convertvector(bits, shorts16);
  std::memcpy(p, &rounded, 32);
}

inline int64_t rounded_up(int64_t n) { return (n + VECTOR - 1) / VECTOR * VECTOR; }

// e^x of 16 floats in one or more registers.
inline floats16 exp16(floats16 x) {
  floats16 result;
  for (int part = 0; part < VECTOR / LANES; part++) {
    const floats e = vector_exp(load_vector<floats>(reinterpret_cast<float*>(&x) + part * LANES));
    store_vector(reinterpret_cast<float*>(&result) + part * LANES, e);
  }
  return result;
}

// ---- products of small fp32 matrices in the cache

// The left operand of a product, with the strides of its rows and of its inner dimension.
struct Left {
  const float* data;
  int64_t row, inner;
};

// `multiply` for ROWS rows and VECTORS vectors of columns.
template <int64_t VECTORS, bool ADD>
inline void multiply_tile(Left a, const float* b, int64_t b_step, int64_t inner, float* c,
                          int64_t c_step) {
  floats16 sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++)
      sums[r][v] = ADD ? load(c + r * c_step + v * VECTOR) : floats16{};
  for (int64_t i = 0; i < inner; i++) {
    floats16 b_row[VECTORS];
    for (int v = 0; v < VECTORS; v++) b_row[v] = load(b + i * b_step + v * VECTOR);
    for (int r = 0; r < ROWS; r++) {
      const floats16 x = broadcast(a.data[r * a.row + i * a.inner]);
      for (int v = 0; v < VECTORS; v++) sums[r][v] = fmadd(x, b_row[v], sums[r][v]);
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int v = 0; v < VECTORS; v++) store(c + r * c_step + v * VECTOR, sums[r][v]);
}

// c = a b, or c += a b with ADD; `rows` is a multiple of ROWS and `columns` of VECTOR.
template <bool ADD>
void multiply(Left a, int64_t rows, const float* b, int64_t b_step, int64_t inner, float* c,
              int64_t c_step, int64_t columns) {
  for (int64_t row = 0; row < rows; row += ROWS) {
    const Left part = {a.data + row * a.row, a.row, a.inner};
    float* out = c + row * c_step;
    int64_t column = 0;
    for (; column + COLUMN_VECTORS * VECTOR <= columns; column += COLUMN_VECTORS * VECTOR)
      multiply_tile<COLUMN_VECTORS, ADD>(part, b + column, b_step, inner, out + column, c_step);
    for (; column < columns; column += VECTOR)
      multiply_tile<1, ADD>(part, b + column, b_step, inner, out + column, c_step);
  }
}

// ---- attention

struct Heads {
  const uint16_t *q, *k, *v;
  int64_t N, K, H;
  float scale;
};

// Rows of one head as fp32 [rows, H]: `count` rows of bf16, `step` elements apart, then zeros.
void unpack_rows(const uint16_t* data, int64_t step, int64_t count, int64_t rows, int64_t H,
                 float* out) {
  for (int64_t i = 0; i < count; i++)
    for (int64_t h = 0; h < H; h += VECTOR) store(out + i * H + h, load(data + i * step + h));
  std::fill(out + count * H, out + rows * H, 0.0f);
}

void transpose(const float* data, int64_t rows, int64_t columns, float* out) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t column = 0; column < columns; column++)
      out[column * rows + row] = data[row * columns + column];
}

// The numerators of softmax, in place: exp(scale * score - max_score) for the query at `position`,
// 0 for later keys. Returns their sum, and through `max_score` the largest scaled score.
float softmax_numerators(float* scores, int64_t position, int64_t columns, float scale,
                         float& max_score) {
  floats16 top = broadcast(-INFINITY);
  const int64_t last = position / VECTOR * VECTOR;  // the vector with the query's own key
  ints16 lane;
  for (int i = 0; i < VECTOR; i++) lane[i] = i;
  for (int64_t j = 0; j <= last; j += VECTOR) {
    floats16 s = load(scores + j) * scale;
    if (j == last) s = lane > int32_t(position - last) ? broadcast(-INFINITY) : s;
    store(scores + j, s);
    top = s > top ? s : top;
  }
  max_score = top[0];
  for (int i = 1; i < VECTOR; i++) max_score = std::max(max_score, top[i]);
  floats16 sum = {};
  for (int64_t j = 0; j <= last; j += VECTOR) {
    const floats16 e = exp16(load(scores + j) - max_score);
    store(scores + j, e);
    sum += e;
  }
  for (int64_t j = last + VECTOR; j < columns; j += VECTOR) store(scores + j, floats16{});
  return horizontal_sum(sum);
}

struct Workspace {
  AlignedVector<float> data;
  int64_t used = 0;
  float* take(int64_t n) {
    float* p = data.data() + used;
    used += rounded_up(n);
    return p;
  }
};

void attend_document(const Heads& x, int64_t first, int64_t length, int64_t key_head,
                     Workspace& space, uint16_t* out, float* log_sums) {
  const int64_t N = x.N, K = x.K, H = x.H, padded = rounded_up(length);
  space.used = 0;
  float *k = space.take(padded * H), *k_transposed = space.take(padded * H);
  float *v = space.take(padded * H), *q = space.take(QUERIES * H);
  float *probs = space.take(QUERIES * padded), *sums = space.take(QUERIES * H);
  unpack_rows(x.k + (first * K + key_head) * H, K * H, length, padded, H, k);
  unpack_rows(x.v + (first * K + key_head) * H, K * H, length, padded, H, v);
  transpose(k, padded, H, k_transposed);
  for (int64_t head = key_head * (N / K); head < (key_head + 1) * (N / K); head++)
    for (int64_t start = 0; start < length; start += QUERIES) {
      const int64_t count = std::min(QUERIES, length - start);
      const int64_t rows = (count + ROWS - 1) / ROWS * ROWS;
      const int64_t keys = rounded_up(start + count);
      unpack_rows(x.q + ((first + start) * N + head) * H, N * H, count, rows, H, q);
      multiply<false>({q, H, 1}, rows, k_transposed, padded, H, probs, padded, keys);
      float totals[QUERIES];
      for (int64_t i = 0; i < count; i++) {
        float max_score;
        totals[i] = softmax_numerators(probs + i * padded, start + i, keys, x.scale, max_score);
        log_sums[(first + start + i) * N + head] = max_score + std::log(totals[i]);
      }
      multiply<false>({probs, padded, 1}, rows, v, H, keys, sums, H, H);
      for (int64_t i = 0; i < count; i++)
        for (int64_t h = 0; h < H; h += VECTOR)
          store(out + ((first + start + i) * N + head) * H + h,
                load(sums + i * H + h) * (1.0f / totals[i]));
    }
}

struct Gradients {
  const uint16_t* out;  // of the result
  uint16_t *q, *k, *v;
};

void attend_document_backward(const Heads& x, const float* log_sums, const Gradients& g,
                              int64_t first, int64_t length, int64_t key_head, Workspace& space) {
  const int64_t N = x.N, K = x.K, H = x.H, padded = rounded_up(length);
  space.used = 0;
  float *k = space.take(padded * H), *v = space.take(padded * H);
  float *k_transposed = space.take(padded * H), *v_transposed = space.take(padded * H);
  float *k_grad = space.take(padded * H), *v_grad = space.take(padded * H);
  float *q = space.take(QUERIES * H), *out_grad = space.take(QUERIES * H);
  float *q_grad = space.take(QUERIES * H);
  float *probs = space.take(QUERIES * padded), *prob_grads = space.take(QUERIES * padded);
  unpack_rows(x.k + (first * K + key_head) * H, K * H, length, padded, H, k);
  unpack_rows(x.v + (first * K + key_head) * H, K * H, length, padded, H, v);
  transpose(k, padded, H, k_transposed);
  transpose(v, padded, H, v_transposed);
  std::fill(k_grad, k_grad + padded * H, 0.0f);
  std::fill(v_grad, v_grad + padded * H, 0.0f);
  ints16 lane;
  for (int i = 0; i < VECTOR; i++) lane[i] = i;
  for (int64_t head = key_head * (N / K); head < (key_head + 1) * (N / K); head++)
    for (int64_t start = 0; start < length; start += QUERIES) {
      const int64_t count = std::min(QUERIES, length - start);
      const int64_t rows = (count + ROWS - 1) / ROWS * ROWS;
      const int64_t keys = rounded_up(start + count), at = (first + start) * N + head;
      unpack_rows(x.q + at * H, N * H, count, rows, H, q);
      unpack_rows(g.out + at * H, N * H, count, rows, H, out_grad);
      multiply<false>({q, H, 1}, rows, k_transposed, padded, H, probs, padded, keys);
      multiply<false>({out_grad, H, 1}, rows, v_transposed, padded, H, prob_grads, padded, keys);
      // Rows from `count` on only fill the microkernel: their queries and gradients are zero.
      for (int64_t i = 0; i < count; i++) {
        float *p = probs + i * padded, *dp = prob_grads + i * padded;
        const int64_t position = start + i, last = position / VECTOR * VECTOR;
        const float log_sum = log_sums[at + i * N];
        floats16 products = {};
        for (int64_t j = 0; j <= last; j += VECTOR) {
          floats16 prob = exp16(load(p + j) * x.scale - log_sum);
          if (j == last) prob = lane > int32_t(position - last) ? floats16{} : prob;
          store(p + j, prob);
          products += prob * load(dp + j);
        }
        // Softmax backward: dscore = p * (dp - delta), where delta is the sum of p * dp.
        const float delta = horizontal_sum(products);
        for (int64_t j = 0; j <= last; j += VECTOR)
          store(dp + j, load(p + j) * (load(dp + j) - delta) * x.scale);
        for (int64_t j = last + VECTOR; j < keys; j += VECTOR) {
          store(p + j, floats16{});
          store(dp + j, floats16{});
        }
      }
      multiply<false>({prob_grads, padded, 1}, rows, k, H, keys, q_grad, H, H);
      for (int64_t i = 0; i < count; i++)
        for (int64_t h = 0; h < H; h += VECTOR)
          store(g.q + (at + i * N) * H + h, load(q_grad + i * H + h));
      multiply<true>({prob_grads, 1, padded}, keys, q, H, rows, k_grad, H, H);
      multiply<true>({probs, 1, padded}, keys, out_grad, H, rows, v_grad, H, H);
    }
  for (int64_t j = 0; j < length; j++)
    for (int64_t h = 0; h < H; h += VECTOR) {
      const int64_t at = ((first + j) * K + key_head) * H + h;
      store(g.k + at, load(k_grad + j * H + h));
      store(g.v + at, load(v_grad + j * H + h));
    }
}

// Calls `work(first token, length, key head, workspace)` for all documents and key heads.
template <class Work>
void for_documents(const int64_t* lengths, int64_t documents, int64_t K, int64_t floats_per_key,
                   int64_t floats, int64_t threads, Work work) {
  std::vector<int64_t> firsts(documents);
  int64_t first = 0, longest = 0;
  for (int64_t d = 0; d < documents; d++) {
    firsts[d] = first;
    first += lengths[d];
    longest = std::max(longest, lengths[d]);
  }
#pragma omp parallel num_threads(threads)
  {
    Workspace space;
    space.data.resize(rounded_up(longest) * floats_per_key + floats);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < documents * K; item++)
      work(firsts[item / K], lengths[item / K], item % K, space);
  }
}

// ---- norms

struct HeadNorm {
  const float *weight, *bias;  // [N, H]
  const float *cosine, *sine;  // [period, H]; the sine's first half is negated
  int64_t N, H, period;
  float eps;
};

struct Moments {
  float mean, inverse_std;
};

inline Moments moments(const uint16_t* x, int64_t H, float eps) {
  floats16 sum = {}, squares = {};
  for (int64_t h = 0; h < H; h += VECTOR) sum += load(x + h);
  const float mean = horizontal_sum(sum) / H;
  for (int64_t h = 0; h < H; h += VECTOR) {
    const floats16 d = load(x + h) - mean;
    squares += d * d;
  }
  return {mean, 1.0f / std::sqrt(horizontal_sum(squares) / H + eps)};
}

// LayerNorm and rotation of one head of one token. `scratch` has room for 2 H floats.
void head_norm_row(const HeadNorm& norm, const uint16_t* x, int64_t token, int64_t head,
                   float* scratch, uint16_t* out) {
  const int64_t H = norm.H, half = H / 2, table = token % norm.period * H;
  const float *weight = norm.weight + head * H, *bias = norm.bias + head * H;
  const Moments m = moments(x, H, norm.eps);
  // The head twice in a row: entry (h + half) % H is at h + half.
  for (int64_t h = 0; h < H; h += VECTOR) {
    const floats16 y = (load(x + h) - m.mean) * m.inverse_std * load(weight + h) + load(bias + h);
    store(scratch + h, y);
    store(scratch + H + h, y);
  }
  for (int64_t h = 0; h < H; h += VECTOR)
    store(out + h, load(scratch + h) * load(norm.cosine + table + h) +
                       load(scratch + h + half) * load(norm.sine + table + h));
}

// Adds to `weight_grad` and `bias_grad`; `scratch` has room for 3 H floats.
void head_norm_row_backward(const HeadNorm& norm, const uint16_t* x, const uint16_t* out_grad,
                            int64_t token, int64_t head, float* scratch, uint16_t* x_grad,
                            float* weight_grad, float* bias_grad) {
  const int64_t H = norm.H, half = H / 2, table = token % norm.period * H;
  const float* weight = norm.weight + head * H;
  const Moments m = moments(x, H, norm.eps);
  for (int64_t h = 0; h < H; h += VECTOR) {
    const floats16 sine_grad = load(out_grad + h) * load(norm.sine + table + h);
    store(scratch + h, sine_grad);
    store(scratch + H + h, sine_grad);
  }
  floats16 sum = {}, products = {};
  float* grads = scratch + 2 * H;
  for (int64_t h = 0; h < H; h += VECTOR) {
    const floats16 normed = (load(x + h) - m.mean) * m.inverse_std;
    floats16 grad = load(out_grad + h) * load(norm.cosine + table + h) + load(scratch + h + half);
    store(weight_grad + h, load(weight_grad + h) + grad * normed);
    store(bias_grad + h, load(bias_grad + h) + grad);
    grad *= load(weight + h);
    store(grads + h, grad);
    sum += grad;
    products += grad * normed;
  }
  const float grad_mean = horizontal_sum(sum) / H, product_mean = horizontal_sum(products) / H;
  for (int64_t h = 0; h < H; h += VECTOR) {
    const floats16 normed = (load(x + h) - m.mean) * m.inverse_std;
    store(x_grad + h, (load(grads + h) - grad_mean - normed * product_mean) * m.inverse_std);
  }
}

template <class Out>
void rms_norm(const float* x, const float* weight, float eps, int64_t S, int64_t D, Out* out,
              float* inverses, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t s = 0; s < S; s++) {
    const float* row = x + s * D;
    floats16 squares = {};
    for (int64_t d = 0; d < D; d += VECTOR) squares += load(row + d) * load(row + d);
    const float inverse = 1.0f / std::sqrt(horizontal_sum(squares) / D + eps);
    inverses[s] = inverse;
    for (int64_t d = 0; d < D; d += VECTOR)
      store(out + s * D + d, load(row + d) * inverse * load(weight + d));
  }
}

template <class Out>
void rms_norm_backward(const float* x, const float* weight, const float* inverses,
                       const Out* out_grad, int64_t S, int64_t D, float* x_grad,
                       float* weight_grads, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t start = 0; start < S; start += CHUNK) {
    float* weight_grad = weight_grads + start / CHUNK * D;
    std::fill(weight_grad, weight_grad + D, 0.0f);
    for (int64_t s = start; s < std::min(start + CHUNK, S); s++) {
      const float *row = x + s * D, inverse = inverses[s];
      const Out* grad_row = out_grad + s * D;
      floats16 products = {};
      for (int64_t d = 0; d < D; d += VECTOR) {
        const floats16 normed = load(row + d) * inverse, grad = load(grad_row + d);
        store(weight_grad + d, load(weight_grad + d) + grad * normed);
        products += grad * load(weight + d) * normed;
      }
      const float product_mean = horizontal_sum(products) / D;
      for (int64_t d = 0; d < D; d += VECTOR) {
        const floats16 grad = load(grad_row + d) * load(weight + d);
        store(x_grad + s * D + d, (grad - load(row + d) * (inverse * product_mean)) * inverse);
      }
    }
  }
}

// The sum of [chunks, columns] over the chunks, in order.
void sum_chunks(const float* chunks, int64_t count, int64_t columns, float* out) {
  std::fill(out, out + columns, 0.0f);
  for (int64_t c = 0; c < count; c++)
    for (int64_t d = 0; d < columns; d++) out[d] += chunks[c * columns + d];
}

inline floats16 sigmoid(floats16 x) { return 1.0f / (1.0f + exp16(-x)); }

}  // namespace

// ---- what fused.py calls. `log_sums` [S, N] goes from the forward to the backward pass.

extern "C" void earlyfusion_attend(const uint16_t* q, const uint16_t* k, const uint16_t* v,
                                   const int64_t* lengths, int64_t documents, int64_t N, int64_t K,
                                   int64_t H, uint16_t* out, float* log_sums, int64_t threads) {
  const Heads heads = {q, k, v, N, K, H, 1.0f / std::sqrt(float(H))};
  for_documents(lengths, documents, K, 3 * H + QUERIES, 2 * QUERIES * H, threads,
                [&](int64_t first, int64_t length, int64_t key_head, Workspace& space) {
                  attend_document(heads, first, length, key_head, space, out, log_sums);
                });
}

extern "C" void earlyfusion_attend_backward(const uint16_t* q, const uint16_t* k,
                                            const uint16_t* v, const float* log_sums,
                                            const uint16_t* out_grad, const int64_t* lengths,
                                            int64_t documents, int64_t N, int64_t K, int64_t H,
                                            uint16_t* q_grad, uint16_t* k_grad, uint16_t* v_grad,
                                            int64_t threads) {
  const Heads heads = {q, k, v, N, K, H, 1.0f / std::sqrt(float(H))};
  const Gradients gradients = {out_grad, q_grad, k_grad, v_grad};
  for_documents(lengths, documents, K, 6 * H + 2 * QUERIES, 3 * QUERIES * H, threads,
                [&](int64_t first, int64_t length, int64_t key_head, Workspace& space) {
                  attend_document_backward(heads, log_sums, gradients, first, length, key_head,
                                           space);
                });
}

extern "C" void earlyfusion_head_norm(const uint16_t* x, const float* weight, const float* bias,
                                      const float* cosine, const float* sine, int64_t S, int64_t N,
                                      int64_t H, int64_t period, float eps, uint16_t* out,
                                      int64_t threads) {
  const HeadNorm norm = {weight, bias, cosine, sine, N, H, period, eps};
#pragma omp parallel num_threads(threads)
  {
    AlignedVector<float> scratch(2 * H);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < S * N; row++)
      head_norm_row(norm, x + row * H, row / N, row % N, scratch.data(), out + row * H);
  }
}

// `grads` [2, N, H] gets the gradients of weight and bias.
extern "C" void earlyfusion_head_norm_backward(const uint16_t* x, const float* weight,
                                               const float* cosine, const float* sine,
                                               const uint16_t* out_grad, int64_t S, int64_t N,
                                               int64_t H, int64_t period, float eps,
                                               uint16_t* x_grad, float* grads, int64_t threads) {
  const HeadNorm norm = {weight, nullptr, cosine, sine, N, H, period, eps};
  const int64_t chunks = (S + CHUNK - 1) / CHUNK, columns = 2 * N * H;
  AlignedVector<float> sums(chunks * columns);
#pragma omp parallel num_threads(threads)
  {
    AlignedVector<float> scratch(3 * H);
#pragma omp for schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      float *weight_grad = sums.data() + chunk * columns, *bias_grad = weight_grad + N * H;
      for (int64_t s = chunk * CHUNK; s < std::min((chunk + 1) * CHUNK, S); s++)
        for (int64_t n = 0; n < N; n++) {
          const int64_t at = (s * N + n) * H;
          head_norm_row_backward(norm, x + at, out_grad + at, s, n, scratch.data(), x_grad + at,
                                 weight_grad + n * H, bias_grad + n * H);
        }
    }
  }
  sum_chunks(sums.data(), chunks, columns, grads);
}

// `is_bf16` is 1 for results in bf16, 0 in fp32. `inverses` [S] goes to the backward pass.
extern "C" void earlyfusion_rms_norm(const float* x, const float* weight, float eps, int64_t S,
                                     int64_t D, void* out, int64_t is_bf16, float* inverses,
                                     int64_t threads) {
  if (is_bf16)
    rms_norm(x, weight, eps, S, D, static_cast<uint16_t*>(out), inverses, threads);
  else
    rms_norm(x, weight, eps, S, D, static_cast<float*>(out), inverses, threads);
}

extern "C" void earlyfusion_rms_norm_backward(const float* x, const float* weight,
                                              const float* inverses, const void* out_grad,
                                              int64_t is_bf16, int64_t S, int64_t D, float* x_grad,
                                              float* weight_grad, int64_t threads) {
  const int64_t chunks = (S + CHUNK - 1) / CHUNK;
  AlignedVector<float> sums(chunks * D);
  if (is_bf16)
    rms_norm_backward(x, weight, inverses, static_cast<const uint16_t*>(out_grad), S, D, x_grad,
                      sums.data(), threads);
  else
    rms_norm_backward(x, weight, inverses, static_cast<const float*>(out_grad), S, D, x_grad,
                      sums.data(), threads);
  sum_chunks(sums.data(), chunks, D, weight_grad);
}

// silu(gate) * up; n is a multiple of 16.
extern "C" void earlyfusion_swiglu(const uint16_t* gate, const uint16_t* up, int64_t n,
                                   uint16_t* out, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i += VECTOR) {
    const floats16 g = load(gate + i);
    store(out + i, g * sigmoid(g) * load(up + i));
  }
}

extern "C" void earlyfusion_swiglu_backward(const uint16_t* gate, const uint16_t* up,
                                            const uint16_t* out_grad, int64_t n,
                                            uint16_t* gate_grad, uint16_t* up_grad,
                                            int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; i += VECTOR) {
    const floats16 g = load(gate + i), u = load(up + i), grad = load(out_grad + i);
    const floats16 s = sigmoid(g);
    store(gate_grad + i, grad * u * s * (1.0f + g * (1.0f - s)));
    store(up_grad + i, grad * g * s);
  }
}
