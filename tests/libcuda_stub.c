// A CUDA driver that accepts every call and does nothing: what is left of a launch is the host's own work.
// Built as libcuda.so.1 by tests/stub_gpu.py; has what Triton's launcher and its utilities link against.
#include <stddef.h>
#include <stdint.h>

typedef int CUresult;

static int object;  // stands for every context, module and function
static long launches;

CUresult cuInit(unsigned flags) { return 0; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, 0; }
CUresult cuGetErrorString(int error, const char** text) { return *text = "none", 0; }
CUresult cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) { return *function = NULL, 1; }

CUresult cuDeviceGetCount(int* count) { return *count = 1, 0; }
CUresult cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
CUresult cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {  // an H100's
    case 8: return *value = 49152, 0;    // shared memory per block
    case 16: return *value = 132, 0;     // multiprocessors
    case 75: return *value = 9, 0;       // compute capability, major
    case 76: return *value = 0, 0;       // and minor
    case 97: return *value = 232448, 0;  // shared memory per block, opt-in
    default: return *value = 65536, 0;
  }
}

CUresult cuCtxGetCurrent(void** context) { return *context = &object, 0; }
CUresult cuCtxSetCurrent(void* context) { return 0; }
CUresult cuCtxGetDevice(int* device) { return *device = 0, 0; }
CUresult cuCtxPushCurrent_v2(void* context) { return 0; }
CUresult cuCtxPopCurrent_v2(void** context) { return *context = &object, 0; }
CUresult cuCtxGetLimit(size_t* value, int limit) { return *value = 1 << 20, 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &object, 0; }
CUresult cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) { return *flags = *active = 0, 0; }

CUresult cuModuleLoadData(void** module, const void* image) { return *module = &object, 0; }
CUresult cuModuleUnload(void* module) { return 0; }
CUresult cuModuleGetFunction(void** function, void* module, const char* name) { return *function = &object, 0; }
CUresult cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = attribute == 0 ? 1024 : 0, 0; }
CUresult cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void* function, int config) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int* count, void* function, const void* config) { return *count = 1, 0; }

CUresult cuPointerGetAttribute(void* value, int attribute, unsigned long long pointer) {
  return *(unsigned long long*)value = pointer, 0;  // a host pointer passes for a device pointer
}
CUresult cuPointerGetAttributes(unsigned count, int* attributes, void** values, unsigned long long pointer) { return 0; }
CUresult cuTensorMapEncodeTiled(void) { return 0; }
CUresult cuTensorMapEncodeIm2col(void) { return 0; }

CUresult cuStreamIsCapturing(void* stream, int* capturing) { return *capturing = 0, 0; }
CUresult cuStreamGetCaptureInfo(void) { return 0; }
CUresult cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) { return launches++, 0; }
CUresult cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                        unsigned shared, void* stream, void** parameters, void** extra) {
  return launches++, 0;
}

long stub_launches(void) { return launches; }
