// D = R - I from skew parameters, and its gradient, one block at a time; formulas as in hqq_oft/reference.py.
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

// Q, its Frobenius norm bounded as `project` of the reference does.
inline void fill_skew(const Cayley& map, int64_t block, float* q) {
  int64_t b = map.b, stride = padded(b), next = block * map.parameters();
  fill(q, map.block(), 0);
  double squares = 0;
  for (int64_t i = 0; i < b; ++i) {
    float* row = q + i * stride + i + 1;
    widen(map.v.from(next), row, b - 1 - i);
    next += b - 1 - i;
    for (int64_t j = 0; j < b - 1 - i; ++j) squares += static_cast<double>(row[j]) * row[j];
  }
  double factor = 1;
  if (map.max_norm) {
    double norm = __builtin_sqrt(2 * squares);
    // a norm may exceed the bound by float32's rounding, so that projecting again changes nothing
    if (!(norm <= *map.max_norm * (1 + 0x1p-23))) factor = *map.max_norm / norm;
  }
  for (int64_t i = 0; i < b; ++i)
    for (int64_t j = i + 1; j < b; ++j) {
      float value = factor == 1 ? q[i * stride + j] : static_cast<float>(q[i * stride + j] * factor);
      q[i * stride + j] = value;
      q[j * stride + i] = -value;
    }
}

// d = -2 (I + Q)^-1 Q by Gauss-Jordan elimination of `a` = I + Q. The symmetric part of a is I, so no pivot is below 1
// in the Schur complements' symmetric parts, and none needs choosing.
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

// Sum of the gradients of all blocks of the result that a stored one was spread to.
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
      map.exact ? exact_gradient(b, q, g, first, second, powers, dq)
                : series_gradient(map, q, g, powers, first, second, dq);
    }
    for (int64_t i = 0; i < b; ++i) {
      float* row = dq + i * stride;
      for (int64_t j = i + 1; j < b; ++j) row[j] -= dq[j * stride + i];
      narrow(row + i + 1, dv, b - 1 - i);
      dv = dv.from(b - 1 - i);
    }
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
