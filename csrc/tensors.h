// Shared by the operators for CPU tensors: kernel arguments from tensors, allocation, distribution of tasks over
// PyTorch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <new>
#include <vector>

#include "cpu/instruction_set.h"
#include "cpu/pages.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace hqq_oft::cpu;

// --- Tensors ---------------------------------------------------------------------------------------------------------

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: STD_TORCH_CHECK(false, "the native CPU kernels take float32, float16 and bfloat16");
  }
}

inline Source source(const Tensor& t) { return {t.const_data_ptr(), dtype_of(t.scalar_type())}; }
inline Sink sink(const Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t.scalar_type())}; }

inline Tensor compact(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// [M, K] with unit stride in its last dimension; the row stride is arbitrary.
inline Tensor with_contiguous_rows(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) >= t.size(1) ? t : torch::stable::contiguous(t);
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> shape, ScalarType type) {
  Tensor out = torch::stable::new_empty(like, shape, type);
  const size_t bytes = static_cast<size_t>(out.numel()) * out.element_size();
  if (bytes >= 4 * kLargePage) ask_for_large_pages(out.mutable_data_ptr(), bytes);
  return out;
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) shape[i] = t.size(i);
  return shape;
}

// --- Threads ---------------------------------------------------------------------------------------------------------

template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(n * sizeof(T), kAlignment))) {}
  ~Buffer() { ::operator delete(data_, kAlignment); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  T* data_;
};

// Multiplications per thread below which another thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 16;

template <class Op>
void run(void (*kernel)(const Op&, int64_t, int64_t, float*), const Op& op) {
  int64_t grain = larger(1, kWorthAThread / larger(1, op.cost()));
  torch::stable::parallel_for(0, op.tasks(), grain, [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(op.scratch());
    kernel(op, begin, end, scratch.data());
  });
}

}  // namespace
