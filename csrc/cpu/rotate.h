// Block rotations of rows, y = x + x * blockdiag(D), and the gradient of D.
#pragma once

#include "types.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

// Blocks of one slice as float32 rows of padded(b), transposed if `blocks.transpose`; `row` is scratch for one row.
inline void pack_slice(const Blocks& blocks, int64_t adapter, int64_t first, int64_t count, float* row, float* out) {
  int64_t b = blocks.b, stride = padded(b);
  for (int64_t block = 0; block < count; ++block) {
    if (blocks.stored == 1 && block > 0) {
      for (int64_t i = 0; i < b * stride; ++i) out[block * b * stride + i] = out[i];
      continue;
    }
    Source d = blocks.d.from(adapter * blocks.elements() + blocks.offset(first + block));
    float* to = out + block * b * stride;
    for (int64_t i = 0; i < b; ++i) {
      if (blocks.transpose) {
        widen(d.from(i * b), row, b);
        for (int64_t j = 0; j < b; ++j) to[j * stride + i] = row[j];
      } else {
        widen(d.from(i * b), to + i * stride, b);
      }
      for (int64_t j = b; j < stride; ++j) to[i * stride + j] = 0;
    }
  }
}

// y = x + x * D on a tile of rows of one slice. Vectors may extend into the next block, which is computed later.
inline void rotate_tile(const float* x, int64_t rows, const Blocks& blocks, int64_t count, const float* packed,
                        float* y) {
  int64_t b = blocks.b, stride = blocks.tile_stride();
  for (int64_t block = 0; block < count; ++block) {
    const float* from = x + block * b;
    multiply(from, stride, 1, packed + block * b * padded(b), padded(b), rows, b, b, from, stride, y + block * b,
             stride);
  }
}

// Positions of adapter a within begin ... end of the rows grouped by adapter.
struct Range {
  int64_t begin, end;
};
inline Range rows_of(const RowsByAdapter& rows, int64_t adapter, int64_t begin, int64_t end) {
  if (!rows.order) return {begin, end};
  return {larger(begin, rows.first[adapter]), smaller(end, rows.first[adapter + 1])};
}

// f(adapter, first block, blocks, range of its rows) for each slice of tasks begin ... end. Rows without an adapter are
// copied through `room`, scratch for one row.
template <class F>
inline void for_slices(const Rotate& op, int64_t begin, int64_t end, float* room, F&& f) {
  const Blocks& blocks = op.blocks;
  for (int64_t task = begin; task < end; ++task) {
    auto [first, count, column, columns] = blocks.slice(task % blocks.slices());
    int64_t chunk = task / blocks.slices(), from = chunk * kChunkRows, to = smaller(op.M, from + kChunkRows);
    for (int64_t adapter = 0; adapter < op.rows.adapters; ++adapter) {
      Range range = rows_of(op.rows, adapter, from, to);
      if (range.begin < range.end) f(adapter, first, count, range);
    }
    if (!op.rows.order) continue;
    for (int64_t position = larger(from, op.rows.first[op.rows.adapters]); position < to; ++position) {
      int64_t r = op.rows.row(position);
      widen(op.x.from(r * op.x_stride + column), room, columns);
      narrow(room, op.y.from(r * op.y_stride + column), columns);
    }
  }
}

void rotate(const Rotate& op, int64_t begin, int64_t end, float* scratch) {
  const Blocks& blocks = op.blocks;
  int64_t stride = blocks.tile_stride();
  float* packed = scratch;
  float* row = packed + blocks.packed_floats();
  float* x = row + padded(blocks.b);
  float* y = x + kTileRows * stride;
  for_slices(op, begin, end, x, [&](int64_t adapter, int64_t first, int64_t count, Range range) {
    int64_t column = first * blocks.b, columns = count * blocks.b;
    pack_slice(blocks, adapter, first, count, row, packed);
    for (int64_t position = range.begin; position < range.end; position += kTileRows) {
      int64_t n = smaller(kTileRows, range.end - position);
      for (int64_t r = 0; r < n; ++r)
        widen(op.x.from(op.rows.row(position + r) * op.x_stride + column), x + r * stride, columns);
      rotate_tile(x, n, blocks, count, packed, y);
      for (int64_t r = 0; r < n; ++r)
        narrow(y + r * stride, op.y.from(op.rows.row(position + r) * op.y_stride + column), columns);
    }
  });
}

// For each part of tasks begin ... end: clears `acc`, calls start(adapter, first block, blocks), then
// f(position, rows, column, blocks) for `rows` rows at a time to accumulate into it, and stores the sums into the part.
template <class Start, class F>
inline void for_parts(const RotateGradient& op, int64_t begin, int64_t end, int64_t rows, float* acc, Start&& start,
                      F&& f) {
  const Blocks& blocks = op.blocks;
  int64_t b = blocks.b, slices = blocks.slices();
  bool shared = blocks.stored == 1;
  for (int64_t task = begin; task < end; ++task) {
    int64_t slice = task % slices, chunk = task / slices % op.chunks(), adapter = task / slices / op.chunks();
    auto [first, count, column, columns] = blocks.slice(slice);
    int64_t sums = shared ? 1 : count;
    for (int64_t i = 0; i < sums * b * padded(b); ++i) acc[i] = 0;
    start(adapter, first, count);
    Range all = rows_of(op.rows, adapter, 0, op.M);
    int64_t each = ceil_div(all.end - all.begin, op.chunks());
    int64_t last = smaller(all.end, all.begin + (chunk + 1) * each);
    for (int64_t position = all.begin + chunk * each; position < last; position += rows)
      f(position, smaller(rows, last - position), column, count);
    int64_t part = shared ? chunk * slices + slice : chunk;
    float* out = op.part + part * op.elements() + adapter * blocks.elements() + blocks.offset(first);
    for (int64_t i = 0; i < sums * b; ++i)
      for (int64_t j = 0; j < b; ++j) out[i * b + j] = acc[i * padded(b) + j];
  }
}

void rotate_gradient(const RotateGradient& op, int64_t begin, int64_t end, float* scratch) {
  const Blocks& blocks = op.blocks;
  int64_t b = blocks.b, stride = blocks.tile_stride();
  float* acc = scratch;
  float* packed = acc + blocks.packed_floats();
  float* row = packed + blocks.packed_floats();
  float* left = row + padded(b);
  float* right = left + kTileRows * stride;
  float* dx = right + kTileRows * stride;
  auto pack = [&](int64_t adapter, int64_t first, int64_t count) {
    if (op.dx) pack_slice(blocks, adapter, first, count, row, packed);
  };
  for_parts(op, begin, end, kTileRows, acc, pack, [&](int64_t position, int64_t n, int64_t column, int64_t count) {
    for (int64_t r = 0; r < n; ++r) {
      int64_t number = op.rows.row(position + r);
      widen(op.left.from(number * op.left_stride + column), left + r * stride, count * b);
      widen(op.right.from(number * op.right_stride + column), right + r * stride, count * b);
    }
    for (int64_t block = 0; block < count; ++block) {
      float* sum = acc + (blocks.stored == 1 ? 0 : block) * b * padded(b);
      multiply(left + block * b, 1, stride, right + block * b, stride, b, n, b, sum, padded(b), sum, padded(b));
    }
    if (!op.dx) return;
    rotate_tile(right, n, blocks, count, packed, dx);
    Sink out{op.dx, op.right.type};
    for (int64_t r = 0; r < n; ++r)
      narrow(dx + r * stride, out.from(op.rows.row(position + r) * op.right_stride + column), count * b);
  });
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
