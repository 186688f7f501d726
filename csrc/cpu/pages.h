// Large pages for large results.
//
// The C library maps new pages for every large tensor, and first writes fault once per 4 KiB page; for a dequantized
// weight that costs more than the arithmetic. With transparent huge pages (madvise) a fault maps 2 MiB.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace hqq_oft::cpu {

constexpr size_t kLargePage = size_t{2} << 20;

// For memory not yet written. No-op on systems without huge pages; never affects results.
inline void ask_for_large_pages([[maybe_unused]] void* begin, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  const auto first = (reinterpret_cast<uintptr_t>(begin) + kLargePage - 1) / kLargePage * kLargePage;
  const auto last = (reinterpret_cast<uintptr_t>(begin) + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace hqq_oft::cpu
