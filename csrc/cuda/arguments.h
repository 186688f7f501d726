// Kernel arguments: tensors as device pointers, sizes, and the plan. 16-bit values are raw bits.
#pragma once

#include <cstdint>

namespace hqq_oft::cuda {

struct RotationArguments {
  const uint16_t* x;             // [tokens, in_features]
  int64_t x_stride;              // elements between rows
  const uint16_t* d;             // [adapters, stored blocks, b, b]; null for no rotation
  const int64_t* adapter_index;  // [tokens], -1 for none; null if all rows use the same adapter
  int tokens;
  int in_features;
  int block_size;
  int stored_blocks;  // in_features / block_size, or 1 if all blocks share it
  int64_t adapters;   // that d has; any other index is one for none
};

struct DecodeArguments {
  RotationArguments rotation;
  const uint8_t* packed;  // [out_features / fields, in_features] bytes, or 32-bit words for 3 bits
  const uint16_t* scale;  // [out_features, in_features / group_size]
  const uint16_t* zero;
  const uint16_t* bias;  // [out_features] or null
  uint16_t* y;           // [tokens, out_features]
  float* partial;        // workspace of `partial_elements` floats
  uint64_t* tickets;     // `ticket_count` of them; may be uninitialized
  uint64_t stamp;        // see decode.cuh; its low 16 bits are 0
  int out_features, band_rows;  // band_rows: out_features / fields
  int group_size, groups_per_row;
  int tiles, band_tiles, slice, splits, scale_words, scale_buffers;  // of the plan
  bool chained;
};

}  // namespace hqq_oft::cuda
