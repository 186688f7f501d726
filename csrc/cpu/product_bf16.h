// y = x * W^T + bias for a few bfloat16 rows of x: memory-bound.
//
// Each field takes two table lookups per 16-bit word: the word holds the levels of columns 2i and 2i + 1 and, shifted,
// is an index into a table of levels. Even and odd columns are decoded separately, and x has the same layout. Per
// group, s * (q . x) - s * z * sum(x).
#pragma once

#include "bf16_levels.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// Separates the even and odd columns of each 64 columns of x, and sums each row over each group.
void prepare_bf16(const PrepareBF16& op, int64_t begin, int64_t end, float*) {
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  int64_t groups = op.K / op.group_size;
  for (int64_t m = begin; m < end; ++m)
    for (int64_t group = 0; group < groups; ++group) {
      const uint16_t* x = op.x + m * op.K + group * op.group_size;
      uint16_t* to = op.columns + m * op.K + group * op.group_size;
      Vec total = set(0);
      for (int64_t i = 0; i < op.group_size; i += 32) {
        __m512i pairs = _mm512_loadu_si512(x + i);
        total = _mm512_dpbf16_ps(total, as_bf16(pairs), as_bf16(ones));
        uint16_t* even = to + i / 64 * 64 + i % 64 / 2;
        // the even column is in the low half of a 32-bit word, the odd one in its high half
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(even), _mm512_cvtepi32_epi16(pairs));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + 32), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
      }
      op.sums[m * groups + group] = sum(total);
    }
}

// Two rows of W in neighbouring bands of the same bytes, and the shifts that bring their levels of even and of odd
// columns to the low bits.
struct PackedRows {
  const uint8_t* bytes;
  __m128i even[2], odd[2];
};

// The hardware prefetcher stops at 4 KiB page boundaries, so prefetch two pages ahead. Prefetching past the end is
// harmless.
constexpr int64_t kBytesAhead = 8192;

// totals[w][m] += s * (q . x) of each group in columns begin ... end, for ROWS rows of x and two of W, which share
// bytes and vectors of x. Totals are vectors, `stride` of them apart.
template <int ROWS>
inline void dots_bf16(const PackedRows& w, __m512i table, const ProductBF16& op, int64_t m, int64_t begin, int64_t end,
                      const float* scale, int64_t scale_stride, float* totals, int64_t stride) {
  int64_t K = op.w.K, g = op.w.group_size;
  Vec total[2][ROWS];
  each<2, ROWS>([&](int i, int r) { total[i][r] = load(totals + (i * stride + r) * kLanes); });
  const uint16_t* x = op.x + m * K;
  for (int64_t k = begin; k < end; k += g) {
    Vec acc[2][ROWS];
    each<2, ROWS>([&](int i, int r) { acc[i][r] = set(0); });
    for (int64_t column = k; column < k + g; column += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(w.bytes + column + kBytesAhead), _MM_HINT_T0);
      __m512i words = _mm512_loadu_si512(w.bytes + column), even[2], odd[2];
      each<2>([&](int i) {
        even[i] = _mm512_permutexvar_epi16(_mm512_srl_epi16(words, w.even[i]), table);
        odd[i] = _mm512_permutexvar_epi16(_mm512_srl_epi16(words, w.odd[i]), table);
      });
      each<ROWS>([&](int r) {
        __m512i x_even = _mm512_loadu_si512(x + r * K + column), x_odd = _mm512_loadu_si512(x + r * K + column + 32);
        each<2>([&](int i) {
          acc[i][r] = _mm512_dpbf16_ps(acc[i][r], as_bf16(even[i]), as_bf16(x_even));
          acc[i][r] = _mm512_dpbf16_ps(acc[i][r], as_bf16(odd[i]), as_bf16(x_odd));
        });
      });
    }
    each<2>([&](int i) {
      Vec s = set(scale[i * scale_stride + k / g]);
      each<ROWS>([&](int r) { total[i][r] = fma(acc[i][r], s, total[i][r]); });
    });
  }
  each<2, ROWS>([&](int i, int r) { store(totals + (i * stride + r) * kLanes, total[i][r]); });
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
  constexpr int kRowsOfW = ProductBF16::kRows;
  const Weight& w = op.w;
  RowOrder order = op.order();
  int64_t K = w.K, M = op.M, groups = op.row_groups(), group_stride = padded(groups);
  int64_t band_rows = w.N / w.fields(), step = op.slice_columns();
  float* scale = scratch;
  float* scaled_zero = scale + kRowsOfW * group_stride;
  float* totals = scaled_zero + kRowsOfW * group_stride;
  Vec levels = level_vector(w.bits);
  __m512i table = table_of(levels, levels);
  for (int64_t task = begin; task < end; ++task) {
    PackedRows rows[kRowsOfW / 2];
    int64_t number_of[kRowsOfW];
    for (int i = 0; i < kRowsOfW; ++i) {
      // repeats the last row past the end
      int64_t row = order.row(smaller(task * kRowsOfW + i, w.N - 1));
      int shift = static_cast<int>(w.bits * (w.fields() - 1 - row / band_rows));
      rows[i / 2].bytes = static_cast<const uint8_t*>(w.packed) + row % band_rows * K;
      rows[i / 2].even[i % 2] = _mm_cvtsi32_si128(shift);
      rows[i / 2].odd[i % 2] = _mm_cvtsi32_si128(shift + 8);
      number_of[i] = row;
      float *s = scale + i * group_stride, *sz = scaled_zero + i * group_stride;
      widen(w.scale.from(row * groups), s, groups);
      widen(w.zero.from(row * groups), sz, groups);
      for (int64_t j = 0; j < groups; j += kLanes) store(sz + j, mul(load(sz + j), load(s + j)));
    }
    for (int64_t i = 0; i < kRowsOfW * M; ++i) store(totals + i * kLanes, set(0));
    for (int64_t k = 0; k < K; k += step)
      for (int i = 0; i < kRowsOfW; i += 2) {
        float* sums = totals + i * M * kLanes;
        const float* s = scale + i * group_stride;
        int64_t last = smaller(K, k + step), m = 0;
        for (; m + 4 <= M; m += 4)
          dots_bf16<4>(rows[i / 2], table, op, m, k, last, s, group_stride, sums + m * kLanes, M);
        for (; m < M; ++m) dots_bf16<1>(rows[i / 2], table, op, m, k, last, s, group_stride, sums + m * kLanes, M);
      }
    for (int i = 0; i < kRowsOfW; ++i) {
      float bias = op.bias ? number(*op.bias, number_of[i]) : 0;
      for (int64_t m = 0; m < M; ++m) {
        float value = sum(load(totals + (i * M + m) * kLanes)) -
                      correction(scaled_zero + i * group_stride, op.sums + m * groups, groups) + bias;
        narrow(&value, op.y.from(m * w.N + number_of[i]), 1);
      }
    }
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
