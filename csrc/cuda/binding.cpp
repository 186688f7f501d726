// The operator `decode` of `hqq_oft_native`, `linear` for CUDA tensors: check, allocate, launch.
//
// Uses only PyTorch's stable ABI. hqq_oft/ops/native/cuda.py rejects unsupported calls with messages for users; the checks
// here prevent out-of-bounds access by invalid calls.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <optional>

#include "launch.h"

namespace {

using namespace hqq_oft::cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check(int error) {
  STD_TORCH_CHECK(error == 0, "the CUDA decode kernel could not be launched: ", error_text(error));
}

// A unique stamp for a launch's tickets (decode.cuh), unlikely to be in uninitialized memory. Its low 16 bits are 0. A
// counter initialized from the clock is hashed with SplitMix64 (Steele et al. 2014).
uint64_t next_stamp() {
  static std::atomic<uint64_t> counter{
      static_cast<uint64_t>(std::chrono::system_clock::now().time_since_epoch().count())};
  uint64_t z = counter.fetch_add(1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return (z ^ (z >> 31)) << 16;
}

Tensor compact(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

const uint16_t* elements(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }

bool is_aligned(const void* address, int alignment) { return reinterpret_cast<uintptr_t>(address) % alignment == 0; }

void check_group(const char* name, const Tensor& t, const Tensor& x, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() && t.get_device_index() == x.get_device_index(), name,
                  " must have the dtype and the device of x");
  STD_TORCH_CHECK(t.numel() == numel && is_aligned(t.const_data_ptr(), 4), name, " must have ", numel,
                  " elements, from an address that 4 divides");
}

// `stream_address` is a cudaStream_t of the device of x. Only libtorch_cuda knows the current one, and this library must
// not need libtorch_cuda: it also loads with a PyTorch without CUDA.
Tensor decode(const Tensor& x_in, const std::optional<Tensor>& d_in, const Tensor& packed, const Tensor& scale_in,
              const Tensor& zero_in, int64_t N, int64_t K, int64_t bits, int64_t group_size, int64_t axis,
              const std::optional<Tensor>& bias_in, const std::optional<Tensor>& index_in, int64_t stream_address) {
  const int64_t M = x_in.size(0);
  const bool half = x_in.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(half || x_in.scalar_type() == ScalarType::BFloat16, "x must be float16 or bfloat16");
  STD_TORCH_CHECK(axis == 1 && (bits == 8 || bits == 4 || bits == 3 || bits == 2 || bits == 1),
                  "axis must be 1 and bits 8, 4, 3, 2 or 1");
  STD_TORCH_CHECK(x_in.dim() == 2 && x_in.size(1) == K && M <= max_tokens(static_cast<int>(bits)),
                  "x must be [M, in_features], with M at most 16 (3 bits: 8)");
  const PackingFacts facts = packing_facts(static_cast<int>(bits));
  STD_TORCH_CHECK(N % facts.fields == 0 && group_size % GROUP_UNIT == 0 && group_size > 0 && K % group_size == 0,
                  "bands must be whole rows, groups multiples of 32 columns within a row");

  const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
  Tensor y = torch::stable::new_empty(x_in, {M, N});
  if (M == 0 || N == 0) return y;

  const bool reads_aligned = x_in.stride(1) == 1 && x_in.stride(0) % 4 == 0 && is_aligned(x_in.const_data_ptr(), 8);
  const Tensor x = reads_aligned ? x_in : x_in.is_contiguous() ? torch::stable::clone(x_in) : compact(x_in);
  const Tensor scale = compact(scale_in), zero = compact(zero_in);
  STD_TORCH_CHECK(packed.is_contiguous() && packed.numel() == N / facts.fields * K &&
                      packed.scalar_type() == (bits == 3 ? ScalarType::Int : ScalarType::Byte) &&
                      packed.get_device_index() == x.get_device_index() && is_aligned(packed.const_data_ptr(), UNIT),
                  "packed must be contiguous, begin at an address that 16 divides, and fit the weight's shape");
  check_group("scale", scale, x, N * K / group_size);
  check_group("zero", zero, x, N * K / group_size);

  Problem problem{static_cast<int>(M), static_cast<int>(N), static_cast<int>(K), static_cast<int>(bits),
                  static_cast<int>(group_size), 0, 1};
  DecodeArguments a{};
  a.rotation = {elements(x), x.stride(0), nullptr, nullptr, problem.tokens, problem.in_features, 0, 1, 0};
  std::optional<Tensor> d, index, bias;
  if (d_in.has_value()) {
    d = compact(*d_in);
    const int64_t dims = d->dim(), b = d->size(dims - 1), stored = d->size(dims - 3);
    STD_TORCH_CHECK(dims == (index_in.has_value() ? 4 : 3) && d->size(dims - 2) == b && b % STEP == 0 && K % b == 0 &&
                        (stored == 1 || stored == K / b) && d->scalar_type() == x.scalar_type() &&
                        d->get_device_index() == x.get_device_index() && is_aligned(d->const_data_ptr(), 4),
                    "d must be [blocks, b, b], with an index per row [adapters, blocks, b, b], in the dtype of x");
    problem.block_size = a.rotation.block_size = static_cast<int>(b);
    a.rotation.d = elements(*d);
    a.rotation.stored_blocks = static_cast<int>(stored);
    if (index_in.has_value()) {
      index = compact(*index_in);
      STD_TORCH_CHECK(index->scalar_type() == ScalarType::Long && index->numel() == M &&
                          index->get_device_index() == x.get_device_index(),
                      "adapter_index must be int64 with an entry per row of x");
      a.rotation.adapter_index = static_cast<const int64_t*>(index->const_data_ptr());
      a.rotation.adapters = d->size(0);
      problem.adapters = static_cast<int>(std::min(d->size(0), M));
    }
  }
  if (bias_in.has_value()) {
    bias = compact(*bias_in);
    STD_TORCH_CHECK(bias->numel() == N && bias->scalar_type() == x.scalar_type() &&
                        bias->get_device_index() == x.get_device_index(),
                    "bias must be [out_features] in the dtype of x");
    a.bias = elements(*bias);
  }

  Device device{};
  check(describe_device(x.get_device_index(), &device));
  const Plan plan = choose_plan(problem, device);
  const Tensor partial = torch::stable::new_empty(x, {partial_elements(problem, plan)}, ScalarType::Float);
  const Tensor tickets = torch::stable::new_empty(x, {ticket_count(plan)}, ScalarType::Long);
  a.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  a.scale = elements(scale);
  a.zero = elements(zero);
  a.y = static_cast<uint16_t*>(y.mutable_data_ptr());
  a.partial = static_cast<float*>(partial.mutable_data_ptr());
  a.tickets = static_cast<uint64_t*>(tickets.mutable_data_ptr());
  a.stamp = next_stamp();
  apply_plan(problem, plan, &a);

  void* stream = reinterpret_cast<void*>(stream_address);
  const Element element = half ? Element::HALF : Element::BFLOAT16;
  std::optional<Tensor> rotated;
  if (plan.chained) {
    rotated = torch::stable::new_empty(x, {M, K});
    auto* out = static_cast<uint16_t*>(rotated->mutable_data_ptr());
    check(launch_rotate(element, a.rotation, out, stream));
    a.rotation = {out, K, nullptr, nullptr, problem.tokens, problem.in_features, 0, 1, 0};
  }
  check(launch_decode(element, problem, plan, a, device, stream));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hqq_oft_native, m) {
  m.def(
      "decode(Tensor x, Tensor? d, Tensor packed, Tensor scale, Tensor zero, SymInt out_features, SymInt in_features, "
      "int bits, SymInt group_size, int axis, Tensor? bias, Tensor? adapter_index, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(hqq_oft_native, CUDA, m) { m.impl("decode", TORCH_BOX(&decode)); }
