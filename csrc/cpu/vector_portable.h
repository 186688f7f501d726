// Eight float lanes in portable C++, which compilers auto-vectorize to SSE2 or NEON.
#pragma once

#include <cstring>

#include "types.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

constexpr int kLanes = 8;
constexpr int kRegister = 4;  // floats in a register of SSE2 or NEON

struct Vec {
  float lane[kLanes];
};

template <class F>
inline Vec each(F&& f) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v.lane[i] = f(i);
  return v;
}

inline Vec set(float value) {
  return each([&](int) { return value; });
}
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

inline Vec sub(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec mul(Vec a, Vec b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
// a * b + c
inline Vec fma(Vec a, Vec b, Vec c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline float sum(Vec v) {
  float total = 0;
  for (float lane : v.lane) total += lane;
  return total;
}

inline Vec load(const BF16* p) {
  return each([&](int i) { return float_of(p[i]); });
}
inline Vec load(const F16* p) {
  return each([&](int i) { return float_of(p[i]); });
}
inline void store(BF16* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = bf16_of(v.lane[i]);
}
inline void store(F16* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = f16_of(v.lane[i]);
}

inline bool any_bit(const void* mask) {
  uint64_t bits[2];
  std::memcpy(bits, mask, sizeof bits);
  return (bits[0] | bits[1]) != 0;
}

// to[k][g] = from[g][k] of kRegister rows and columns.
template <class T>
inline void transpose(const T* from, int64_t stride, float* to, int64_t to_stride) {
  for (int g = 0; g < kRegister; ++g)
    for (int k = 0; k < kRegister; ++k) to[k * to_stride + g] = float_of(from[g * stride + k]);
}

template <class P>
inline Vec levels(const P* packed, int shift, int mask) {
  return each([&](int i) { return static_cast<float>((packed[i] >> shift) & mask); });
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
