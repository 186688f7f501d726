// Sixteen float lanes of AVX-512 (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>

#include "types.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

constexpr int kLanes = 16;
using Vec = __m512;
constexpr int kRegister = kLanes;

inline Vec set(float value) { return _mm512_set1_ps(value); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
// a * b + c
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }

inline bool any_bit(const void* mask) {
  __m512i bits = _mm512_loadu_si512(mask);
  return _mm512_test_epi32_mask(bits, bits) != 0;
}

inline __m256i load_32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline Vec load(const BF16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_32(p)), 16));
}
inline Vec load(const F16* p) { return _mm512_cvtph_ps(load_32(p)); }

// To nearest, ties to even, as `bf16_of`; the instruction flushes denormals to zero.
inline void store(BF16* p, Vec v) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
#else
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
  __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
#endif
}
inline void store(F16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1 << n) - 1); }
inline Vec load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline Vec load_first(const BF16* p, int64_t n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p)), 16));
}
inline Vec load_first(const F16* p, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p)); }
inline void store_first(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
inline void store_first(BF16* p, Vec v, int64_t n) {
  BF16 lanes[kLanes];
  store(lanes, v);
  _mm256_mask_storeu_epi16(p, first(n), load_32(lanes));
}
inline void store_first(F16* p, Vec v, int64_t n) {
  F16 lanes[kLanes];
  store(lanes, v);
  _mm256_mask_storeu_epi16(p, first(n), load_32(lanes));
}

// to[k][g] = from[g][k] of kRegister rows and columns.
template <class T>
inline void transpose(const T* from, int64_t stride, float* to, int64_t to_stride) {
  // Each step interleaves the first half of the rows with the second, and so rotates the bits of (row, column) by one.
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  Vec a[kRegister], b[kRegister];
  auto step = [&](const Vec* x, Vec* y) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kRegister / 2; ++i) {
      y[2 * i] = _mm512_permutex2var_ps(x[i], low, x[i + kRegister / 2]);
      y[2 * i + 1] = _mm512_permutex2var_ps(x[i], high, x[i + kRegister / 2]);
    }
  };
#pragma GCC unroll 16
  for (int g = 0; g < kRegister; ++g) a[g] = load(from + g * stride);
  step(a, b), step(b, a), step(a, b), step(b, a);
#pragma GCC unroll 16
  for (int k = 0; k < kRegister; ++k) store(to + k * to_stride, a[k]);
}

inline Vec levels_of(__m512i elements, int shift, int mask) {
  __m512i shifted = _mm512_srl_epi32(elements, _mm_cvtsi32_si128(shift));
  return _mm512_cvtepi32_ps(_mm512_and_si512(shifted, _mm512_set1_epi32(mask)));
}
inline Vec levels(const uint8_t* packed, int shift, int mask) {
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  return levels_of(_mm512_cvtepu8_epi32(bytes), shift, mask);
}
inline Vec levels(const int32_t* packed, int shift, int mask) {
  return levels_of(_mm512_loadu_si512(packed), shift, mask);
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
