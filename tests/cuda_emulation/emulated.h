// The instructions of csrc/cuda/ptx.cuh on a host: every thread of a block is a fiber, every function does what the PTX
// ISA says of its instruction. Threads run in a random order between the points where they wait for each other;
// asynchronous copies land at once or when they are waited for, at random; shared memory and outputs begin as NaN. So a
// barrier or a wait that is missing within a block shows as a wrong value. Blocks run one after the other, so the order
// of memory between blocks is not tested here.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <exception>
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
  ucontext_t start;
  jmp_buf here;  // where it waits; switching by longjmp spares the system call of swapcontext
  std::unique_ptr<char[]> stack;
  int index;
  bool started, done;
  std::vector<Copy> copies;  // not committed yet
  std::deque<std::vector<Copy>> groups;
  const uint32_t *a, *b;  // this thread's fragments in the mma under way
  int shared_value;       // what it gives to a broadcast
};

struct Barrier {
  int threads;  // that have not ended
  std::vector<Thread*> waiting;
};

struct Block {
  jmp_buf scheduler;
  std::vector<Thread> threads = std::vector<Thread>(WARPS * WARP);
  std::vector<Thread*> ready;
  Barrier of_warp[WARPS], of_block;
  std::vector<unsigned char> shared;
  std::mt19937 random{0};
  Thread* now = nullptr;
  int x = 0, y = 0, warps = 0;
  std::exception_ptr failure;  // of a thread
};

inline Block block;

// What a launch writes that this one waits for: NaN to a block until it has waited.
struct PreviousLaunch {
  std::vector<uint16_t> written, seen;
  bool awaited = false;
  void hide() { seen.assign(written.size(), 0xFFFF); }
  void show() { std::copy(written.begin(), written.end(), seen.begin()); }
};

inline PreviousLaunch previous_launch;

inline int block_x() { return block.x; }
inline int block_y() { return block.y; }
inline int lane_index() { return block.now->index % WARP; }
inline int warp_index() { return block.now->index / WARP; }
inline int warp_count() { return block.warps; }
inline Thread& neighbour(int lane) { return block.threads[warp_index() * WARP + lane]; }

inline void release_if_all_wait(Barrier& barrier) {
  if (static_cast<int>(barrier.waiting.size()) < barrier.threads) return;
  block.ready.insert(block.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
  barrier.waiting.clear();
}

inline void wait_at(Barrier& barrier) {
  barrier.waiting.push_back(block.now);
  release_if_all_wait(barrier);
  if (_setjmp(block.now->here) == 0) _longjmp(block.scheduler, 1);
}

inline void sync_warp() { wait_at(block.of_warp[warp_index()]); }
inline void sync_block() { wait_at(block.of_block); }

inline int broadcast(int value) {
  block.now->shared_value = value;
  sync_warp();
  const int of_first = neighbour(0).shared_value;
  sync_warp();
  return of_first;
}

// One thread, picked at random, runs until it waits or ends.
inline void run_some_thread() {
  std::swap(block.ready[block.random() % block.ready.size()], block.ready.back());
  Thread& thread = *block.ready.back();
  block.ready.pop_back();
  block.now = &thread;
  if (_setjmp(block.scheduler) == 0) {
    if (thread.started) _longjmp(thread.here, 1);
    thread.started = true;
    setcontext(&thread.start);
  }
  if (thread.done) {
    for (Barrier* barrier : {&block.of_warp[warp_index()], &block.of_block}) {
      --barrier->threads;
      release_if_all_wait(*barrier);
    }
  }
}

// Runs `kernel` as one block of `warps` warps with `shared_bytes` of shared memory, behind which nothing may change.
template <class Function>
void run_block(int x, int y, int warps, int shared_bytes, Function kernel) {
  static Function* entry;
  entry = &kernel;
  constexpr int GUARD = 256;
  constexpr size_t STACK = 64 << 10;
  block.x = x;
  block.y = y;
  block.failure = nullptr;
  block.ready.clear();
  block.warps = warps;
  block.shared.assign(shared_bytes + GUARD, 0xFF);  // NaN in either format and in float32
  block.of_block = {warps * WARP, {}};
  for (Barrier& barrier : block.of_warp) barrier = {WARP, {}};
  for (int i = 0; i < warps * WARP; ++i) {
    Thread& thread = block.threads[i];
    if (!thread.stack) thread.stack.reset(new char[STACK]);
    thread.index = i;
    thread.started = thread.done = false;
    thread.copies.clear();
    thread.groups.clear();
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = STACK;
    makecontext(&thread.start, +[] {
      try {
        (*entry)();
      } catch (...) {  // nothing outside of this stack could
        block.failure = std::current_exception();
      }
      block.now->done = true;
      _longjmp(block.scheduler, 1);
    }, 0);
    block.ready.push_back(&thread);
  }
  while (!block.ready.empty() && !block.failure) run_some_thread();
  if (block.failure) std::rethrow_exception(block.failure);
  if (block.of_block.threads != 0) throw std::runtime_error("threads wait for ever");
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

inline uint32_t and_or(uint32_t value, uint32_t mask, uint32_t bits) { return (value & mask) | bits; }

// --- Matrix units ----------------------------------------------------------------------------------------------------

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": registers of A are (row g, columns 2t, 2t +
// 1), (g + 8, same), (g, columns 2t + 8, 2t + 9), (g + 8, same); of B (rows 2t, 2t + 1, column g), (rows 2t + 8, 2t +
// 9, column g); of C (row g, columns 2t, 2t + 1), (row g + 8, same); g is lane / 4 and t is lane % 4.
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

inline void land(const Copy& copy) {
  std::memset(copy.to, 0, copy.size);
  std::memcpy(copy.to, copy.from, copy.bytes);
}

inline void copy_async(void* shared, const void* global, int bytes, int size) {
  check_aligned(shared, size);
  check_aligned(global, size);
  const Copy copy{shared, global, bytes, size};
  // Either at once, over what a slower thread may still want to read, or as late as can be.
  block.random() % 2 == 0 ? land(copy) : block.now->copies.push_back(copy);
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
    for (const Copy& copy : groups.front()) land(copy);
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

inline float load_past_l1(const float* address) { return *address; }

inline void release_next_launch() {}
inline void wait_for_previous_launch() {
  previous_launch.awaited = true;
  previous_launch.show();
}

}  // namespace hqq_oft::cuda
