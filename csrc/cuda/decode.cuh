// y = x blockdiag(I + D) W^T + bias for 1 to 16 tokens, from HQQ's own bytes. Include the instructions (ptx.cuh) first.
//
// Bytes: the packed levels once, and their scales and zeros once: bits / 8 + 4 / group_size per weight, 0.5625 at 4 bits
// and groups of 64. Operations: 2 N K tokens, on matrix units that pad the tokens to 8 or 16; per packed word of four
// columns about 7 instructions to make its levels into pairs, 1 or 2 mma, and 5 to fold in scale and zero, where memory
// allows about 31 (H200: 4.3 TB/s copied, 132 multiprocessors at 1.75 GHz). So memory bounds it: no less than 2.2 us at
// N x K = 4096 x 4096, 7.7 us at 14336 x 4096, 31 us at 28672 x 8192; of D, x and y little is added (plan.h).
//
// Every warp streams packed rows of its own through its own pipeline of asynchronous copies and meets the others only
// while x is put into shared memory, for which the copies do not wait. Scale and zero are applied to a span's sum, in
// float32: y += s (sum x q - z sum x), where sum x q is of exact products. Partial sums of a split K are added in the
// order of the splits by the warp that arrives last, so runs repeat bit for bit.
#pragma once

#include "arguments.h"
#include "levels.h"
#include "plan.h"
#include "rotate.cuh"

namespace hqq_oft::cuda {

// One warp's stream of stages: TILE_ROWS rows of a tile by STAGE_COLUMNS columns; tile by tile, and each from the slice's
// first column to its last. A tile's scales travel with its first stage.
template <int BITS>
struct Stream {
  using P = Packing<BITS>;

  const DecodeArguments& a;
  const SharedLayout& layout;
  unsigned char* stages;  // this warp's, in shared memory
  unsigned char* scales;
  uint64_t policy;
  int band_rows, groups_per_row, first_group;
  int slice_begin, slice_stages;
  int tile_end;
  // Of the next copy:
  int tile, stage = 0, slot = 0, buffer = 0;

  __device__ __forceinline__ Stream(const DecodeArguments& arguments, const SharedLayout& shared, int first_tile)
      : a(arguments), layout(shared), policy(evict_first_policy()), tile(first_tile) {
    const int warp = warp_index();
    stages = shared_memory() + layout.stages + warp * P::STAGES * P::STAGE_BYTES;
    scales = shared_memory() + layout.scales + warp * a.scale_buffers * 2 * layout.scale_buffer;
    band_rows = a.out_features / P::FIELDS;
    groups_per_row = a.rotation.in_features / a.group_size;
    slice_begin = block_y() * a.slice;
    first_group = slice_begin / a.group_size;
    const int columns = a.rotation.in_features - slice_begin;
    slice_stages = ((columns < a.slice ? columns : a.slice) + P::STAGE_COLUMNS - 1) / P::STAGE_COLUMNS;
    const int band_end = (block_x() + 1) * a.band_tiles;
    tile_end = band_end < a.tiles ? band_end : a.tiles;
  }

  // Copies the next stage, if there is one; always a group, so that groups can be counted.
  __device__ __forceinline__ void copy_next() {
    if (tile < tile_end) {
      if (stage == 0) copy_scales();
      copy_levels();
      slot = slot + 1 == P::STAGES ? 0 : slot + 1;
      if (++stage == slice_stages) {
        stage = 0;
        tile += WARPS;
        buffer = buffer + 1 == a.scale_buffers ? 0 : buffer + 1;
      }
    }
    commit_copies();
  }

  __device__ __forceinline__ void copy_levels() {
    constexpr int UNITS = P::ROW_BYTES / UNIT;
    constexpr int ROWS = WARP / UNITS;  // that the lanes copy at a time
    const int lane = lane_index(), unit = lane % UNITS;
    const int column = slice_begin + stage * P::STAGE_COLUMNS + unit * UNIT / P::ELEMENT_BYTES;
    unsigned char* to = stages + slot * P::STAGE_BYTES;
#pragma unroll
    for (int first = 0; first < TILE_ROWS; first += ROWS) {
      const int row = first + lane / UNITS, packed_row = tile * TILE_ROWS + row;
      const bool exists = packed_row < band_rows && column < a.rotation.in_features;
      const int64_t element = exists ? static_cast<int64_t>(packed_row) * a.rotation.in_features + column : 0;
      copy_unit_async(to + stage_byte(row, unit, P::ROW_BYTES), a.packed + element * P::ELEMENT_BYTES,
                      exists ? UNIT : 0, policy);
    }
  }

  __device__ __forceinline__ void copy_scales() {
    constexpr int LANES = 8;  // that share a row
    const int64_t elements = static_cast<int64_t>(a.out_features) * groups_per_row;
    unsigned char* to = scales + buffer * 2 * layout.scale_buffer;
    for (int row = lane_index() / LANES; row < P::FIELDS * TILE_ROWS; row += WARP / LANES) {
      const int packed_row = tile * TILE_ROWS + row % TILE_ROWS;
      const int64_t first = scale_element(weight_row(packed_row, row / TILE_ROWS, band_rows), groups_per_row,
                                          first_group) & ~int64_t{1};
      for (int word = lane_index() % LANES; word < a.scale_words; word += LANES) {
        const int64_t element = first + 2 * word;
        const int64_t left = packed_row < band_rows ? elements - element : 0;
        const int bytes = left >= 2 ? 4 : left == 1 ? 2 : 0;
        unsigned char* word_to = to + (row * layout.scale_stride + word) * 4;
        copy_word_async(word_to, a.scale + (bytes > 0 ? element : 0), bytes);
        copy_word_async(word_to + layout.scale_buffer, a.zero + (bytes > 0 ? element : 0), bytes);
      }
    }
  }
};

// The block's slice of x, rotated, in the order of `x_position`, and for each span and token its sum.
template <class Format, int BITS, int SPAN, int TOKEN_TILES>
__device__ __forceinline__ void fill_x(const RotationArguments& a, const SharedLayout& layout, int slice) {
  constexpr int RUN_STEPS = RUN<BITS, SPAN>;
  const int lane = lane_index(), warp = warp_index(), group = lane / 4, quad = lane % 4;
  uint16_t* x = reinterpret_cast<uint16_t*>(shared_memory() + layout.x);
  for (int column = warp * STEP; column < slice; column += WARPS * STEP) {
    Four columns[2];
    rotated_columns<Format>(a, block_y() * slice + column, lane, columns);
    const int mine = column + 4 * quad;
    uint16_t* at = x + mine / CHUNK * CHUNK + x_position(mine % CHUNK, RUN_STEPS);
#pragma unroll
    for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
      const uint32_t low = columns[tokens].pair[0], high = columns[tokens].pair[1];
      *reinterpret_cast<Four*>(at + (tokens * TOKENS + group) * layout.x_stride) =
          Four{{pack(low, high), pack(low >> 16, high >> 16)}};
    }
  }
  sync_block();
  float* sums = reinterpret_cast<float*>(shared_memory() + layout.sums);
  for (int i = warp * WARP + lane; i < slice / SPAN * TOKEN_TILES * TOKENS; i += THREADS) {
    const int token = i % (TOKEN_TILES * TOKENS), first = i / (TOKEN_TILES * TOKENS) * SPAN;
    float sum = 0.0f;
    for (int column = first; column < first + SPAN; column += 4) {
      const int at = column / CHUNK * CHUNK + x_position(column % CHUNK, RUN_STEPS);
      const Four four = *reinterpret_cast<const Four*>(x + token * layout.x_stride + at);
      for (int pair = 0; pair < 2; ++pair) {
        sum += widen<Format>(static_cast<uint16_t>(four.pair[pair]));
        sum += widen<Format>(static_cast<uint16_t>(four.pair[pair] >> 16));
      }
    }
    sums[i] = sum;
  }
  sync_block();
}

// A lane's share of a tile's sums: of each field and tile of tokens four, placed as `accumulator_row` and `_token` say.
template <int BITS, int TOKEN_TILES>
struct Accumulators {
  float value[Packing<BITS>::FIELDS][TOKEN_TILES][4] = {};
};

// A tile's scales and zeros in shared memory, and how far in its row of groups a slice has come.
struct Groups {
  const unsigned char* scales;
  int scale_stride, scale_buffer;
  int group;         // counted from the slice's first
  int columns_left;  // of the group

  __device__ __forceinline__ void advance(int columns, int group_size) {
    columns_left -= columns;
    if (columns_left == 0) {
      ++group;
      columns_left = group_size;
    }
  }

  // Scale and zero in row `row` of the tile's scales, of which element 0 is `odd` ? the second : the first half of a word.
  template <class Format>
  __device__ __forceinline__ void load(int row, int odd, float& scale, float& zero) const {
    const unsigned char* at = scales + row * scale_stride * 4 + (odd + group) * 2;
    scale = widen<Format>(*reinterpret_cast<const uint16_t*>(at));
    zero = widen<Format>(*reinterpret_cast<const uint16_t*>(at + scale_buffer));
  }
};

// Adds the products of the chunk at `chunk` columns into the stage: `x` and `sums` are at its first column.
template <class Format, int BITS, int SPAN, int TOKEN_TILES>
__device__ __forceinline__ void multiply_chunk(Accumulators<BITS, TOKEN_TILES>& sum, const Stream<BITS>& stream,
                                               const unsigned char* stage, int chunk, const uint16_t* x,
                                               const float* sums, Groups& groups, int columns) {
  using P = Packing<BITS>;
  constexpr int RUN_STEPS = RUN<BITS, SPAN>, SPAN_STEPS = SPAN / STEP;
  const int lane = lane_index(), group = lane / 4, quad = lane % 4;

  Words<4> x_words[TOKEN_TILES][2];  // of all steps: pairs (step 0, 1), (2, 3)
#pragma unroll
  for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
    const uint16_t* at = x + (tokens * TOKENS + group) * stream.layout.x_stride + quad * (STEPS * 4);
    x_words[tokens][0] = *reinterpret_cast<const Words<4>*>(at);
    x_words[tokens][1] = *reinterpret_cast<const Words<4>*>(at + 8);
  }
#pragma unroll
  for (int span = 0; span < CHUNK / SPAN; ++span) {
    if (span * SPAN >= columns) break;  // behind the last column of W there are no scales
    uint32_t levels[2][SPAN_STEPS * P::WORDS];  // of rows group and group + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 0; step < SPAN_STEPS; step += RUN_STEPS) {
        const int column = chunk + fragment_column(quad, span * SPAN_STEPS + step, RUN_STEPS);
        const int byte = column * P::ELEMENT_BYTES;
        const auto words = *reinterpret_cast<const Words<RUN_STEPS * P::WORDS>*>(
            stage + stage_byte(group + 8 * half, byte / UNIT, P::ROW_BYTES) + byte % UNIT);
#pragma unroll
        for (int i = 0; i < RUN_STEPS * P::WORDS; ++i) levels[half][step * P::WORDS + i] = words.word[i];
      }
    }
    float x_sum[TOKEN_TILES][2];  // of tokens 2 quad and 2 quad + 1
#pragma unroll
    for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
      const float* at = sums + (span * TOKEN_TILES + tokens) * TOKENS + accumulator_token(quad, 0);
      x_sum[tokens][0] = at[0];
      x_sum[tokens][1] = at[1];
    }
#pragma unroll
    for (int field = 0; field < P::FIELDS; ++field) {
      const int odd = scale_is_odd(group, field, stream.band_rows, stream.groups_per_row, stream.first_group);
      float scale[2], zero[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = group + 8 * half;
        groups.load<Format>(field * TILE_ROWS + row, odd, scale[half], zero[half]);
      }
      float product[TOKEN_TILES][4];
#pragma unroll
      for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          product[tokens][i] = -(zero[i / 2] + Levels<Format, BITS>::BIAS) * x_sum[tokens][i % 2];
        }
      }
#pragma unroll
      for (int step = 0; step < SPAN_STEPS; ++step) {
        const uint32_t *upper = &levels[0][step * P::WORDS], *lower = &levels[1][step * P::WORDS];
        const uint32_t a[4] = {Levels<Format, BITS>::pair(upper, field, 0), Levels<Format, BITS>::pair(lower, field, 0),
                               Levels<Format, BITS>::pair(upper, field, 1), Levels<Format, BITS>::pair(lower, field, 1)};
        const int of_chunk = span * SPAN_STEPS + step;
#pragma unroll
        for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
          const uint32_t* words = &x_words[tokens][of_chunk / 2].word[of_chunk % 2 * 2];
          const uint32_t b[2] = {words[0], words[1]};
          mma<Format>(product[tokens], a, b);
        }
      }
#pragma unroll
      for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum.value[field][tokens][i] += scale[i / 2] * product[tokens][i];
      }
    }
    groups.advance(SPAN, stream.a.group_size);
  }
}

// Whether this warp is the last of `splits` to arrive at a ticket. A ticket holds a launch's stamp and, in its low 16
// bits, how many have arrived. Whatever else it holds is of no launch: it need not be cleared before, and is after.
__device__ __forceinline__ bool arrive_last(uint64_t* ticket, uint64_t stamp, int splits) {
  uint64_t seen = stamp, next = stamp + 1;
  for (;;) {
    const uint64_t found = compare_and_swap(ticket, seen, next);
    if (found == seen) break;
    seen = found;
    next = (seen >> 16 == stamp >> 16 ? seen : stamp) + 1;
  }
  const bool last = static_cast<int>(next & 0xFFFF) == splits;
  if (last) *ticket = 0;
  return last;
}

// Leaves this split's part of the tile in the workspace; in the warp that arrives last, the sum of all, in their order.
template <int BITS, int TOKEN_TILES>
__device__ __forceinline__ bool sum_splits(Accumulators<BITS, TOKEN_TILES>& sum, const DecodeArguments& a, int tile) {
  constexpr int FIELDS = Packing<BITS>::FIELDS;
  const int lane = lane_index();
  Float4* parts = reinterpret_cast<Float4*>(a.partial) +
                  static_cast<int64_t>(tile) * a.splits * FIELDS * TOKEN_TILES * WARP + lane;
  Float4* own = parts + block_y() * FIELDS * TOKEN_TILES * WARP;
#pragma unroll
  for (int i = 0; i < FIELDS * TOKEN_TILES; ++i) {
    const float* value = sum.value[i / TOKEN_TILES][i % TOKEN_TILES];
    own[i * WARP] = Float4{{value[0], value[1], value[2], value[3]}};
  }
  fence();
  sync_warp();
  int last = 0;
  if (lane == 0) last = arrive_last(a.tickets + tile, a.stamp, a.splits);
  last = broadcast(last);
  if (last == 0) return false;
  fence();
  sum = {};
  for (int split = 0; split < a.splits; ++split, parts += FIELDS * TOKEN_TILES * WARP) {
#pragma unroll
    for (int i = 0; i < FIELDS * TOKEN_TILES; ++i) {
      const Float4 part = load_past_l1(parts + i * WARP);
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.value[i / TOKEN_TILES][i % TOKEN_TILES][j] += part.value[j];
    }
  }
  return true;
}

template <class Format, int BITS, int TOKEN_TILES>
__device__ __forceinline__ void store_tile(const Accumulators<BITS, TOKEN_TILES>& sum, const DecodeArguments& a,
                                           int tile, int band_rows) {
  const int lane = lane_index(), group = lane / 4, quad = lane % 4;
#pragma unroll
  for (int field = 0; field < Packing<BITS>::FIELDS; ++field) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int packed_row = tile * TILE_ROWS + accumulator_row(group, 2 * half);
      if (packed_row >= band_rows) continue;
      const int output = weight_row(packed_row, field, band_rows);
      const float bias = a.bias == nullptr ? 0.0f : widen<Format>(a.bias[output]);
#pragma unroll
      for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
        const float* value = &sum.value[field][tokens][2 * half];
        const uint32_t pair = narrow<Format>(value[0] + bias, value[1] + bias);
        const int token = tokens * TOKENS + accumulator_token(quad, 0);
        uint16_t* y = a.y + static_cast<int64_t>(token) * a.out_features + output;
        if (token < a.rotation.tokens) y[0] = static_cast<uint16_t>(pair);
        if (token + 1 < a.rotation.tokens) y[a.out_features] = static_cast<uint16_t>(pair >> 16);
      }
    }
  }
}

// Grid: (bands, splits). See `Plan` for what a block does, `shared_layout` for its shared memory.
template <class Format, int BITS, int SPAN, int TOKEN_TILES>
__global__ void __launch_bounds__(THREADS, max_resident(BITS, TOKEN_TILES)) decode_kernel(const DecodeArguments a) {
  using P = Packing<BITS>;
  const SharedLayout layout = shared_layout(P::FIELDS, P::STAGE_BYTES, P::STAGES, TOKEN_TILES, SPAN, a.slice,
                                            a.scale_words, a.scale_buffers);
  int tile = block_x() * a.band_tiles + warp_index();
  Stream<BITS> stream(a, layout, tile);
  for (int stage = 0; stage < P::STAGES - 1; ++stage) stream.copy_next();

  if (a.chained) wait_for_previous_launch();
  fill_x<Format, BITS, SPAN, TOKEN_TILES>(a.rotation, layout, a.slice);

  const uint16_t* x = reinterpret_cast<const uint16_t*>(shared_memory() + layout.x);
  const float* sums = reinterpret_cast<const float*>(shared_memory() + layout.sums);
  const int first_columns_left = a.group_size - stream.slice_begin % a.group_size;
  int slot = 0, buffer = 0;
  for (; tile < stream.tile_end; tile += WARPS) {
    Accumulators<BITS, TOKEN_TILES> sum;
    Groups groups{stream.scales + buffer * 2 * layout.scale_buffer, layout.scale_stride, layout.scale_buffer, 0,
                  first_columns_left};
    for (int stage = 0; stage < stream.slice_stages; ++stage) {
      wait_copies<P::STAGES - 2>();
      sync_warp();  // every lane's copies have come, and every lane has read what the next copy overwrites
      stream.copy_next();
#pragma unroll
      for (int chunk = 0; chunk < P::STAGE_COLUMNS; chunk += CHUNK) {
        const int column = stage * P::STAGE_COLUMNS + chunk;
        const int columns = a.rotation.in_features - stream.slice_begin - column;
        if (columns <= 0) break;
        multiply_chunk<Format, BITS, SPAN, TOKEN_TILES>(
            sum, stream, stream.stages + slot * P::STAGE_BYTES, chunk, x + column,
            sums + column / SPAN * TOKEN_TILES * TOKENS, groups, columns);
      }
      slot = slot + 1 == P::STAGES ? 0 : slot + 1;
    }
    buffer = buffer + 1 == a.scale_buffers ? 0 : buffer + 1;
    if (a.splits == 1 || sum_splits<BITS, TOKEN_TILES>(sum, a, tile)) {
      store_tile<Format, BITS, TOKEN_TILES>(sum, a, tile, stream.band_rows);
    }
  }
}

}  // namespace hqq_oft::cuda
