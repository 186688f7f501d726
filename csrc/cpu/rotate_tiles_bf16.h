// Rotations of bfloat16 rows, and the gradient of D, with AMX: for blocks of whole tiles, any number of rows.
//
// Rows of x are one operand as they are, D in pairs along the summation index the other. The sums start with x in
// float32. For the gradient, which is summed over rows, x is transposed.
#pragma once

#include "bf16_levels.h"
#include "tiles_bf16.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// A tile of x: sixteen pairs.
constexpr int64_t kTileColumns = 2 * kTile;

// A row in both forms that `add_rotated` takes.
inline void copy_row(const uint16_t* from, int64_t columns, uint16_t* x, float* y) {
  for (int64_t j = 0; j < columns; j += 2 * kLanes) {
    _mm512_storeu_si512(x + j, _mm512_loadu_si512(from + j));
    each<2>([&](int i) { store(y + j + i * kLanes, load(reinterpret_cast<const BF16*>(from) + j + i * kLanes)); });
  }
}

inline void round_row(const float* y, int64_t columns, uint16_t* to) {
  for (int64_t j = 0; j < columns; j += kLanes) store(reinterpret_cast<BF16*>(to) + j, load(y + j));
}

#ifdef __AMX_BF16__
inline bool in_tiles(const Blocks& blocks) { return blocks.b % kTileColumns == 0; }

// y += x * D for sixteen rows, `stride` apart, of `count` blocks, with D as of `pack_pairs`.
inline void add_rotated(const uint16_t* x, int64_t stride, const uint16_t* pairs, int64_t b, int64_t count, float* y) {
  for (int64_t block = 0; block < count; ++block, x += b, y += b, pairs += b * b)
    for (int64_t j = 0; j < b; j += 2 * kTile)
      tile_dots<1, 2>({x, stride, 0, kTileColumns}, {pairs + 2 * j, 2 * b, 2 * kTile, 2 * b * kTile}, b / 2,
                      {y + j, stride, 0, kTile});
}

// sum[i][j] += left_i . right_j for one block over sixteen pairs of rows: left [column][pair], right [pair][columns].
inline void add_gradient_tiles(const uint16_t* left, const uint16_t* right, int64_t columns, int64_t b, float* sum) {
  for (int64_t i = 0; i < b; i += 2 * kTile)
    for (int64_t j = 0; j < b; j += 2 * kTile)
      tile_dots<2, 2>({left + i * kTileColumns, kTileColumns, kTile * kTileColumns, 0},
                      {right + 2 * j, 2 * columns, 2 * kTile, 0}, kTile, {sum + i * b + j, b, kTile * b, kTile});
}
#else
inline bool in_tiles(const Blocks&) { return false; }
inline void add_rotated(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, float*) {}
inline void add_gradient_tiles(const uint16_t*, const uint16_t*, int64_t, int64_t, float*) {}
#endif

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
