// D = R - I from skew parameters, and its gradient, one block at a time; formulas as in hqq_oft/ops/reference.py.
#pragma once

#include "types.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// c = a * b (+ init) for blocks [b, padded(b)]; with `transposed` a^T * b.
inline void block_product(int64_t b, const float* a, const float* right, const float* init, float* c,
                          bool transposed = false) {
  int64_t stride = padded(b);
  multiply(a, transposed ? 1 : stride, transposed ? stride : 1, right, stride, b, b, b, init, stride, c, stride);
}

inline void fill(float* block, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) block[i] = value;
}

// to += factor * from
inline void add_scaled(float* to, const float* from, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, fma(set(factor), load(from + i), load(to + i)));
}

// Factor for the upper triangle of Q that bounds its Frobenius norm, as `project` in the reference.
inline double bound(const Cayley& map, const float* q) {
  if (!map.max_norm) return 1;
  double squares = 0;
  for (int64_t i = 0; i < map.block(); ++i) squares += static_cast<double>(q[i]) * q[i];
  double norm = __builtin_sqrt(2 * squares);
  // tolerates float32 rounding, so that the projection is idempotent
  return norm <= *map.max_norm * (1 + 0x1p-23) ? 1 : *map.max_norm / norm;
}

// block = block - block^T, in tiles of four rows and columns; rows hold padded(b).
inline void subtract_transpose(int64_t b, float* block) {
  using Four = float __attribute__((vector_size(16), aligned(4)));
  int64_t stride = padded(b);
  auto row = [&](int64_t i, int64_t j) { return reinterpret_cast<Four*>(block + i * stride + j); };
  auto transposed = [](const Four (&v)[4], Four (&out)[4]) {
    Four low01 = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5), high01 = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
    Four low23 = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5), high23 = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
    out[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5), out[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
    out[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
    out[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
  };
  for (int64_t i = 0; i < b; i += 4)
    for (int64_t j = i; j < b; j += 4) {
      Four upper[4], lower[4], result[4];
      each<4>([&](int r) { lower[r] = *row(j + r, i); });
      transposed(lower, upper);
      each<4>([&](int r) { upper[r] = *row(i + r, j) - upper[r]; });
      transposed(upper, result);
      each<4>([&](int r) { *row(j + r, i) = -result[r]; });
      each<4>([&](int r) { *row(i + r, j) = upper[r]; });
    }
}

inline void fill_skew(const Cayley& map, int64_t block, float* q) {
  int64_t b = map.b, stride = padded(b), next = block * map.parameters();
  fill(q, map.block(), 0);
  for (int64_t i = 0; i < b; ++i) {
    widen(map.v.from(next), q + i * stride + i + 1, b - 1 - i);
    next += b - 1 - i;
  }
  double factor = bound(map, q);
  if (factor != 1)
    for (int64_t i = 0; i < b; ++i)
      for (int64_t j = i + 1; j < b; ++j) q[i * stride + j] = static_cast<float>(q[i * stride + j] * factor);
  subtract_transpose(b, q);
}

// d = -2 (I + Q)^-1 Q by Gauss-Jordan elimination of `a` = I + Q. The symmetric part of a is I, so all pivots
// are >= 1 (Schur complements keep a symmetric part >= I), and no pivoting is needed.
inline void exact_map(int64_t b, const float* q, float* a, float* d) {
  int64_t stride = padded(b);
  for (int64_t i = 0; i < b * stride; ++i) a[i] = q[i], d[i] = -2 * q[i];
  for (int64_t i = 0; i < b; ++i) a[i * stride + i] += 1;
  for (int64_t pivot = 0; pivot < b; ++pivot) {
    const float* a_pivot = a + pivot * stride;
    const float* d_pivot = d + pivot * stride;
    float inverse = 1 / a_pivot[pivot];
    for (int64_t i = 0; i < b; ++i) {
      float factor = a[i * stride + pivot] * inverse;
      if (i == pivot || factor == 0) continue;
      add_scaled(a + i * stride, a_pivot, -factor, stride);
      add_scaled(d + i * stride, d_pivot, -factor, stride);
    }
  }
  for (int64_t i = 0; i < b; ++i) {
    float inverse = 1 / a[i * stride + i];
    for (int64_t j = 0; j < b; ++j) d[i * stride + j] *= inverse;
  }
}

// The series of four coefficients, PEFT's default, in two products instead of three: with P = Q^2,
// D = c1 Q + c2 P + P (c3 Q + c4 P).
inline bool in_pairs(const Cayley& map) { return !map.exact && map.terms == 4; }

// to = x_factor * x + y_factor * y
inline void combine(float x_factor, const float* x, float y_factor, const float* y, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kLanes)
    store(to + i, fma(set(x_factor), load(x + i), mul(set(y_factor), load(y + i))));
}

inline void series_in_pairs(const Cayley& map, const float* q, float* p, float* s, float* d) {
  const float* c = map.coefficients;
  block_product(map.b, q, q, nullptr, p);
  combine(c[2], q, c[3], p, map.block(), s);
  combine(c[0], q, c[1], p, map.block(), d);
  block_product(map.b, p, s, d, d);
}

void cayley(const CayleyForward& op, int64_t begin, int64_t end, float* scratch) {
  const Cayley& map = op.map;
  int64_t b = map.b, stride = padded(b), size = map.block();
  float* q = scratch;
  float* d = q + size;
  float* power = d + size;
  float* next = power + size;
  for (int64_t block = begin; block < end; ++block) {
    if (map.keep && !map.keep[block]) {
      fill(d, size, 0);
    } else {
      fill_skew(map, map.stored == 1 ? 0 : block, q);
      if (map.exact) {
        exact_map(b, q, power, d);
      } else if (in_pairs(map)) {
        series_in_pairs(map, q, power, next, d);
      } else {
        fill(d, size, 0);
        for (int64_t i = 0; i < size; ++i) power[i] = q[i];
        for (int64_t k = 0; k < map.terms; ++k) {
          if (k > 0) {
            block_product(b, power, q, nullptr, next);
            float* swap = power;
            power = next, next = swap;
          }
          add_scaled(d, power, map.coefficients[k], size);
        }
      }
    }
    for (int64_t i = 0; i < b; ++i) narrow(d + i * stride, op.d.from((block * b + i) * b), b);
  }
}

// Sum of the gradients of all result blocks that share a stored block.
inline void gather_gradient(const CayleyBackward& op, int64_t block, float* row, float* g) {
  const Cayley& map = op.map;
  int64_t b = map.b, stride = padded(b);
  int64_t first = map.stored == 1 ? 0 : block, last = map.stored == 1 ? map.count : block + 1;
  fill(g, map.block(), 0);
  for (int64_t from = first; from < last; ++from) {
    if (map.keep && !map.keep[from]) continue;
    for (int64_t i = 0; i < b; ++i) {
      widen(op.grad.from((from * b + i) * b), row, b);
      for (int64_t j = 0; j < b; ++j) g[i * stride + j] += row[j];
    }
  }
}

// dQ = -1/2 (R + I)^T G (R + I)^T
inline void exact_gradient(int64_t b, const float* q, const float* g, float* d, float* outer, float* product,
                           float* dq) {
  int64_t stride = padded(b);
  exact_map(b, q, outer, d);
  for (int64_t i = 0; i < b; ++i) d[i * stride + i] += 2;
  block_product(b, d, g, nullptr, product, true);
  for (int64_t i = 0; i < b; ++i)
    for (int64_t j = 0; j < b; ++j) outer[i * stride + j] = -0.5f * d[j * stride + i];
  block_product(b, product, outer, nullptr, dq);
}

// g_k = c_k G + g_{k+1} Q^T and dQ = g_1 + sum_k (Q^k)^T g_{k+1}; Q^T = -Q.
inline void series_gradient(const Cayley& map, const float* q, const float* g, float* powers, float* gk, float* next,
                            float* dq) {
  int64_t b = map.b, size = map.block();
  fill(dq, size, 0);
  if (map.terms == 0) return;
  for (int64_t i = 0; i < size; ++i) powers[i] = q[i];
  for (int64_t k = 1; k + 1 < map.terms; ++k)
    block_product(b, powers + (k - 1) * size, q, nullptr, powers + k * size);
  for (int64_t i = 0; i < size; ++i) gk[i] = map.coefficients[map.terms - 1] * g[i];
  for (int64_t k = map.terms - 1; k > 0; --k) {
    block_product(b, powers + (k - 1) * size, gk, dq, dq, true);
    block_product(b, gk, q, nullptr, next);
    for (int64_t i = 0; i < size; ++i) gk[i] = map.coefficients[k - 1] * g[i] - next[i];
  }
  add_scaled(dq, gk, 1, size);
}

// Gradient of the series in pairs, with S = c3 Q + c4 P: dS = P G, dP = c2 G + G S^T + c4 dS, dQ = c1 G + c3 dS - dP Q
// - Q dP, as P is symmetric and Q^T = -Q.
inline void pairs_gradient(const Cayley& map, float* q, const float* g, float* p, float* s, float* ds, float* dp,
                           float* dq) {
  int64_t b = map.b, size = map.block();
  const float* c = map.coefficients;
  block_product(b, q, q, nullptr, p);
  for (int64_t i = 0; i < size; ++i) q[i] = -q[i];
  combine(c[2], q, c[3], p, size, s);  // S^T
  block_product(b, p, g, nullptr, ds);
  combine(c[1], g, c[3], ds, size, dp);
  combine(c[0], g, c[2], ds, size, dq);
  block_product(b, g, s, dp, dp);
  block_product(b, dp, q, dq, dq);
  block_product(b, q, dp, dq, dq);
}

void cayley_backward(const CayleyBackward& op, int64_t begin, int64_t end, float* scratch) {
  const Cayley& map = op.map;
  int64_t b = map.b, stride = padded(b), size = map.block();
  float* q = scratch;
  float* g = q + size;
  float* dq = g + size;
  float* first = dq + size;
  float* second = first + size;
  float* powers = second + size;
  for (int64_t block = begin; block < end; ++block) {
    Sink dv = op.dv.from(block * map.parameters());
    gather_gradient(op, block, dq, g);
    if (map.keep && map.stored > 1 && !map.keep[block]) {
      fill(dq, size, 0);  // a dropped block may hold anything
    } else {
      fill_skew(map, block, q);
      if (map.exact) {
        exact_gradient(b, q, g, first, second, powers, dq);
      } else if (in_pairs(map)) {
        pairs_gradient(map, q, g, first, second, powers, powers + size, dq);
      } else {
        series_gradient(map, q, g, powers, first, second, dq);
      }
    }
    subtract_transpose(b, dq);
    for (int64_t i = 0; i < b; ++i) {
      narrow(dq + i * stride + i + 1, dv, b - 1 - i);
      dv = dv.from(b - 1 - i);
    }
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
