// Packed levels to pairs of 16-bit floats, exactly.
//
// Inserting a level q of BITS bits at the top of the mantissa of 2^BITS gives 2^BITS + q: one shift and one logical
// operation for two levels. The bias 2^BITS has the magnitude of the levels, so the float32 sum of the products loses
// no precision; it is subtracted together with the zero: sum x (2^BITS + q - (2^BITS + z)). Include ptx.cuh first.
#pragma once

#include "layout.h"

namespace hqq_oft::cuda {

template <class Format, int BITS>
struct Levels {
  static constexpr int FIELDS = Packing<BITS>::FIELDS;
  static constexpr int BIAS = 1 << BITS;
  static constexpr int POSITION = Format::MANTISSA_BITS - BITS;  // of the level's lowest bit
  static constexpr uint32_t MASK = ((1u << BITS) - 1u) << POSITION;

  // The level at bit `bit` of each half of `word`, as a pair. Bits shifted across a half's boundary are
  // masked.
  static __device__ __forceinline__ uint32_t pair_at(uint32_t word, int bit) {
    const int shift = bit - POSITION;
    const uint32_t placed = shift >= 0 ? word >> shift : word << -shift;
    return and_or(placed, pack(MASK, MASK), pack(power_of_two<Format>(BITS), power_of_two<Format>(BITS)));
  }

  // Columns 0 and 2 (odd = 0) or 1 and 3 (odd = 1) of field `field` in a lane's word of four.
  static __device__ __forceinline__ uint32_t pair(const uint32_t* words, int field, int odd) {
    const int bit = BITS * (FIELDS - 1 - field);
    if constexpr (BITS == 3) {
      // One column per word, its levels in 30 bits: five fields fit below bit 15, and five above it.
      const int half = bit >= 15 ? 15 : 0;
      return pair_at(pack(words[odd] >> half, words[odd + 2] >> half), bit - half);
    } else {
      return pair_at(words[0], bit + 8 * odd);
    }
  }
};

// bfloat16 has seven bits of mantissa; a byte is exact in its eight significant bits, and is converted through float32.
template <>
struct Levels<BFloat16, 8> {
  static constexpr int BIAS = 0;

  static __device__ __forceinline__ uint32_t pair(const uint32_t* words, int, int odd) {
    const uint32_t word = words[0] >> (8 * odd);
    return narrow<BFloat16>(byte_value(word & 0xFFu), byte_value((word >> 16) & 0xFFu));
  }

 private:
  // (2^23 + byte) - 2^23.
  static __device__ __forceinline__ float byte_value(uint32_t byte) {
    return from_bits(0x4B000000u | byte) - 8388608.0f;
  }
};

}  // namespace hqq_oft::cuda
