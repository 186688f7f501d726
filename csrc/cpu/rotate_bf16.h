// Rotations of bfloat16 rows, or weights, by bfloat16 blocks, and the gradient of D, with AVX-512's bfloat16 dot
// product: one instruction multiplies and sums pairs along the summation index.
#pragma once

#include "bf16_levels.h"
#include "decode.h"
#include "rotate.h"

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

inline void rotate_range(const Rotate& op, Range range, int64_t column, int64_t count, const uint16_t* pairs,
                         uint16_t* copy) {
  int64_t position = range.begin;
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
  auto rounded = reinterpret_cast<uint16_t*>(plain + kTileRows * stride);
  for_tiles(
      op, begin, end, plain, [&](int64_t first, int64_t count) { pack_pairs(blocks, 0, first, count, pairs); },
      [&](const int64_t* rows, int64_t n, int64_t column, int64_t count) {
        uint16_t* out[kTileRows];
        for (int64_t r = 0; r < n; ++r)
          out[r] = static_cast<uint16_t*>(op.out.data) + (rows[r] - op.first_row) * op.out_stride + column;
        int64_t r = 0;
        for (; r + kRowsAtATime <= n; r += kRowsAtATime)
          rotate_decoded<kRowsAtATime>(plain + r * stride, stride, rounded, pairs, blocks.b, count, out + r);
        for (; r < n; ++r) rotate_decoded<1>(plain + r * stride, stride, rounded, pairs, blocks.b, count, out + r);
      });
}

// --- Gradient --------------------------------------------------------------------------------------------------------

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
    for (int64_t j = 0; j < columns; j += 2 * kLanes)  // prefetching past the end is harmless
      for (int64_t next = kGradientRows; next < kGradientRows + 2; ++next)
        _mm_prefetch(reinterpret_cast<const char*>(one + next * row_stride + j), _MM_HINT_T0);
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

void rotate_gradient_bf16(const RotateGradient& op, int64_t begin, int64_t end, float* scratch) {
  const Blocks& blocks = op.blocks;
  if (!in_bf16(blocks, op.left.type, op.right.type)) return rotate_gradient(op, begin, end, scratch);
  int64_t b = blocks.b;
  auto pairs = reinterpret_cast<uint16_t*>(scratch + blocks.packed_floats());
  auto left = reinterpret_cast<uint16_t*>(scratch + 2 * blocks.packed_floats());
  auto right = left + kGradientRows * blocks.tile_stride();
  Rotate rotation{op.right, {op.dx, op.right.type}, op.M, op.right_stride, op.right_stride, blocks, op.rows};
  auto pack = [&](int64_t adapter, int64_t first, int64_t count) {
    if (op.dx) pack_pairs(blocks, adapter, first, count, pairs);
  };
  for_parts(op, begin, end, kGradientRows, scratch, pack, [&](int64_t position, int64_t n, int64_t column, int64_t count) {
    int64_t columns = count * b;
    interleave_rows(op.left, op.left_stride, op.rows, position, n, column, columns, left);
    interleave_rows(op.right, op.right_stride, op.rows, position, n, column, columns, right);
    for (int64_t block = 0; block < count; ++block)
      add_gradient(left + 2 * block * b, right + 2 * block * b, columns, ceil_div(n, 2), b,
                   scratch + (blocks.stored == 1 ? 0 : block) * b * b);
    if (op.dx) rotate_range(rotation, {position, position + n}, column, count, pairs, left);
  });
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
