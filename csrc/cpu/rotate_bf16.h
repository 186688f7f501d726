// Rotations of bfloat16 rows, or weights, by bfloat16 blocks, and the gradient of D, with AVX-512's bfloat16 dot
// product: one instruction multiplies and sums pairs along the summation index.
#pragma once

#include "bf16_levels.h"
#include "decode.h"
#include "rotate.h"
#include "rotate_tiles_bf16.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// D of one slice with pairs along the summation index packed into 32-bit words: [block][b / 2][b].
inline void pack_pairs(const Blocks& blocks, int64_t adapter, int64_t first, int64_t count, uint16_t* out) {
  int64_t b = blocks.b;
  for (int64_t block = 0; block < count; ++block, out += b * b) {
    auto d = static_cast<const uint16_t*>(blocks.d.from(adapter * blocks.elements() + blocks.offset(first + block)).data);
    for (int64_t j = 0; j < b; j += kLanes)
      for (int64_t p = 0; p < b / 2; p += kLanes) {
        int64_t n = smaller(kLanes, b / 2 - p);
        __m512i v[16];
        for (int64_t i = 0; i < kLanes; ++i) {
          if (blocks.transpose) {
            v[i] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1 << n) - 1), d + (j + i) * b + 2 * p);
          } else if (i < n) {
            const uint16_t* row = d + 2 * (p + i) * b + j;
            __m512i low = _mm512_cvtepu16_epi32(load_32(row)), high = _mm512_cvtepu16_epi32(load_32(row + b));
            v[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
          }
        }
        if (blocks.transpose) transpose(v);
        for (int64_t i = 0; i < n; ++i) _mm512_storeu_si512(out + ((p + i) * b + j) * 2, v[i]);
      }
  }
}

// Columns j ... of a block of ROWS rows, y = own + x * D; all of x is read before y is written.
template <int ROWS, int VECS, class T>
inline void rotate_columns(const uint16_t* const* x, const T* const* own, const uint16_t* pairs, int64_t b, int64_t j,
                           uint16_t* const* y) {
  Vec acc[ROWS][VECS];
  each<ROWS, VECS>([&](int r, int v) { acc[r][v] = load(own[r] + j + v * kLanes); });
  for (int64_t p = 0; p < b / 2; ++p) {
    __m512bh right[VECS];
    each<VECS>([&](int v) { right[v] = as_bf16(_mm512_loadu_si512(pairs + (p * b + j + v * kLanes) * 2)); });
    each<ROWS>([&](int r) {
      __m512bh left = broadcast_pair(x[r] + 2 * p);
      each<VECS>([&](int v) { acc[r][v] = _mm512_dpbf16_ps(acc[r][v], right[v], left); });
    });
  }
  each<ROWS, VECS>([&](int r, int v) { store(reinterpret_cast<BF16*>(y[r] + j + v * kLanes), acc[r][v]); });
}

// Columns that are computed together.
constexpr int64_t kTogether = 2 * kLanes;

template <int ROWS, class T>
inline void rotate_block(const uint16_t* const* x, const T* const* own, const uint16_t* pairs, int64_t b,
                         uint16_t* const* y) {
  int64_t j = 0;
  for (; j + kTogether <= b; j += kTogether) rotate_columns<ROWS, 2>(x, own, pairs, b, j, y);
  if (j < b) rotate_columns<ROWS, 1>(x, own, pairs, b, j, y);
}

template <int ROWS>
inline void rotate_rows(const Rotate& op, int64_t position, int64_t column, int64_t count, const uint16_t* pairs,
                        uint16_t* copy) {
  const uint16_t* x[ROWS];
  uint16_t* y[ROWS];
  for (int r = 0; r < ROWS; ++r) {
    int64_t row = op.rows.row(position + r);
    x[r] = static_cast<const uint16_t*>(op.x.data) + row * op.x_stride + column;
    y[r] = static_cast<uint16_t*>(op.y.data) + row * op.y_stride + column;
  }
  int64_t b = op.blocks.b;
  for (int64_t block = 0; block < count; ++block) {
    const uint16_t* from[ROWS];
    const BF16* own[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      from[r] = x[r];
      if (b > kTogether) {  // y may alias x and is written before all of x is read
        __builtin_memcpy(copy + r * b, x[r], b * sizeof *copy);
        from[r] = copy + r * b;
      }
      own[r] = reinterpret_cast<const BF16*>(from[r]);
    }
    rotate_block<ROWS>(from, own, pairs + block * b * b, b, y);
    for (int r = 0; r < ROWS; ++r) x[r] += b, y[r] += b;
  }
}

inline void rotate_rows_in_tiles(const Rotate& op, int64_t position, int64_t n, int64_t column, int64_t count,
                                 const uint16_t* pairs, uint16_t* copy) {
  int64_t stride = op.blocks.tile_stride(), columns = count * op.blocks.b, x_stride = op.x_stride;
  auto sums = reinterpret_cast<float*>(copy + kTile * stride);
  auto from = static_cast<const uint16_t*>(op.x.data) + column, x = from + position * x_stride;
  auto to = static_cast<uint16_t*>(op.y.data) + column;
  if (op.rows.order || n < kTile) {  // not a tile in memory
    for (int64_t r = 0; r < n; ++r)
      __builtin_memcpy(copy + r * stride, from + op.rows.row(position + r) * x_stride, columns * sizeof *copy);
    x = copy, x_stride = stride;
  }
  multiply_blocks(x, x_stride, pairs, op.blocks.b, count, sums, stride);
  for (int64_t r = 0; r < n; ++r)
    store_rounded(reinterpret_cast<const BF16*>(x + r * x_stride), sums + r * stride, columns,
                  to + op.rows.row(position + r) * op.y_stride);
}

// `copy` is scratch for sixteen rows in bfloat16 and float32.
inline void rotate_range(const Rotate& op, Range range, int64_t column, int64_t count, const uint16_t* pairs,
                         uint16_t* copy) {
  int64_t position = range.begin;
  for (; in_tiles(op.blocks) && position < range.end; position += kTile)
    rotate_rows_in_tiles(op, position, smaller(kTile, range.end - position), column, count, pairs, copy);
  for (; position + kRowsAtATime <= range.end; position += kRowsAtATime)
    rotate_rows<kRowsAtATime>(op, position, column, count, pairs, copy);
  for (; position < range.end; ++position) rotate_rows<1>(op, position, column, count, pairs, copy);
}

inline bool in_bf16(const Blocks& blocks, DType left, DType right) {
  return blocks.b % kLanes == 0 && blocks.d.type == DType::bf16 && left == DType::bf16 && right == DType::bf16;
}

void rotate_bf16(const Rotate& op, int64_t begin, int64_t end, float* scratch) {
  if (!in_bf16(op.blocks, op.x.type, op.y.type)) return rotate(op, begin, end, scratch);
  const Blocks& blocks = op.blocks;
  auto pairs = reinterpret_cast<uint16_t*>(scratch);
  auto copy = reinterpret_cast<uint16_t*>(scratch + blocks.packed_floats());
  [[maybe_unused]] TileRegisters registers;
  for_slices(op, begin, end, scratch, [&](int64_t adapter, int64_t first, int64_t count, Range range) {
    pack_pairs(blocks, adapter, first, count, pairs);
    rotate_range(op, range, first * blocks.b, count, pairs, copy);
  });
}

// --- Weights ---------------------------------------------------------------------------------------------------------

// W + W * D, with W exact in the first term and rounded to bfloat16 in the second.
template <int ROWS>
inline void rotate_decoded(const float* plain, int64_t stride, uint16_t* rounded, const uint16_t* pairs, int64_t b,
                           int64_t count, uint16_t* const* out) {
  for (int r = 0; r < ROWS; ++r) narrow(plain + r * stride, {rounded + r * stride, DType::bf16}, count * b);
  for (int64_t block = 0; block < count; ++block) {
    const uint16_t* x[ROWS];
    const float* own[ROWS];
    uint16_t* y[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      int64_t at = r * stride + block * b;
      x[r] = rounded + at, own[r] = plain + at, y[r] = out[r] + block * b;
    }
    rotate_block<ROWS>(x, own, pairs + block * b * b, b, y);
  }
}

void dequantize_bf16(const Dequantize& op, int64_t begin, int64_t end, float* scratch) {
  if (!op.rotated || !in_bf16(op.blocks, op.out.type, op.out.type)) return dequantize(op, begin, end, scratch);
  const Blocks& blocks = op.blocks;
  int64_t stride = blocks.tile_stride();
  auto pairs = reinterpret_cast<uint16_t*>(scratch);
  float* plain = scratch + blocks.packed_floats();
  float* sums = plain + kTileRows * stride;
  auto rounded = reinterpret_cast<uint16_t*>(sums + kTileRows * stride);
  [[maybe_unused]] TileRegisters registers;
  for_tiles(
      op, begin, end, plain, [&](int64_t first, int64_t count) { pack_pairs(blocks, 0, first, count, pairs); },
      [&](const int64_t* rows, int64_t n, int64_t column, int64_t count) {
        uint16_t* out[kTileRows];
        for (int64_t r = 0; r < n; ++r)
          out[r] = static_cast<uint16_t*>(op.out.data) + (rows[r] - op.first_row) * op.out_stride + column;
        if (in_tiles(blocks)) {
          int64_t columns = count * blocks.b;
          for (int64_t r = 0; r < n; ++r) narrow(plain + r * stride, {rounded + r * stride, DType::bf16}, columns);
          multiply_blocks(rounded, stride, pairs, blocks.b, count, sums, stride);
          for (int64_t r = 0; r < n; ++r) store_rounded(plain + r * stride, sums + r * stride, columns, out[r]);
          return;
        }
        int64_t r = 0;
        for (; r + kRowsAtATime <= n; r += kRowsAtATime)
          rotate_decoded<kRowsAtATime>(plain + r * stride, stride, rounded, pairs, blocks.b, count, out + r);
        for (; r < n; ++r) rotate_decoded<1>(plain + r * stride, stride, rounded, pairs, blocks.b, count, out + r);
      });
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
