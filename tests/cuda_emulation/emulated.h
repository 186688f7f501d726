// The instructions of csrc/cuda/ptx.cuh on a host: every thread of a block is a fiber, every function does what the PTX
// ISA says of its instruction, as late as it may. Threads run in a random order between the points where they wait for
// each other; asynchronous copies land when they are waited for; shared memory and outputs begin as NaN. So a barrier or
// a wait that is missing shows as a wrong value.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "layout.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace hqq_oft::cuda {

// --- Threads ---------------------------------------------------------------------------------------------------------

struct Copy {
  void* to;
  const void* from;
  int bytes, size;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int index;
  bool done;
  int warp_barriers, block_barriers;  // passed or waited at
  std::vector<Copy> copies;           // not committed yet
  std::deque<std::vector<Copy>> groups;
  const uint32_t *a, *b;  // this thread's fragments in the mma under way
  int shared_value;       // what it gives to a broadcast
};

struct Block {
  ucontext_t scheduler;
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  std::mt19937 random{0};
  Thread* now = nullptr;
  int x = 0, y = 0;
};

inline Block block;
inline bool previous_launch_awaited = false;

inline void yield() { swapcontext(&block.now->context, &block.scheduler); }

inline int block_x() { return block.x; }
inline int block_y() { return block.y; }
inline int lane_index() { return block.now->index % WARP; }
inline int warp_index() { return block.now->index / WARP; }
inline Thread& neighbour(int lane) { return block.threads[warp_index() * WARP + lane]; }

inline void sync_warp() {
  const int mine = ++block.now->warp_barriers;
  const int warp = warp_index();
  for (bool waiting = true; waiting;) {
    waiting = false;
    for (int lane = 0; lane < WARP; ++lane) waiting |= block.threads[warp * WARP + lane].warp_barriers < mine;
    if (waiting) yield();
  }
}

inline void sync_block() {
  const int mine = ++block.now->block_barriers;
  for (bool waiting = true; waiting;) {
    waiting = false;
    for (const Thread& thread : block.threads) waiting |= thread.block_barriers < mine;
    if (waiting) yield();
  }
}

inline int broadcast(int value) {
  block.now->shared_value = value;
  sync_warp();
  const int of_first = neighbour(0).shared_value;
  sync_warp();
  return of_first;
}

// Runs `kernel` as one block of THREADS threads with `shared_bytes` of shared memory and something behind to be kept.
template <class Function>
void run_block(int x, int y, int shared_bytes, Function kernel) {
  static Function* entry;
  entry = &kernel;
  constexpr int GUARD = 256;
  block.x = x;
  block.y = y;
  block.shared.assign(shared_bytes + GUARD, 0xFF);  // NaN in either format and in float32
  block.threads.resize(THREADS);
  std::vector<Thread*> alive;
  for (int i = 0; i < THREADS; ++i) {
    Thread& thread = block.threads[i];
    constexpr size_t STACK = 64 << 10;
    if (!thread.stack) thread.stack.reset(new char[STACK]);
    thread.index = i;
    thread.done = false;
    thread.warp_barriers = thread.block_barriers = 0;
    thread.copies.clear();
    thread.groups.clear();
    getcontext(&thread.context);
    thread.context.uc_stack = {thread.stack.get(), 0, STACK};
    thread.context.uc_link = &block.scheduler;
    makecontext(&thread.context, +[] { (*entry)(); block.now->done = true; }, 0);
    alive.push_back(&thread);
  }
  while (!alive.empty()) {
    const size_t next = block.random() % alive.size();
    block.now = alive[next];
    swapcontext(&block.scheduler, &block.now->context);
    if (block.now->done) {
      // A thread that has ended holds nobody up, as on the machine.
      block.now->warp_barriers = block.now->block_barriers = 1 << 30;
      alive[next] = alive.back();
      alive.pop_back();
    }
  }
  for (int i = 0; i < GUARD; ++i) {
    if (block.shared[shared_bytes + i] != 0xFF) throw std::runtime_error("written behind shared memory");
  }
}

// --- Conversions -----------------------------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <class Format>
float widen(uint16_t bits) {
  constexpr int EXPONENTS = 2 * Format::EXPONENT_BIAS + 1;
  const int exponent = (bits & 0x7FFF) >> Format::MANTISSA_BITS;
  const int mantissa = bits & ((1 << Format::MANTISSA_BITS) - 1);
  float value;
  if (exponent == EXPONENTS) {
    value = mantissa != 0 ? NAN : INFINITY;
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), 1 - Format::EXPONENT_BIAS - Format::MANTISSA_BITS);
  } else {
    value = std::ldexp(static_cast<float>(mantissa + (1 << Format::MANTISSA_BITS)),
                       exponent - Format::EXPONENT_BIAS - Format::MANTISSA_BITS);
  }
  return bits & 0x8000 ? -value : value;
}

template <class Format>
uint32_t narrow_one(float value) {
  const uint32_t sign = bits_of(value) >> 31 << 15;
  if (std::isnan(value)) return 0x7FFF;
  const uint32_t infinity = static_cast<uint32_t>(2 * Format::EXPONENT_BIAS + 1) << Format::MANTISSA_BITS;
  const float magnitude = std::fabs(value);
  int exponent = magnitude > 0 ? std::ilogb(magnitude) : 1 - Format::EXPONENT_BIAS;
  if (std::isinf(value) || exponent > Format::EXPONENT_BIAS) return sign | infinity;
  if (exponent < 1 - Format::EXPONENT_BIAS) exponent = 1 - Format::EXPONENT_BIAS;
  // To nearest even in units of the last place; a carry out of the mantissa raises the exponent by itself.
  const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, Format::MANTISSA_BITS - exponent)));
  const int normal = exponent + Format::EXPONENT_BIAS - 1;
  return sign | ((static_cast<uint32_t>(normal) << Format::MANTISSA_BITS) + units);
}

template <class Format>
uint32_t narrow(float first, float second) {
  return pack(narrow_one<Format>(first), narrow_one<Format>(second));
}

// --- Matrix units ----------------------------------------------------------------------------------------------------

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": registers of A are (row g, columns 2t, 2t + 1),
// (g + 8, same), (g, columns 2t + 8, 2t + 9), (g + 8, same); of B (rows 2t, 2t + 1, column g), (rows 2t + 8, 2t + 9,
// column g); of C (row g, columns 2t, 2t + 1), (row g + 8, same); g is lane / 4 and t is lane % 4.
template <class Format>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  block.now->a = a;
  block.now->b = b;
  sync_warp();
  const int lane = lane_index();
  const auto half = [](uint32_t pair, int i) { return widen<Format>(static_cast<uint16_t>(pair >> (16 * i))); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int t = k % 8 / 2, upper = k / 8;
      const uint32_t of_a = neighbour(row % 8 * 4 + t).a[row / 8 + 2 * upper];
      const uint32_t of_b = neighbour(column * 4 + t).b[upper];
      sum += static_cast<double>(half(of_a, k % 2)) * half(of_b, k % 2);
    }
    c[i] = static_cast<float>(sum);
  }
  sync_warp();
}

// --- Asynchronous copies ---------------------------------------------------------------------------------------------

inline uint64_t evict_first_policy() { return 0; }

inline void check_aligned(const void* address, int alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) throw std::runtime_error("a misaligned copy");
}

inline void copy_async(void* shared, const void* global, int bytes, int size) {
  check_aligned(shared, size);
  check_aligned(global, size);
  block.now->copies.push_back({shared, global, bytes, size});
}

inline void copy_unit_async(void* shared, const void* global, int bytes, uint64_t) {
  copy_async(shared, global, bytes, 16);
}
inline void copy_word_async(void* shared, const void* global, int bytes) { copy_async(shared, global, bytes, 4); }

inline void commit_copies() {
  block.now->groups.push_back(std::move(block.now->copies));
  block.now->copies.clear();
}

template <int PENDING>
void wait_copies() {
  auto& groups = block.now->groups;
  for (; groups.size() > PENDING; groups.pop_front()) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.size);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
  }
}

// --- Order between threads, blocks and launches ----------------------------------------------------------------------

inline unsigned char* shared_memory() {
  const auto address = reinterpret_cast<uintptr_t>(block.shared.data());
  if (address % 16 != 0) throw std::runtime_error("shared memory is misaligned");
  return block.shared.data();
}

inline void fence() {}

inline uint64_t compare_and_swap(uint64_t* address, uint64_t expected, uint64_t desired) {
  const uint64_t found = *address;
  if (found == expected) *address = desired;
  return found;
}

inline Float4 load_past_l1(const Float4* address) { return *address; }

inline void release_next_launch() {}
inline void wait_for_previous_launch() { previous_launch_awaited = true; }

}  // namespace hqq_oft::cuda
