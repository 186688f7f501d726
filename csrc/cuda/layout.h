// Index arithmetic of the decode kernel, independent of CUDA so that it can be tested on the host.
//
// HQQ's packed matrix, for axis 1 and if the number of fields of an element divides the out-features N, is [N / FIELDS,
// K]: field i of element [r, k] is the level of weight [r + i * N / FIELDS, k]. A warp takes TILE_ROWS packed rows, so
// one packed tile yields FIELDS tiles of outputs that share their inputs.
//
// Tensor cores: mma.m16n8k16 with the weight as A (16 outputs x 16 columns) and x as B (16 columns x 8 tokens). A lane
// is `group = lane / 4`, `quad = lane % 4` (PTX ISA, "Matrix fragments for mma.m16n8k16"): it holds columns {2 quad, 2
// quad + 1, 2 quad + 8, 2 quad + 9} of rows group and group + 8. Columns may be summed in any order, so each lane
// instead takes four adjacent ones, whose packed bytes form one 32-bit word, and x has a matching layout.
#pragma once

#include "format.h"

namespace hqq_oft::cuda {

constexpr int WARP = 32;          // lanes
constexpr int WARPS = 8;          // of a block, at most
constexpr int TILE_ROWS = 16;     // packed rows of a warp's tile: the height of A
constexpr int CHUNK = 64;         // columns between two loads of x from shared memory
constexpr int STEP = 16;          // columns of one mma
constexpr int STEPS = CHUNK / STEP;
constexpr int TOKENS = 8;         // the width of B
constexpr int GROUP_UNIT = 32;    // columns that divide every group served: two steps
constexpr int UNIT = 16;          // bytes of one asynchronous copy
constexpr int X_PADDING = 8;      // padding elements after a row of x in shared memory: rows 16 bytes apart modulo 128

template <int BITS>
struct Packing {
  static constexpr int FIELDS = BITS == 3 ? 10 : 8 / BITS;
  static constexpr int ELEMENT_BYTES = BITS == 3 ? 4 : 1;
  static constexpr int STAGE_COLUMNS = BITS == 3 ? CHUNK : 2 * CHUNK;
  static constexpr int ROW_BYTES = STAGE_COLUMNS * ELEMENT_BYTES;  // of one row in one stage of the pipeline
  static constexpr int STAGE_BYTES = TILE_ROWS * ROW_BYTES;
  static constexpr int STAGES = BITS == 3 ? 2 : 3;  // of each warp's pipeline: 4 KiB in flight
  static constexpr int WORDS = ELEMENT_BYTES;  // 32-bit words that hold a lane's four columns
};

// Steps whose words a lane reads in one load of at most 16 bytes. Columns that share a scale (a span) stay together.
template <int BITS, int SPAN>
constexpr int RUN = BITS == 3 ? 1 : SPAN / STEP;

// Tokens per launch, at most. Sums of ten fields for two tiles of tokens would not fit a thread's registers.
constexpr int max_tokens(int bits) { return bits == 3 ? TOKENS : 2 * TOKENS; }

// Blocks of the decode kernel whose registers fit one multiprocessor: with many fields' sums only one fits.
constexpr int max_resident(int bits, int token_tiles) {
  return bits == 1 || bits == 3 || (bits == 2 && token_tiles == 2) ? 1 : 2;
}

// Units of a single load or store: four 16-bit values in order, two to a register; N registers.
struct alignas(8) Four {
  uint32_t pair[2];
};
template <int N>
struct alignas(4 * N) Words {
  uint32_t word[N];
};

// --- Fragments -------------------------------------------------------------------------------------------------------

// First of the four adjacent columns, within a chunk, that a lane holds in one step.
HQQ_OFT_HOST_DEVICE int fragment_column(int quad, int step, int run) {
  return (step / run) * (run * STEP) + quad * (run * 4) + (step % run) * 4;
}

// Pairs of four adjacent columns: 0 and 2, then 1 and 3, the bytes that one mask extracts from a word.
HQQ_OFT_HOST_DEVICE Four pair_columns(const Four& columns) {
  const uint32_t first = columns.pair[0], second = columns.pair[1];
  return Four{{pack(first, second), pack(first >> 16, second >> 16)}};
}

// Position of the pairs of four columns from `column` on, in a chunk, in a token's row in shared memory: by quad, then
// by step, so that a lane reads its columns of all steps as two 16-byte loads.
HQQ_OFT_HOST_DEVICE int x_position(int column, int run) {
  const int in_run = column % (run * STEP);
  const int quad = in_run / (run * 4);
  const int step = (column / (run * STEP)) * run + (in_run % (run * 4)) / 4;
  return quad * (STEPS * 4) + step * 4;
}

// Row and token of accumulator `i` (0 ... 3) in a 16 x 8 tile.
HQQ_OFT_HOST_DEVICE int accumulator_row(int group, int i) { return group + 8 * (i / 2); }
HQQ_OFT_HOST_DEVICE int accumulator_token(int quad, int i) { return 2 * quad + i % 2; }

// --- Shared memory ---------------------------------------------------------------------------------------------------

// Byte offset of 16-byte unit `unit` of row `row` in a stage. The row stride is a multiple of 128 bytes; the XOR avoids
// bank conflicts between lanes that read the same column of several rows. The row's bits are reversed: two rows differ
// by 64 bytes, four by 32, which suits 16- and 8-byte reads. Row + 8 is 8 row_bytes further.
HQQ_OFT_HOST_DEVICE int stage_byte(int row, int unit, int row_bytes) {
  const int reversed = (row & 1) << 2 | (row & 2) | (row & 4) >> 2;
  return row * row_bytes + (unit ^ reversed) * UNIT;
}

// A tile's scales and zeros: for each 32-bit word of a row of groups the scales of all fields and rows, then the zeros.
// The padding avoids bank conflicts between the words that eight rows of four lanes copy.
template <int BITS>
struct ScaleLayout {
  static constexpr int ZEROS = Packing<BITS>::FIELDS * TILE_ROWS;  // words before the zeros
  static constexpr int WORD_STRIDE = 2 * ZEROS + 8;
  static HQQ_OFT_HOST_DEVICE int word(int word, int field, int row) {
    return word * WORD_STRIDE + field * TILE_ROWS + row;
  }
};

// --- Global memory ---------------------------------------------------------------------------------------------------

// Row of the weight (output) of a field of a packed row; `band_rows` is N / FIELDS.
HQQ_OFT_HOST_DEVICE int weight_row(int packed_row, int field, int band_rows) { return packed_row + field * band_rows; }

// Scales are copied as 32-bit words, two at a time, so a row's first scale is in a word's high half if its index is
// odd.
HQQ_OFT_HOST_DEVICE int64_t scale_element(int row, int groups_per_row, int first_group) {
  return static_cast<int64_t>(row) * groups_per_row + first_group;
}

// Whether that index is odd for row `row` of any tile: tiles start at multiples of 16 rows, so it does not depend on
// the tile, and row + 8 gives the same answer as row.
HQQ_OFT_HOST_DEVICE int scale_is_odd(int row, int field, int band_rows, int groups_per_row, int first_group) {
  return ((row + field * band_rows) * groups_per_row + first_group) & 1;
}

}  // namespace hqq_oft::cuda
