// The two 16-bit formats of x, D, scale, zero and y, as raw bits, and constants of their encoding.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HQQ_OFT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HQQ_OFT_HOST_DEVICE inline
#endif

namespace hqq_oft::cuda {

struct Half {
  static constexpr int MANTISSA_BITS = 10;
  static constexpr int EXPONENT_BIAS = 15;
};

struct BFloat16 {
  static constexpr int MANTISSA_BITS = 7;
  static constexpr int EXPONENT_BIAS = 127;
};

// Bits of 2^exponent.
template <class Format>
HQQ_OFT_HOST_DEVICE constexpr uint32_t power_of_two(int exponent) {
  return static_cast<uint32_t>(exponent + Format::EXPONENT_BIAS) << Format::MANTISSA_BITS;
}

// Two 16-bit values in one register, the first in the low half, as tensor cores expect.
HQQ_OFT_HOST_DEVICE uint32_t pack(uint32_t first, uint32_t second) { return (first & 0xFFFFu) | (second << 16); }

}  // namespace hqq_oft::cuda
