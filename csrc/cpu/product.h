// y = x * W^T + bias for few rows of x: a few rows of W are decoded into cache and multiplied by all rows of x.
#pragma once

#include "types.h"
#include "unroll.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// sums[r * stride + m] += w_r . x_m for kProductRows rows of W and ROWS of x.
template <int ROWS>
inline void dots(const float* w, int64_t w_stride, const float* x, int64_t x_stride, int64_t n, float* sums,
                 int64_t stride) {
  Vec acc[kProductRows][ROWS];
  each<kProductRows, ROWS>([&](int r, int m) { acc[r][m] = set(0); });
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec right[ROWS];
    each<ROWS>([&](int m) { right[m] = load(x + m * x_stride + i); });
    each<kProductRows>([&](int r) {
      Vec left = load(w + r * w_stride + i);
      each<ROWS>([&](int m) { acc[r][m] = fma(left, right[m], acc[r][m]); });
    });
  }
  each<kProductRows, ROWS>([&](int r, int m) {
    float rest = 0;
    for (int64_t j = i; j < n; ++j) rest += w[r * w_stride + j] * x[m * x_stride + j];
    sums[r * stride + m] += sum(acc[r][m]) + rest;
  });
}

inline void store_outputs(const float* sums, int64_t row, const Weight& w, const Source* bias, Sink y, int64_t M) {
  float b = bias ? number(*bias, row) : 0;
  for (int64_t m = 0; m < M; ++m) {
    float value = sums[m] + b;
    narrow(&value, y.from(m * w.N + row), 1);
  }
}

void product(const Product& op, int64_t begin, int64_t end, float* scratch) {
  RowOrder order = op.order();
  int64_t K = op.w.K, step = smaller(K, kProductColumns), w_stride = padded(step), stride = padded(op.M);
  float* w = scratch;
  float* sums = w + kProductRows * w_stride;
  for (int64_t task = begin; task < end; ++task) {
    int64_t rows[kProductRows];
    for (int64_t r = 0; r < kProductRows; ++r) {
      int64_t position = task * kProductRows + r;
      rows[r] = position < order.positions() ? order.row(position) : -1;
    }
    for (int64_t i = 0; i < kProductRows * stride; ++i) sums[i] = 0;
    for (int64_t k = 0; k < K; k += step) {
      int64_t n = smaller(step, K - k);
      for (int64_t r = 0; r < kProductRows; ++r)
        if (rows[r] >= 0) {
          decode(op.w, rows[r] * K + k, n, w + r * w_stride);
        } else {
          for (int64_t i = 0; i < n; ++i) w[r * w_stride + i] = 0;
        }
      int64_t m = 0;
      for (; m + 4 <= op.M; m += 4) dots<4>(w, w_stride, op.x + m * K + k, K, n, sums + m, stride);
      for (; m < op.M; ++m) dots<1>(w, w_stride, op.x + m * K + k, K, n, sums + m, stride);
    }
    for (int64_t r = 0; r < kProductRows; ++r)
      if (rows[r] >= 0) store_outputs(sums + r * stride, rows[r], op.w, op.bias, op.y, op.M);
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
