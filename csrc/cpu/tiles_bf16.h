// Products of 16 x 16 tiles with AMX: c += a * b, where a row of `a` holds pairs of bfloat16 along the summation index,
// and so does a row of `b` for each of sixteen columns. One instruction multiplies 16 x 16 x 16 pairs.
#pragma once

#include <immintrin.h>

#include "types.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

constexpr int64_t kTile = 16;  // rows, columns and pairs

#ifdef __AMX_BF16__
// Configures the thread's tile registers, 16 rows of 64 bytes each, while it exists.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_of_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    __asm__ volatile("" ::: "memory");  // GCC's intrinsics do not say that they read memory
    _tile_loadconfig(&configuration);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// Adjacent tiles of an operand, elements apart: rows of a tile, tiles, and the next 16 pairs of the same rows or columns.
struct Tiles {
  const uint16_t* data;
  int64_t row, tile, step;

  int64_t row_bytes() const { return 2 * row; }
};

// Tiles of sums, elements apart: rows of a tile, tiles below each other, and beside each other.
struct TileSums {
  float* data;
  int64_t row, below, beside;
  bool from_zero = false;

  int64_t row_bytes() const { return 4 * row; }
};

// Adds a[r] * b[v] over a multiple of 16 pairs to tile (r, v) of the sums, or to zero, and stores it there, for ROWS x
// COLUMNS tiles, at most 2 x 2.
template <int ROWS, int COLUMNS>
void tile_dots(Tiles a, Tiles b, int64_t pairs, TileSums c) {
  constexpr bool kTwoRows = ROWS == 2, kTwoColumns = COLUMNS == 2;
  __asm__ volatile("" ::: "memory");  // as above
  if (c.from_zero) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c.data, c.row_bytes());
    if constexpr (kTwoColumns) _tile_loadd(1, c.data + c.beside, c.row_bytes());
    if constexpr (kTwoRows) _tile_loadd(2, c.data + c.below, c.row_bytes());
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, c.data + c.below + c.beside, c.row_bytes());
  }
  for (int64_t p = 0; p < pairs; p += kTile, a.data += a.step, b.data += b.step) {
    _tile_loadd(4, a.data, a.row_bytes());
    _tile_loadd(6, b.data, b.row_bytes());
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, b.data + b.tile, b.row_bytes());
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, a.data + a.tile, a.row_bytes());
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c.data, c.row_bytes());
  if constexpr (kTwoColumns) _tile_stored(1, c.data + c.beside, c.row_bytes());
  if constexpr (kTwoRows) _tile_stored(2, c.data + c.below, c.row_bytes());
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c.data + c.below + c.beside, c.row_bytes());
}
#else
class TileRegisters {};
#endif

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
