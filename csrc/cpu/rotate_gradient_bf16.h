// The gradient of D of bfloat16 rotations, and in the same pass that of x.
#pragma once

#include "rotate_bf16.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// Rows of x summed over at a time, in pairs.
constexpr int64_t kGradientRows = 2 * kTileRows;

// Rows position ... position + n of a slice, in pairs as 32-bit words: [pair][columns]. An odd last row is paired with
// zeros.
inline void interleave_rows(const Source& from, int64_t row_stride, const RowsByAdapter& rows, int64_t position,
                            int64_t n, int64_t column, int64_t columns, uint16_t* out) {
  auto data = static_cast<const uint16_t*>(from.data) + column;
  for (int64_t r = 0; r < n; r += 2, out += 2 * columns) {
    const uint16_t* one = data + rows.row(position + r) * row_stride;
    const uint16_t* other = r + 1 < n ? data + rows.row(position + r + 1) * row_stride : nullptr;
    prefetch_row(one + kGradientRows * row_stride, columns);
    prefetch_row(one + (kGradientRows + 1) * row_stride, columns);
    for (int64_t j = 0; j < columns; j += kLanes) {
      __m512i low = _mm512_cvtepu16_epi32(load_32(one + j));
      __m512i high = other ? _mm512_cvtepu16_epi32(load_32(other + j)) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + 2 * j, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// sum[i][j] += left_i . right_j over the pairs of rows, for ROWS rows of D and VECS vectors of its columns.
template <int ROWS, int VECS>
inline void gradient_tile(const uint16_t* left, const uint16_t* right, int64_t columns, int64_t pairs, int64_t stride,
                          float* sum) {
  Vec acc[ROWS][VECS];
  each<ROWS, VECS>([&](int r, int v) { acc[r][v] = load(sum + r * stride + v * kLanes); });
  for (int64_t p = 0; p < pairs; ++p, left += 2 * columns, right += 2 * columns) {
    __m512bh b[VECS];
    each<VECS>([&](int v) { b[v] = as_bf16(_mm512_loadu_si512(right + v * 2 * kLanes)); });
    each<ROWS>([&](int r) {
      __m512bh a = broadcast_pair(left + 2 * r);
      each<VECS>([&](int v) { acc[r][v] = _mm512_dpbf16_ps(acc[r][v], b[v], a); });
    });
  }
  each<ROWS, VECS>([&](int r, int v) { store(sum + r * stride + v * kLanes, acc[r][v]); });
}

inline void add_gradient(const uint16_t* left, const uint16_t* right, int64_t columns, int64_t pairs, int64_t b,
                         float* sum) {
  for (int64_t i = 0; i < b; i += kRowsAtATime) {
    int64_t j = 0;
    for (; j + kTogether <= b; j += kTogether)
      gradient_tile<kRowsAtATime, 2>(left + 2 * i, right + 2 * j, columns, pairs, b, sum + i * b + j);
    if (j < b) gradient_tile<kRowsAtATime, 1>(left + 2 * i, right + 2 * j, columns, pairs, b, sum + i * b + j);
  }
}

// The same rows, of a multiple of 32 columns, transposed: [column][pair], with zeros for the rows past n.
inline void transpose_rows(const Source& from, int64_t row_stride, const RowsByAdapter& rows, int64_t position,
                           int64_t n, int64_t column, int64_t columns, uint16_t* out) {
  constexpr __mmask32 kUpper = 0xaaaaaaaa;
  auto data = static_cast<const uint16_t*>(from.data) + column;
  const uint16_t* row[kGradientRows];
  for (int64_t r = 0; r < n; ++r) {
    row[r] = data + rows.row(position + r) * row_stride;
    prefetch_row(row[r] + kGradientRows * row_stride, columns);
  }
  for (int64_t j = 0; j < columns; j += 2 * kLanes, out += 2 * kLanes * kGradientRows) {
    __m512i even[16], odd[16];  // rows, then pairs of columns
    each<16>([&](int i) {
      even[i] = 2 * i < n ? _mm512_loadu_si512(row[2 * i] + j) : _mm512_setzero_si512();
      odd[i] = 2 * i + 1 < n ? _mm512_loadu_si512(row[2 * i + 1] + j) : _mm512_setzero_si512();
    });
    transpose(even);
    transpose(odd);
    each<16>([&](int i) {
      uint16_t* to = out + 2 * i * kGradientRows;
      _mm512_storeu_si512(to, _mm512_mask_blend_epi16(kUpper, even[i], _mm512_slli_epi32(odd[i], 16)));
      _mm512_storeu_si512(to + kGradientRows, _mm512_mask_blend_epi16(kUpper, _mm512_srli_epi32(even[i], 16), odd[i]));
    });
  }
}

void rotate_gradient_bf16(const RotateGradient& op, int64_t begin, int64_t end, float* scratch) {
  const Blocks& blocks = op.blocks;
  if (!in_bf16(blocks, op.left.type, op.right.type)) return rotate_gradient(op, begin, end, scratch);
  int64_t b = blocks.b;
  auto pairs = reinterpret_cast<uint16_t*>(scratch + blocks.packed_floats());
  auto left = reinterpret_cast<uint16_t*>(scratch + 2 * blocks.packed_floats());
  auto right = left + kGradientRows * blocks.tile_stride();
  [[maybe_unused]] TileRegisters registers;
  Rotate rotation{op.right, {op.dx, op.right.type}, op.M, op.right_stride, op.right_stride, blocks, op.rows};
  auto pack = [&](int64_t adapter, int64_t first, int64_t count) {
    if (op.dx) pack_pairs(blocks, adapter, first, count, pairs);
  };
  for_parts(op, begin, end, kGradientRows, scratch, pack, [&](int64_t position, int64_t n, int64_t column, int64_t count) {
    int64_t columns = count * b;
    interleave_rows(op.right, op.right_stride, op.rows, position, n, column, columns, right);
    if (in_tiles(blocks)) {
      transpose_rows(op.left, op.left_stride, op.rows, position, n, column, columns, left);
      for (int64_t i = ceil_div(n, 2) * 2 * columns; i < kGradientRows * columns; ++i) right[i] = 0;
    } else {
      interleave_rows(op.left, op.left_stride, op.rows, position, n, column, columns, left);
    }
    for (int64_t block = 0; block < count; ++block) {
      float* sum = scratch + (blocks.stored == 1 ? 0 : block) * b * b;
      if (in_tiles(blocks)) {
        add_gradient_tiles(left + block * b * kGradientRows, right + 2 * block * b, columns, b, sum);
      } else {
        add_gradient(left + 2 * block * b, right + 2 * block * b, columns, ceil_div(n, 2), b, sum);
      }
    }
    if (op.dx) rotate_range(rotation, {position, position + n}, column, count, pairs, left);
  });
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
