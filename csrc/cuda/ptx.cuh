// PTX instructions used by the kernels, wrapped as functions; the emulation implements the same functions on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "layout.h"

namespace hqq_oft::cuda {

// --- Conversions -----------------------------------------------------------------------------------------------------

HQQ_OFT_HOST_DEVICE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Format>
__device__ __forceinline__ float widen(uint16_t bits);

template <>
__device__ __forceinline__ float widen<Half>(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

template <>
__device__ __forceinline__ float widen<BFloat16>(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// Two floats rounded to nearest even, the first in the low half.
template <class Format>
__device__ __forceinline__ uint32_t narrow(float first, float second);

template <>
__device__ __forceinline__ uint32_t narrow<Half>(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

template <>
__device__ __forceinline__ uint32_t narrow<BFloat16>(float first, float second) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
}

// (value & mask) | bits in one instruction, which the compiler does not generate for two constants.
__device__ __forceinline__ uint32_t and_or(uint32_t value, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(value), "r"(mask), "r"(bits));
  return result;
}

// --- Tensor cores ----------------------------------------------------------------------------------------------------

// c += a b on 16 x 16 by 16 x 8 (mma.m16n8k16), with float32 sums.
template <class Format>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma<Half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- Asynchronous copies ---------------------------------------------------------------------------------------------

// A policy for lines that are read once: evicted from the L2 cache first.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies `bytes` (0 or 16) to shared memory, bypassing the L1 cache, and zero-fills the rest of 16.
__device__ __forceinline__ void copy_unit_async(void* shared, const void* global, int bytes, uint64_t policy) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(address), "l"(global),
               "r"(bytes), "l"(policy)
               : "memory");
}

// Copies `bytes` (0, 2 or 4) to shared memory, and zero-fills the rest of 4.
__device__ __forceinline__ void copy_word_async(void* shared, const void* global, int bytes) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's committed groups are in flight.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- Order between threads, blocks and launches ----------------------------------------------------------------------

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char storage[];
  return storage;
}

__device__ __forceinline__ int block_x() { return static_cast<int>(blockIdx.x); }
__device__ __forceinline__ int block_y() { return static_cast<int>(blockIdx.y); }
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % WARP); }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x / WARP); }
__device__ __forceinline__ int warp_count() { return static_cast<int>(blockDim.x / WARP); }

__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Lane 0's value, in every lane.
__device__ __forceinline__ int broadcast(int value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

// Acquire-release fence at device scope.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ __forceinline__ uint64_t compare_and_swap(uint64_t* address, uint64_t expected, uint64_t desired) {
  return atomicCAS(reinterpret_cast<unsigned long long*>(address), expected, desired);
}

// Bypasses this multiprocessor's L1 cache, which is not coherent with the other blocks' stores.
__device__ __forceinline__ float load_past_l1(const float* address) { return __ldcg(address); }

// Lets the next launch of a chain start, if the architecture supports it; that launch must still wait for the results.
__device__ __forceinline__ void release_next_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launch before this one in a chain has ended and its stores are visible.
__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace hqq_oft::cuda
