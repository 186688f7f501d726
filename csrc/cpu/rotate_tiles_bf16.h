// Rotations of bfloat16 rows, and the gradient of D, with AMX: for blocks of whole tiles, any number of rows.
//
// Rows of x are one operand as they are, D in pairs along the summation index the other; x is added in float32. For the
// gradient, which is summed over rows, x is transposed.
#pragma once

#include "bf16_levels.h"
#include "tiles_bf16.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// A tile of x: sixteen pairs.
constexpr int64_t kTileColumns = 2 * kTile;

// x + sums of 32 columns in bfloat16.
template <class T>
inline __m512i rounded_sums(const T* x, const float* sums) {
  return table_of(_mm512_add_ps(load(x), load(sums)), _mm512_add_ps(load(x + kLanes), load(sums + kLanes)));
}

template <class T>
inline void store_rounded(const T* x, const float* sums, int64_t columns, uint16_t* y) {
  for (int64_t j = 0; j < columns; j += 2 * kLanes) _mm512_storeu_si512(y + j, rounded_sums(x + j, sums + j));
}

#ifdef __AMX_BF16__
inline bool in_tiles(const Blocks& blocks) { return blocks.b % kTileColumns == 0; }

// sums = x * D for sixteen rows of `count` blocks, with D as of `pack_pairs`. All of them are stored before one is
// read: a load that soon follows a tile's store waits for it.
inline void multiply_blocks(const uint16_t* x, int64_t x_stride, const uint16_t* pairs, int64_t b, int64_t count,
                            float* sums, int64_t stride) {
  for (int64_t block = 0; block < count; ++block, x += b, sums += b, pairs += b * b)
    for (int64_t j = 0; j < b; j += 2 * kTile)
      tile_dots<1, 2>({x, x_stride, 0, kTileColumns}, {pairs + 2 * j, 2 * b, 2 * kTile, 2 * b * kTile}, b / 2,
                      {sums + j, stride, 0, kTile, true});
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
inline void multiply_blocks(const uint16_t*, int64_t, const uint16_t*, int64_t, int64_t, float*, int64_t) {}
inline void add_gradient_tiles(const uint16_t*, const uint16_t*, int64_t, int64_t, float*) {}
#endif

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
