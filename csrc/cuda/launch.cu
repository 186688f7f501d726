#include "launch.h"

#include "ptx.cuh"

#include "decode.cuh"

namespace hqq_oft::cuda {
namespace {

using Kernel = void (*)(DecodeArguments);

template <class Format, int BITS, int SPAN>
Kernel by_tokens(int token_tiles) {
  if constexpr (max_tokens(BITS) > TOKENS) {
    if (token_tiles == 2) return decode_kernel<Format, BITS, SPAN, 2>;
  }
  return decode_kernel<Format, BITS, SPAN, 1>;
}

template <class Format, int BITS>
Kernel by_span(const Plan& plan) {
  return plan.span == 64 ? by_tokens<Format, BITS, 64>(plan.token_tiles)
                         : by_tokens<Format, BITS, 32>(plan.token_tiles);
}

template <class Format>
Kernel by_bits(int bits, const Plan& plan) {
  switch (bits) {
    case 8: return by_span<Format, 8>(plan);
    case 4: return by_span<Format, 4>(plan);
    case 3: return by_span<Format, 3>(plan);
    case 2: return by_span<Format, 2>(plan);
    default: return by_span<Format, 1>(plan);
  }
}

}  // namespace

int describe_device(int index, Device* device) {
  const struct {
    cudaDeviceAttr attribute;
    int* value;
  } wanted[] = {
      {cudaDevAttrMultiProcessorCount, &device->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_per_block},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device->shared_per_multiprocessor},
  };
  for (const auto& [attribute, value] : wanted) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, index); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

int launch_rotate(Element element, const RotationArguments& a, uint16_t* rotated, void* stream) {
  const int blocks = ceil_div(a.in_features, WARPS * STEP);
  const auto kernel = element == Element::HALF ? rotate_kernel<Half> : rotate_kernel<BFloat16>;
  kernel<<<blocks, WARPS * WARP, 0, static_cast<cudaStream_t>(stream)>>>(a, rotated);
  return cudaGetLastError();
}

int launch_decode(Element element, const Problem& problem, const Plan& plan, const DecodeArguments& a,
                  const Device& device, void* stream) {
  const Kernel kernel =
      element == Element::HALF ? by_bits<Half>(problem.bits, plan) : by_bits<BFloat16>(problem.bits, plan);
  const int shared = shared_layout(packing_facts(problem.bits), plan).total;
  // The attribute is global to the function and host threads share it, so always set the device's maximum.
  if (const cudaError_t error =
          cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               device.shared_per_block);
      error != cudaSuccess) {
    return error;
  }
  bool overlaps = false;
  if (plan.chained) {
    // The code that runs, not the device, must have the instructions that wait for the launch before this one: a newer
    // device may run code that the driver compiled from PTX of an older architecture.
    cudaFuncAttributes code{};
    if (const cudaError_t error = cudaFuncGetAttributes(&code, reinterpret_cast<const void*>(kernel));
        error != cudaSuccess) {
      return error;
    }
    overlaps = code.ptxVersion >= 90;
  }
  cudaLaunchAttribute chain{};
  chain.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  chain.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.bands, plan.splits);
  config.blockDim = dim3(plan.warps * WARP);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &chain;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, a);
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace hqq_oft::cuda
