// Launchers, without CUDA or PyTorch headers. A stream is a cudaStream_t; errors are cudaError_t, 0 for none.
#pragma once

#include "arguments.h"
#include "plan.h"

namespace hqq_oft::cuda {

enum class Element { HALF, BFLOAT16 };

// Queries the device properties that `choose_plan` needs.
int describe_device(int index, Device* device);

// Rotates a.x into `rotated` [tokens, in_features], contiguous.
int launch_rotate(Element element, const RotationArguments& a, uint16_t* rotated, void* stream);

// Multiplies as planned. If `plan.chained`, a.rotation.x is the output of the preceding `launch_rotate` on the stream;
// code for compute capability 9.0 and later then fetches the weight while the rotation is still running.
int launch_decode(Element element, const Problem& problem, const Plan& plan, const DecodeArguments& a,
                  const Device& device, void* stream);

const char* error_text(int error);

}  // namespace hqq_oft::cuda
