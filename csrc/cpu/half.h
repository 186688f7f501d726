// The two 16-bit formats, one number at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(float value) { return value; }
inline float float_of(BF16 value) { return float_from_bits(static_cast<uint32_t>(value.bits) << 16); }

inline float float_of(F16 value) {
  uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
  if (rest >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x0400) return float_from_bits(sign | ((rest << 13) + (112u << 23)));
  float magnitude = static_cast<float>(rest) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}

// Rounds to nearest, ties to even; every NaN becomes the canonical quiet NaN.
inline BF16 bf16_of(float value) {
  if (value != value) return {0x7fc0};
  uint32_t bits = bits_of(value);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline F16 f16_of(float value) {
  uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to 2^16: infinity
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {  // 2^-14: normal
    half = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
  } else {  // adding 1/2 leaves multiples of 2^-24 in the low bits, rounded by the addition
    half = bits_of(float_from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  }
  return {static_cast<uint16_t>(sign | half)};
}

inline void narrow(float value, float* to) { *to = value; }
inline void narrow(float value, BF16* to) { *to = bf16_of(value); }
inline void narrow(float value, F16* to) { *to = f16_of(value); }

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
