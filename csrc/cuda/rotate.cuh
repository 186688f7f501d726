// x + x blockdiag(D), sixteen columns per warp. Include ptx.cuh first.
//
// x is A (16 tokens x 16 columns of one block) and D is B. D is stored [row k, column n], and B wants pairs along k, so
// a lane reads two adjacent columns of four rows and regroups them: two tiles of eight columns, the even and the
// odd ones. D is loaded from global memory directly into registers, each element once.
#pragma once

#include "arguments.h"
#include "layout.h"

namespace hqq_oft::cuda {

// A lane's share of 16 rotated columns: four adjacent ones, for tokens `group` and `group + 8`.
struct RotatedColumns {
  float value[2][4];  // [token < 8 or not][column]
};

template <class Format>
__device__ __forceinline__ RotatedColumns widen_columns(const Four (&x)[2]) {
  RotatedColumns columns;
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      columns.value[half][i] = widen<Format>(static_cast<uint16_t>(x[half].pair[i / 2] >> (16 * (i % 2))));
    }
  }
  return columns;
}

__device__ __forceinline__ Four load_four(const RotationArguments& a, int token, int column) {
  if (token >= a.tokens || column >= a.in_features) return Four{};
  return *reinterpret_cast<const Four*>(a.x + token * a.x_stride + column);
}

// Adds x D for the rows of x that use this adapter, according to `mine`.
template <class Format>
__device__ __forceinline__ void add_rotation(RotatedColumns& columns, const RotationArguments& a, const uint16_t* d,
                                             int first_column, const bool (&mine)[2], int lane) {
  const int group = lane / 4, quad = lane % 4;
  const int b = a.block_size, block = first_column / b, first_row = block * b;
  const uint16_t* block_d = d + static_cast<int64_t>(a.stored_blocks == 1 ? 0 : block) * b * b;
  float even[4], odd[4];  // columns 2c and 2c + 1 of the sixteen
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 2; ++i) {
      even[2 * half + i] = columns.value[half][2 * i];
      odd[2 * half + i] = columns.value[half][2 * i + 1];
    }
  }
  for (int k = 0; k < b; k += STEP) {
    const int row = k + 4 * quad;  // a lane's four rows of D, and columns of x
    uint32_t d_pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint16_t* at = block_d + static_cast<int64_t>(row + i) * b + (first_column - first_row) + 2 * group;
      d_pairs[i] = *reinterpret_cast<const uint32_t*>(at);
    }
    const Four low = mine[0] ? load_four(a, group, first_row + row) : Four{};
    const Four high = mine[1] ? load_four(a, group + 8, first_row + row) : Four{};
    const uint32_t x_fragment[4] = {low.pair[0], high.pair[0], low.pair[1], high.pair[1]};
    const uint32_t d_even[2] = {pack(d_pairs[0], d_pairs[1]), pack(d_pairs[2], d_pairs[3])};
    const uint32_t d_odd[2] = {pack(d_pairs[0] >> 16, d_pairs[1] >> 16), pack(d_pairs[2] >> 16, d_pairs[3] >> 16)};
    mma<Format>(even, x_fragment, d_even);
    mma<Format>(odd, x_fragment, d_odd);
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 2; ++i) {
      columns.value[half][2 * i] = even[2 * half + i];
      columns.value[half][2 * i + 1] = odd[2 * half + i];
    }
  }
}

// Columns first_column ... + 15 of the rotated x, rounded once: each lane has the four at 4 quad, as two pairs
// per token. Out-of-range tokens and columns are zero.
template <class Format>
__device__ __forceinline__ void rotated_columns(const RotationArguments& a, int first_column, int lane,
                                                Four (&out)[2]) {
  const int group = lane / 4, quad = lane % 4;
  const Four x[2] = {load_four(a, group, first_column + 4 * quad), load_four(a, group + 8, first_column + 4 * quad)};
  RotatedColumns columns = widen_columns<Format>(x);
  if (a.d != nullptr && first_column < a.in_features) {
    if (a.adapter_index == nullptr) {
      add_rotation<Format>(columns, a, a.d, first_column, {true, true}, lane);
    } else {
      const int64_t own[2] = {group < a.tokens ? a.adapter_index[group] : -1,
                              group + 8 < a.tokens ? a.adapter_index[group + 8] : -1};
      for (int token = 0; token < a.tokens; ++token) {
        const int64_t adapter = a.adapter_index[token];
        bool seen = adapter < 0 || adapter >= a.adapters;
        for (int before = 0; before < token; ++before) seen |= a.adapter_index[before] == adapter;
        if (seen) continue;
        const int64_t size = static_cast<int64_t>(a.stored_blocks) * a.block_size * a.block_size;
        add_rotation<Format>(columns, a, a.d + adapter * size, first_column, {own[0] == adapter, own[1] == adapter},
                             lane);
      }
    }
  }
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 2; ++i) {
      out[half].pair[i] = narrow<Format>(columns.value[half][2 * i], columns.value[half][2 * i + 1]);
    }
  }
}

// Writes rotated x to memory, for a D too large for every band to read again. Grid: 16 WARPS columns per block.
template <class Format>
__global__ void __launch_bounds__(WARPS * WARP) rotate_kernel(const RotationArguments a, uint16_t* out) {
  release_next_launch();
  const int lane = lane_index();
  const int group = lane / 4, quad = lane % 4;
  const int first_column = (block_x() * WARPS + warp_index()) * STEP;
  if (first_column >= a.in_features) return;
  Four columns[2];
  rotated_columns<Format>(a, first_column, lane, columns);
  for (int half = 0; half < 2; ++half) {
    const int token = group + 8 * half;
    if (token < a.tokens) {
      uint16_t* at = out + static_cast<int64_t>(token) * a.in_features + first_column + 4 * quad;
      *reinterpret_cast<Four*>(at) = columns[half];
    }
  }
}

}  // namespace hqq_oft::cuda
