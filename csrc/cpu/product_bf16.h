// y = x * W^T + bias for few bfloat16 rows of x and levels of at most 4 bits, with AVX-512's bfloat16 dot product.
//
// A byte is looked up once per field: the 16-bit word that holds the levels of columns 2i and 2i + 1, shifted, is an
// index into a table of bfloat16 levels (vpermw, which ignores all but its low five bits; the table repeats itself, so
// that bits above the level's do not matter). Even and odd columns come out apart, and x is laid out likewise. Per
// group, s * (q . x) - s * z * sum(x).
#pragma once

#include <immintrin.h>

#include "types.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

inline __m512bh as_bf16(__m512i v) { return reinterpret_cast<__m512bh>(v); }

// One row of x: its even and its odd columns of each 64 apart, and its sum over each group.
void prepare_bf16(const uint16_t* x, int64_t K, int64_t group_size, uint16_t* out, float* sums) {
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  for (int64_t group = 0; group < K / group_size; ++group) {
    Vec total = set(0);
    for (int64_t i = 0; i < group_size; i += 32, x += 32) {
      __m512i pairs = _mm512_loadu_si512(x);
      total = _mm512_dpbf16_ps(total, as_bf16(pairs), as_bf16(ones));
      uint16_t* even = out + i / 64 * 64 + i % 64 / 2;
      // the even column is in the low half of a 32-bit word, the odd one in its high half
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm512_cvtepi32_epi16(pairs));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + 32), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
    }
    out += group_size;
    sums[group] = sum(total);
  }
}

inline __m512i level_table(int64_t bits) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) table[i] = bf16_of(static_cast<float>(i & ((1 << bits) - 1))).bits;
  return _mm512_load_si512(table);
}

// One row of W, its levels at `shift` of `packed`, against ROWS rows of x.
template <int ROWS>
inline void dots_bf16(const uint8_t* packed, int shift, __m512i table, const ProductBF16& op, int64_t m,
                      const float* scale, float* out) {
  int64_t K = op.w.K, g = op.w.group_size;
  __m128i even_shift = _mm_cvtsi32_si128(shift), odd_shift = _mm_cvtsi32_si128(shift + 8);
  Vec total[ROWS];
  for (Vec& t : total) t = set(0);
  const uint16_t* x = op.x + m * K;
  for (int64_t k = 0; k < K; k += g) {
    Vec acc[ROWS];
    for (Vec& a : acc) a = set(0);
    for (int64_t i = k; i < k + g; i += 64) {
      __m512i words = _mm512_loadu_si512(packed + i);
      __m512i even = _mm512_permutexvar_epi16(_mm512_srl_epi16(words, even_shift), table);
      __m512i odd = _mm512_permutexvar_epi16(_mm512_srl_epi16(words, odd_shift), table);
      for (int r = 0; r < ROWS; ++r) {
        const uint16_t* row = x + r * K + i;
        acc[r] = _mm512_dpbf16_ps(acc[r], as_bf16(even), as_bf16(_mm512_loadu_si512(row)));
        acc[r] = _mm512_dpbf16_ps(acc[r], as_bf16(odd), as_bf16(_mm512_loadu_si512(row + 32)));
      }
    }
    Vec s = set(*scale++);
    for (int r = 0; r < ROWS; ++r) total[r] = fma(acc[r], s, total[r]);
  }
  for (int r = 0; r < ROWS; ++r) out[r] = sum(total[r]);
}

// sum over groups of s * z * sum(x)
inline float correction(const float* scaled_zero, const float* sums, int64_t groups) {
  Vec total = set(0);
  int64_t i = 0;
  for (; i + kLanes <= groups; i += kLanes) total = fma(load(scaled_zero + i), load(sums + i), total);
  total = fma(load_first(scaled_zero + i, groups - i), load_first(sums + i, groups - i), total);
  return sum(total);
}

void product_bf16(const ProductBF16& op, int64_t begin, int64_t end, float* scratch) {
  const Weight& w = op.w;
  int64_t groups = op.row_groups(), bands = w.fields(), band_rows = w.N / bands;
  float* scale = scratch;
  float* scaled_zero = scale + padded(groups);
  __m512i table = level_table(w.bits);
  auto packed = static_cast<const uint8_t*>(w.packed);
  for (int64_t task = begin; task < end; ++task) {
    for (int64_t band = 0; band < bands; ++band) {
      int64_t row = band * band_rows + task;
      int shift = static_cast<int>(w.bits * (bands - 1 - band));
      widen(w.scale.from(row * groups), scale, groups);
      widen(w.zero.from(row * groups), scaled_zero, groups);
      for (int64_t i = 0; i < groups; ++i) scaled_zero[i] *= scale[i];
      float bias = op.bias ? number(*op.bias, row) : 0;
      for (int64_t m = 0; m < op.M;) {
        float out[8];
        const uint8_t* levels = packed + task * w.K;
        int64_t rows = op.M - m >= 8 ? 8 : op.M - m >= 4 ? 4 : 1;
        if (rows == 8)
          dots_bf16<8>(levels, shift, table, op, m, scale, out);
        else if (rows == 4)
          dots_bf16<4>(levels, shift, table, op, m, scale, out);
        else
          dots_bf16<1>(levels, shift, table, op, m, scale, out);
        for (int64_t r = 0; r < rows; ++r, ++m) {
          float value = out[r] - correction(scaled_zero, op.sums + m * groups, groups) + bias;
          narrow(&value, op.y.from(m * w.N + row), 1);
        }
      }
    }
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
