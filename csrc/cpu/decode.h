// Packed levels to float32 weights, and the dequantization kernels.
#pragma once

#include "types.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// n weights of one field; scale(i) and zero(i) are vectors from its i-th weight on.
template <class P, class Scale, class Zero>
inline void decode_run(const P* packed, int shift, int mask, int64_t n, Scale&& scale, Zero&& zero, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    store(out + i, mul(sub(levels(packed + i, shift, mask), zero(i, kLanes)), scale(i, kLanes)));
  if (i == n) return;
  P last[kLanes] = {};
  for (int64_t j = i; j < n; ++j) last[j - i] = packed[j];
  float weights[kLanes];
  store(weights, mul(sub(levels(last, shift, mask), zero(i, n - i)), scale(i, n - i)));
  for (int64_t j = i; j < n; ++j) out[j] = weights[j - i];
}

template <class P, class S>
inline void decode_as(const Weight& w, int64_t element, int64_t n, float* out) {
  auto packed = static_cast<const P*>(w.packed);
  auto scale = static_cast<const S*>(w.scale.data), zero = static_cast<const S*>(w.zero.data);
  int64_t band = w.band_elements(), position = element % band;
  int shift = static_cast<int>(w.bits * (w.fields() - 1 - element / band)), mask = (1 << w.bits) - 1;
  // Runs end where the field, or the group (axis 1), or the row of groups (axis 0) does.
  int64_t period = w.axis == 1 ? w.group_size : w.groups(), group = element / period, within = element % period;
  while (n > 0) {
    int64_t run = smaller(smaller(n, band - position), period - within);
    if (w.axis == 1) {
      Vec s = set(float_of(scale[group])), z = set(float_of(zero[group]));
      decode_run(packed + position, shift, mask, run, [&](int64_t, int64_t) { return s; },
                 [&](int64_t, int64_t) { return z; }, out);
    } else {
      auto from = [&](const S* values) {
        return [values](int64_t i, int64_t count) {
          return count == kLanes ? load(values + i) : load_first(values + i, count);
        };
      };
      decode_run(packed + position, shift, mask, run, from(scale + within), from(zero + within), out);
    }
    n -= run, out += run, position += run, within += run;
    if (position == band) position = 0, shift -= static_cast<int>(w.bits);
    if (within == period) within = 0, ++group;
  }
}

// Weights element ... element + n of W read row by row, as float32.
inline void decode(const Weight& w, int64_t element, int64_t n, float* out) {
  with_type(w.scale.type, [&](auto type) {
    using S = typename decltype(type)::type;
    w.bits == 3 ? decode_as<int32_t, S>(w, element, n, out) : decode_as<uint8_t, S>(w, element, n, out);
  });
}

inline void dequantize_plain(const Dequantize& op, int64_t begin, int64_t end, float* scratch) {
  RowOrder order = op.order();
  for (int64_t task = begin; task < end; ++task) {
    int64_t first = task % op.slices() * op.slice_columns(), columns = smaller(op.slice_columns(), op.columns - first);
    int64_t from = task / op.slices() * op.chunk_rows(), to = smaller(from + op.chunk_rows(), order.positions());
    for (int64_t position = from; position < to; ++position) {
      int64_t row = order.row(position);
      if (row < 0) continue;
      decode(op.w, row * op.w.K + op.first_column + first, columns, scratch);
      narrow(scratch, op.out.from((row - op.first_row) * op.out_stride + first), columns);
    }
  }
}

// Prefetches what a row of the window will read and write: rows are too far apart for the hardware prefetcher.
inline void look_ahead(const Dequantize& op, int64_t row, int64_t column, int64_t columns) {
  int64_t size = op.w.bits == 3 ? 4 : 1;
  auto packed = static_cast<const char*>(op.w.packed) +
                (row * op.w.K + op.first_column + column) % op.w.band_elements() * size;
  for (int64_t i = 0; i < columns * size; i += 64) __builtin_prefetch(packed + i);
  auto out = static_cast<const char*>(op.out.from((row - op.first_row) * op.out_stride + column).data);
  for (int64_t i = 0; i < columns * size_of(op.out.type); i += 64) __builtin_prefetch(out + i, 1);
}

// For each slice of tasks begin ... end, `next_slice(first block, blocks)`, then f(rows of W, count, column, blocks)
// for tiles of rows that are decoded into `plain`.
template <class N, class F>
inline void for_tiles(const Dequantize& op, int64_t begin, int64_t end, float* plain, N&& next_slice, F&& f) {
  const Blocks& blocks = op.blocks;
  RowOrder order = op.order();
  for (int64_t task = begin; task < end; ++task) {
    auto [first, count, column, columns] = blocks.slice(task % op.slices());
    int64_t from = task / op.slices() * op.chunk_rows(), to = smaller(from + op.chunk_rows(), order.positions());
    next_slice(first, count);
    for (int64_t position = from; position < to;) {
      int64_t rows[kTileRows], n = 0;
      for (; position < to && n < kTileRows; ++position) {
        int64_t row = order.row(position);
        if (row < 0) continue;
        int64_t ahead = position + kTileRows < to ? order.row(position + kTileRows) : -1;
        if (ahead >= 0) look_ahead(op, ahead, column, columns);
        decode(op.w, row * op.w.K + op.first_column + column, columns, plain + n * blocks.tile_stride());
        rows[n++] = row;
      }
      f(rows, n, column, count);
    }
  }
}

inline void dequantize_rotated(const Dequantize& op, int64_t begin, int64_t end, float* scratch) {
  const Blocks& blocks = op.blocks;
  int64_t stride = blocks.tile_stride();
  float* packed = scratch;
  float* packing_row = packed + blocks.packed_floats();
  float* plain = packing_row + padded(blocks.b);
  float* rotated = plain + kTileRows * stride;
  for_tiles(
      op, begin, end, plain,
      [&](int64_t first, int64_t count) { pack_slice(blocks, 0, first, count, packing_row, packed); },
      [&](const int64_t* rows, int64_t n, int64_t column, int64_t count) {
        rotate_tile(plain, n, blocks, count, packed, rotated);
        for (int64_t r = 0; r < n; ++r)
          narrow(rotated + r * stride, op.out.from((rows[r] - op.first_row) * op.out_stride + column),
                 count * blocks.b);
      });
}

void dequantize(const Dequantize& op, int64_t begin, int64_t end, float* scratch) {
  op.rotated ? dequantize_rotated(op, begin, end, scratch) : dequantize_plain(op, begin, end, scratch);
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
