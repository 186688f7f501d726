// Loops over the accumulators of a tile.
#pragma once

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// f(row, column) for each element of a small array. Unrolled before the compiler decides what to keep in registers:
// otherwise GCC keeps arrays of vectors on the stack before and after a loop that uses them.
template <int ROWS, int COLUMNS, class F>
inline void each(F&& f) {
#pragma GCC unroll 32
  for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 32
    for (int column = 0; column < COLUMNS; ++column) f(row, column);
  }
}

template <int COUNT, class F>
inline void each(F&& f) {
#pragma GCC unroll 32
  for (int i = 0; i < COUNT; ++i) f(i);
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
