// Eight float lanes of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

constexpr int kLanes = 8;
using Vec = __m256;
constexpr int kRegister = kLanes;

inline Vec set(float value) { return _mm256_set1_ps(value); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
// a * b + c
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Vec v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline bool any_bit(const void* mask) {
  __m256i bits = _mm256_loadu_si256(static_cast<const __m256i*>(mask));
  return !_mm256_testz_si256(bits, bits);
}

inline __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

inline Vec load(const BF16* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_16(p)), 16));
}
inline Vec load(const F16* p) { return _mm256_cvtph_ps(load_16(p)); }

// To nearest, ties to even, as `bf16_of`.
inline void store(BF16* p, Vec v) {
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  __m256i halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(halves));
}
inline void store(F16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

// to[k][g] = from[g][k] of kRegister rows and columns.
template <class T>
inline void transpose(const T* from, int64_t stride, float* to, int64_t to_stride) {
  // Each step interleaves the first half of the rows with the second, and so rotates the bits of (row, column) by one.
  Vec a[kRegister], b[kRegister];
  auto step = [&](const Vec* x, Vec* y) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kRegister / 2; ++i) {
      Vec low = _mm256_unpacklo_ps(x[i], x[i + kRegister / 2]), high = _mm256_unpackhi_ps(x[i], x[i + kRegister / 2]);
      y[2 * i] = _mm256_permute2f128_ps(low, high, 0x20);
      y[2 * i + 1] = _mm256_permute2f128_ps(low, high, 0x31);
    }
  };
#pragma GCC unroll 16
  for (int g = 0; g < kRegister; ++g) a[g] = load(from + g * stride);
  step(a, b), step(b, a), step(a, b);
#pragma GCC unroll 16
  for (int k = 0; k < kRegister; ++k) store(to + k * to_stride, b[k]);
}

inline Vec levels_of(__m256i elements, int shift, int mask) {
  __m256i shifted = _mm256_srl_epi32(elements, _mm_cvtsi32_si128(shift));
  return _mm256_cvtepi32_ps(_mm256_and_si256(shifted, _mm256_set1_epi32(mask)));
}
inline Vec levels(const uint8_t* packed, int shift, int mask) {
  return levels_of(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed))), shift, mask);
}
inline Vec levels(const int32_t* packed, int shift, int mask) {
  return levels_of(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)), shift, mask);
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
