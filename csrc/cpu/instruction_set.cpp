#include "instruction_set.h"

#include <atomic>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hqq_oft::cpu {

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_bf16_kernels;
#endif

namespace {

#if defined(__x86_64__)
// Linux grants a process the tile registers' state on request.
bool grants_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<const Kernels*> detect() {
  std::vector<const Kernels*> found{&portable_kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  // These also check that the operating system saves the wide registers.
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) found.push_back(&avx2_kernels);
  if (avx512) found.push_back(&avx512_kernels);
  bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16) found.push_back(&avx512_bf16_kernels);
  if (bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && grants_tiles())
    found.push_back(&amx_bf16_kernels);
#endif
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{available().back()};
  return kernels;
}

}  // namespace

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> found = detect();
  return found;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool select(const std::string& name) {
  for (const Kernels* candidate : available())
    if (name == candidate->name) {
      chosen().store(candidate);
      return true;
    }
  return false;
}

}  // namespace hqq_oft::cpu
