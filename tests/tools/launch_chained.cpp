// Launches the CUDA decode kernel over a CUDA runtime that does nothing, and prints the number of launch attributes.
// Linked with launch.cu by test_cuda_compile.py. Arguments: the kernel's PTX version, whether the launch is chained.
#include <cstdio>
#include <cstdlib>

#include <cuda_runtime.h>

#include "launch.h"

static int ptx_version;
static unsigned attributes;

extern "C" {
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) { return of->ptxVersion = ptx_version, cudaSuccess; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return attributes = config->numAttrs, cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaSuccess; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaSuccess; }
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 0; }
}

int main(int, char** argv) {
  using namespace hqq_oft::cuda;
  ptx_version = std::atoi(argv[1]);
  const Problem problem{1, 4096, 4096, 4, 64, 32, 1};
  const Device device{132, 232448, 233472};
  Plan plan = choose_plan(problem, device);
  plan.chained = std::atoi(argv[2]);
  const int error = launch_decode(Element::HALF, problem, plan, {}, device, nullptr);
  std::printf("%u\n", attributes);
  return error;
}
