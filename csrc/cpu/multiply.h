// The matrix product used by rotations and Cayley maps: small, float32, operands in cache.
#pragma once

#include "types.h"
#include "unroll.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// Sixteen accumulators fill half of AVX-512's registers, eight half of AVX2's.
constexpr int kRows = kLanes == 16 ? 8 : 4;

// One tile of `multiply`: ROWS rows, VECS vectors.
template <int ROWS, int VECS>
inline void multiply_tile(const float* a, int64_t row_stride, int64_t k_stride, const float* b, int64_t b_stride,
                          int64_t k, const float* init, int64_t init_stride, float* c, int64_t c_stride) {
  Vec acc[ROWS][VECS];
  each<ROWS, VECS>([&](int r, int v) { acc[r][v] = init ? load(init + r * init_stride + v * kLanes) : set(0); });
  for (int64_t i = 0; i < k; ++i) {
    Vec right[VECS];
    each<VECS>([&](int v) { right[v] = load(b + i * b_stride + v * kLanes); });
    each<ROWS>([&](int r) {
      Vec left = set(a[r * row_stride + i * k_stride]);
      each<VECS>([&](int v) { acc[r][v] = fma(left, right[v], acc[r][v]); });
    });
  }
  each<ROWS, VECS>([&](int r, int v) { store(c + r * c_stride + v * kLanes, acc[r][v]); });
}

template <int ROWS>
inline void multiply_rows(const float* a, int64_t row_stride, int64_t k_stride, const float* b, int64_t b_stride,
                          int64_t k, int64_t columns, const float* init, int64_t init_stride, float* c,
                          int64_t c_stride) {
  int64_t j = 0;
  for (; j + 2 * kLanes <= columns; j += 2 * kLanes)
    multiply_tile<ROWS, 2>(a, row_stride, k_stride, b + j, b_stride, k, init ? init + j : nullptr, init_stride, c + j,
                           c_stride);
  for (; j < columns; j += kLanes)
    multiply_tile<ROWS, 1>(a, row_stride, k_stride, b + j, b_stride, k, init ? init + j : nullptr, init_stride, c + j,
                           c_stride);
}

// c = init + a * b, or a * b if init is null; c may alias init. a may be given transposed: its element (r, i) is
// a[r * row_stride + i * k_stride]. Columns are rounded up to whole vectors: b, init and c must be padded accordingly.
inline void multiply(const float* a, int64_t row_stride, int64_t k_stride, const float* b, int64_t b_stride,
                     int64_t rows, int64_t k, int64_t columns, const float* init, int64_t init_stride, float* c,
                     int64_t c_stride) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    multiply_rows<kRows>(a + r * row_stride, row_stride, k_stride, b, b_stride, k, columns,
                         init ? init + r * init_stride : nullptr, init_stride, c + r * c_stride, c_stride);
  for (; r < rows; ++r)
    multiply_rows<1>(a + r * row_stride, row_stride, k_stride, b, b_stride, k, columns,
                     init ? init + r * init_stride : nullptr, init_stride, c + r * c_stride, c_stride);
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
