// Conversions between float32, the compute type, and the tensors' types.
#pragma once

#include "types.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

template <class T>
struct Type {
  using type = T;
};

// Dispatches f(Type<T>()) on a type known at run time.
template <class F>
inline void with_type(DType type, F&& f) {
  switch (type) {
    case DType::f32: return f(Type<float>());
    case DType::f16: return f(Type<F16>());
    case DType::bf16: return f(Type<BF16>());
  }
}

// The first n < kLanes elements; the other lanes are zero. With AVX-512, masked instructions replace both functions.
template <class T>
inline Vec load_first(const T* p, int64_t n) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = float_of(p[i]);
  return load(lanes);
}

// Stores the first n < kLanes lanes.
template <class T>
inline void store_first(T* p, Vec v, int64_t n) {
  float lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) narrow(lanes[i], p + i);
}

inline void widen(Source from, float* to, int64_t n) {
  with_type(from.type, [&](auto type) {
    auto p = static_cast<const typename decltype(type)::type*>(from.data);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(p + i));
    if (i < n) store_first(to + i, load_first(p + i, n - i), n - i);
  });
}

inline void narrow(const float* from, Sink to, int64_t n) {
  with_type(to.type, [&](auto type) {
    auto p = static_cast<typename decltype(type)::type*>(to.data);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(p + i, load(from + i));
    if (i < n) store_first(p + i, load_first(from + i, n - i), n - i);
  });
}

inline float number(Source from, int64_t i) {
  float value;
  widen(from.from(i), &value, 1);
  return value;
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
