// A CUDA runtime and a cuBLAS that do nothing, preloaded before PyTorch's: one H100, whose memory is the host's. Kernels
// never run; copies do. With libcuda_stub.c as the driver, everything up to a launch runs as on a GPU.
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

static int object;  // stands for every event, stream and handle
static long launches;

long stub_runtime_launches(void) { return launches; }

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
cudaError_t cudaPeekAtLastError(void) { return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int device, int peer) { return *can = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, enum cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: return *value = 132, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return *value = 232448, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return *value = 233472, cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: return *value = 9, cudaSuccess;
    default: return *value = 0, cudaSuccess;
  }
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* properties, int device) {
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "NVIDIA H100 80GB HBM3");
  properties->major = 9;
  properties->multiProcessorCount = 132;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->maxThreadsPerBlock = 1024;
  properties->warpSize = 32;
  properties->sharedMemPerBlockOptin = 232448;
  properties->totalGlobalMem = (size_t)1 << 36;
  for (int i = 0; i < 3; i++) properties->maxGridSize[i] = properties->maxThreadsDim[i] = 1024;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** address, size_t size) {
  return *address = aligned_alloc(512, (size + 511) / 512 * 512), cudaSuccess;
}
cudaError_t cudaFree(void* address) { return free(address), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  return *available = *total = (size_t)1 << 36, cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return memcpy(to, from, size), cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* address, int value, size_t size, cudaStream_t stream) {
  return memset(address, value, size), cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* attributes, const void* address) {
  memset(attributes, 0, sizeof *attributes);
  return attributes->type = cudaMemoryTypeDevice, cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { return *least = *greatest = 0, cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode* mode) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) { return *event = (void*)&object, cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cudaSuccess; }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* attributes, const void* function) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  return attributes->ptxVersion = attributes->binaryVersion = 90, cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute attribute, int value) {
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* function, int size,
                                                                   size_t shared, unsigned flags) {
  return *count = 1, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launches++, cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  return launches++, cudaSuccess;
}

// cuBLAS: status 0 is success.
int cublasCreate_v2(void** handle) { return *handle = &object, 0; }
int cublasDestroy_v2(void* handle) { return 0; }
int cublasSetStream_v2(void* handle, void* stream) { return 0; }
int cublasSetWorkspace_v2(void* handle, void* workspace, size_t size) { return 0; }
int cublasSetMathMode(void* handle, int mode) { return 0; }
int cublasGetMathMode(void* handle, int* mode) { return *mode = 0, 0; }
int cublasSetPointerMode_v2(void* handle, int mode) { return 0; }
int cublasGetPointerMode_v2(void* handle, int* mode) { return *mode = 0, 0; }
int cublasSgetrfBatched() { return launches++, 0; }
int cublasSgetrsBatched() { return launches++, 0; }
int cublasStrsmBatched() { return launches++, 0; }
int cublasGemmEx() { return launches++, 0; }
int cublasSgemm_v2() { return launches++, 0; }
int cublasSgemmStridedBatched() { return launches++, 0; }
int cublasGemmStridedBatchedEx() { return launches++, 0; }
int cublasLtMatmul() { return launches++, 0; }
int cublasLtMatmulAlgoGetHeuristic(void* handle, void* description, void* a, void* b, void* c, void* d,
                                   void* preference, int wanted, void* results, int* count) {
  const size_t result_size = 96;  // of cublasLtMatmulHeuristicResult_t
  memset(results, 0, wanted * result_size);
  return *count = 1, 0;
}
