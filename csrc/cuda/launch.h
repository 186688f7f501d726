// Launchers, free of CUDA's and PyTorch's headers. A stream is a cudaStream_t; errors are cudaError_t, 0 for none.
#pragma once

#include "arguments.h"
#include "plan.h"

namespace hqq_oft::cuda {

enum class Element { HALF, BFLOAT16 };

// What `choose_plan` asks about a device.
int describe_device(int index, Device* device, int* capability_major);

// Rotates a.x into `rotated` [tokens, in_features], contiguous.
int launch_rotate(Element element, const RotationArguments& a, uint16_t* rotated, void* stream);

// Multiplies as planned. If `plan.chained`, a.rotation.x is what the launch before this one on the stream, a
// `launch_rotate`, writes: where the architecture can (compute capability 9.0), the weight is already being fetched
// then.
int launch_decode(Element element, const Problem& problem, const Plan& plan, const DecodeArguments& a,
                  const Device& device, int capability_major, void* stream);

const char* error_text(int error);

}  // namespace hqq_oft::cuda
