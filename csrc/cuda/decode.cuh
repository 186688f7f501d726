// y = x blockdiag(I + D) W^T + bias for 1 to 16 tokens, from HQQ's packed bytes. Include ptx.cuh first.
//
// Bytes: the packed levels once, and their scales and zeros once: bits / 8 + 4 / group_size per weight, 0.5625 at 4
// bits and groups of 64. Operations: 2 N K tokens, on tensor cores, with tokens padded to 8 or 16. A 32-bit word of
// packed levels is four columns of one row; with 4 bits it takes about 20 instructions in total (8 to convert pairs of
// levels, 1 or 2 mma, the rest copies, loads, scale and zero), and memory bandwidth leaves time for about 31 (H200: 4.3
// TB/s copied, 132 multiprocessors at 1.75 GHz). So the kernel is memory-bound: at least 2.2 us at N x K = 4096 x 4096,
// 7.7 us at 14336 x 4096, 31 us at 28672 x 8192. plan.h accounts for the bytes of D and of partial sums.
//
// Every warp streams its own packed rows through its own pipeline of asynchronous copies; warps synchronize only while
// x is written to shared memory, and the copies continue meanwhile. Scale and zero are applied to a span's sum, in
// float32: y += s (sum x q - z sum x), where the products x q are exact. The last warp to arrive adds the partial sums
// of a split K in split order, so results are bitwise reproducible.
#pragma once

#include "arguments.h"
#include "levels.h"
#include "plan.h"
#include "rotate.cuh"

namespace hqq_oft::cuda {

// One warp's stream of stages: TILE_ROWS rows of a tile by STAGE_COLUMNS columns; tile by tile, and each from the
// slice's first column to its last. A tile's scales are copied with its first stage.
template <int BITS>
struct Stream {
  using P = Packing<BITS>;

  const DecodeArguments& a;
  const SharedLayout& layout;
  unsigned char* stages;  // this warp's, in shared memory
  unsigned char* scales;
  uint64_t policy;
  int slice_begin, slice_stages;
  int tile_end;
  // Of the next copy:
  int tile, stage = 0, slot = 0, buffer = 0;

  __device__ __forceinline__ Stream(const DecodeArguments& arguments, const SharedLayout& shared, int first_tile)
      : a(arguments), layout(shared), policy(evict_first_policy()), tile(first_tile) {
    const int warp = warp_index();
    stages = shared_memory() + layout.stages + warp * P::STAGES * P::STAGE_BYTES;
    scales = shared_memory() + layout.scales + warp * a.scale_buffers * layout.scale_buffer;
    slice_begin = block_y() * a.slice;
    const int columns = a.rotation.in_features - slice_begin;
    slice_stages = ((columns < a.slice ? columns : a.slice) + P::STAGE_COLUMNS - 1) / P::STAGE_COLUMNS;
    const int band_end = (block_x() + 1) * a.band_tiles;
    tile_end = band_end < a.tiles ? band_end : a.tiles;
  }

  // Copies the next stage, if any; always commits a group, so that groups can be counted.
  __device__ __forceinline__ void copy_next() {
    if (tile < tile_end) {
      if (stage == 0) begin_tile();
      copy_levels();
      slot = slot + 1 == P::STAGES ? 0 : slot + 1;
      if (++stage == slice_stages) {
        stage = 0;
        tile += warp_count();
        buffer = buffer + 1 == a.scale_buffers ? 0 : buffer + 1;
      }
    }
    commit_copies();
  }

 private:
  static constexpr int UNITS = P::ROW_BYTES / UNIT;
  static constexpr int ROWS = WARP / UNITS;  // that the lanes copy at a time

  // This lane's unit of the next stage in the first of its rows. Out-of-range units copy zero bytes.
  const uint8_t* from;
  int rows_left, columns_left;

  __device__ __forceinline__ void begin_tile() {
    const int row = tile * TILE_ROWS + lane_index() / UNITS;
    const int column = slice_begin + lane_index() % UNITS * (UNIT / P::ELEMENT_BYTES);
    from = a.packed + (static_cast<int64_t>(row) * a.rotation.in_features + column) * P::ELEMENT_BYTES;
    rows_left = a.band_rows - row;
    columns_left = a.rotation.in_features - column;
    copy_scales();
  }

  __device__ __forceinline__ void copy_levels() {
    const int64_t rows_apart = static_cast<int64_t>(ROWS) * a.rotation.in_features * P::ELEMENT_BYTES;
    unsigned char* to = stages + slot * P::STAGE_BYTES;
    const uint8_t* row_from = from;
#pragma unroll
    for (int first = 0; first < TILE_ROWS; first += ROWS, row_from += rows_apart) {
      const bool exists = first < rows_left && columns_left > 0;
      const int at = stage_byte(first + lane_index() / UNITS, lane_index() % UNITS, P::ROW_BYTES);
      copy_unit_async(to + at, row_from, exists ? UNIT : 0, policy);
    }
    from += P::ROW_BYTES;
    columns_left -= P::STAGE_COLUMNS;
  }

  __device__ __forceinline__ void copy_scales() {
    constexpr int LANES = 4;  // that share a row
    using S = ScaleLayout<BITS>;
    const int64_t elements = static_cast<int64_t>(a.out_features) * a.groups_per_row;
    const int first_group = slice_begin / a.group_size;
    uint32_t* to = reinterpret_cast<uint32_t*>(scales + buffer * layout.scale_buffer);
    for (int row = lane_index() / LANES; row < P::FIELDS * TILE_ROWS; row += WARP / LANES) {
      const int packed_row = tile * TILE_ROWS + row % TILE_ROWS, field = row / TILE_ROWS;
      const int64_t first =
          scale_element(weight_row(packed_row, field, a.band_rows), a.groups_per_row, first_group) & ~int64_t{1};
      for (int word = lane_index() % LANES; word < a.scale_words; word += LANES) {
        const int64_t element = first + 2 * word, left = packed_row < a.band_rows ? elements - element : 0;
        const int bytes = left >= 2 ? 4 : left == 1 ? 2 : 0;
        uint32_t* word_to = to + S::word(word, field, row % TILE_ROWS);
        copy_word_async(word_to, a.scale + element, bytes);
        copy_word_async(word_to + S::ZEROS, a.zero + element, bytes);
      }
    }
  }
};

// Writes the block's slice of rotated x in the order of `x_position`, and the sum of each span and token.
template <class Format, int BITS, int SPAN, int TOKEN_TILES>
__device__ __forceinline__ void fill_x(const RotationArguments& a, const SharedLayout& layout, int slice) {
  constexpr int RUN_STEPS = RUN<BITS, SPAN>;
  const int lane = lane_index(), warp = warp_index(), group = lane / 4, quad = lane % 4;
  uint16_t* x = reinterpret_cast<uint16_t*>(shared_memory() + layout.x);
  for (int column = warp * STEP; column < slice; column += warp_count() * STEP) {
    Four columns[2];
    rotated_columns<Format>(a, block_y() * slice + column, lane, columns);
    const int mine = column + 4 * quad;
    uint16_t* at = x + mine / CHUNK * CHUNK + x_position(mine % CHUNK, RUN_STEPS);
#pragma unroll
    for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
      *reinterpret_cast<Four*>(at + (tokens * TOKENS + group) * layout.x_stride) = pair_columns(columns[tokens]);
    }
  }
  sync_block();
  float* sums = reinterpret_cast<float*>(shared_memory() + layout.sums);
  for (int i = warp * WARP + lane; i < slice / SPAN * TOKEN_TILES * TOKENS; i += warp_count() * WARP) {
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

// A lane's share of a tile's sums: four per field and tile of tokens, placed by `accumulator_row` and `_token`.
template <int BITS, int TOKEN_TILES>
struct Accumulators {
  float value[Packing<BITS>::FIELDS][TOKEN_TILES][4] = {};
};

// A lane's positions in shared memory for the next reads of a tile. They are advanced chunk by chunk, since the
// compiler would otherwise recompute them for each chunk.
template <int BITS, int SPAN, int TOKEN_TILES>
struct Reader {
  using P = Packing<BITS>;

  const uint16_t* x;       // the lane's columns of its token
  const float* sums;       // of the lane's two tokens
  const uint32_t* scales;  // the lane's row of the tile's
  int element;             // of the scales: a group, counted from the first of the row's words
  int columns_left;        // of the group

  __device__ __forceinline__ void advance_span(int group_size) {
    sums += TOKEN_TILES * TOKENS;
    columns_left -= SPAN;
    if (columns_left == 0) {
      ++element;
      columns_left = group_size;
    }
  }

  // Scales and zeros of a field's rows `group` and `group + 8`; `odd` is 1 where the row's first is in a high half.
  template <class Format>
  __device__ __forceinline__ void load_scales(int field, int odd, float (&scale)[2], float (&zero)[2]) const {
    using S = ScaleLayout<BITS>;
    const int at = element + odd;
    const uint32_t* words = scales + (at >> 1) * S::WORD_STRIDE;
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(words) + (at & 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = widen<Format>(halves[2 * S::word(0, field, 8 * half)]);
      zero[half] = widen<Format>(halves[2 * (S::word(0, field, 8 * half) + S::ZEROS)]);
    }
  }
};

// Adds the products of the chunk that starts `chunk` columns into the stage. `odd` is `scale_is_odd` of even and odd
// fields; `columns` of W remain; there are no scales past them.
template <class Format, int BITS, int SPAN, int TOKEN_TILES>
__device__ __forceinline__ void multiply_chunk(Accumulators<BITS, TOKEN_TILES>& sum,
                                               Reader<BITS, SPAN, TOKEN_TILES>& reader, const unsigned char* stage,
                                               int chunk, int x_stride, const int (&odd)[2], int group_size,
                                               int columns) {
  using P = Packing<BITS>;
  constexpr int RUN_STEPS = RUN<BITS, SPAN>, SPAN_STEPS = SPAN / STEP;
  const int group = lane_index() / 4, quad = lane_index() % 4;

  Words<4> x[TOKEN_TILES][2];  // steps 0 and 1, steps 2 and 3
#pragma unroll
  for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
    const uint16_t* at = reader.x + tokens * TOKENS * x_stride;
    x[tokens][0] = *reinterpret_cast<const Words<4>*>(at);
    x[tokens][1] = *reinterpret_cast<const Words<4>*>(at + 8);
  }
  reader.x += CHUNK;
#pragma unroll
  for (int span = 0; span < CHUNK / SPAN; ++span) {
    if (span * SPAN >= columns) break;
    uint32_t levels[2][SPAN_STEPS * P::WORDS];  // of rows group and group + 8
#pragma unroll
    for (int step = 0; step < SPAN_STEPS; step += RUN_STEPS) {
      const int column = chunk + fragment_column(quad, span * SPAN_STEPS + step, RUN_STEPS);
      const int byte = column * P::ELEMENT_BYTES;
      const unsigned char* at = stage + stage_byte(group, byte / UNIT, P::ROW_BYTES) + byte % UNIT;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto words = *reinterpret_cast<const Words<RUN_STEPS * P::WORDS>*>(at + 8 * half * P::ROW_BYTES);
#pragma unroll
        for (int i = 0; i < RUN_STEPS * P::WORDS; ++i) levels[half][step * P::WORDS + i] = words.word[i];
      }
    }
    float x_sum[TOKEN_TILES][2];
#pragma unroll
    for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
      x_sum[tokens][0] = reader.sums[tokens * TOKENS];
      x_sum[tokens][1] = reader.sums[tokens * TOKENS + 1];
    }
#pragma unroll
    for (int field = 0; field < P::FIELDS; ++field) {
      float scale[2], zero[2];
      reader.template load_scales<Format>(field, odd[field % 2], scale, zero);
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
        using L = Levels<Format, BITS>;
        const uint32_t a[4] = {L::pair(upper, field, 0), L::pair(lower, field, 0), L::pair(upper, field, 1),
                               L::pair(lower, field, 1)};
        const int of_chunk = span * SPAN_STEPS + step;
#pragma unroll
        for (int tokens = 0; tokens < TOKEN_TILES; ++tokens) {
          const uint32_t* words = &x[tokens][of_chunk / 2].word[of_chunk % 2 * 2];
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
    reader.advance_span(group_size);
  }
}

// Whether this warp is the last of `splits` to arrive at a ticket. A ticket holds a launch's stamp and, in its low 16
// bits, how many have arrived. A ticket with another stamp counts as no arrivals, so it need not be cleared before a
// launch; the last warp clears it.
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

// Calls `visit(value, token, field, row)` for all sums of a lane whose token and packed row exist.
template <int BITS, int TOKEN_TILES, class Visit>
__device__ __forceinline__ void for_each_sum(Accumulators<BITS, TOKEN_TILES>& sum, int tokens, int rows, Visit visit) {
  const int group = lane_index() / 4, quad = lane_index() % 4;
#pragma unroll
  for (int field = 0; field < Packing<BITS>::FIELDS; ++field) {
#pragma unroll
    for (int i = 0; i < 4 * TOKEN_TILES; ++i) {
      const int token = i / 4 * TOKENS + accumulator_token(quad, i % 4), row = accumulator_row(group, i % 4);
      if (token < tokens && row < rows) visit(sum.value[field][i / 4][i % 4], token, field, row);
    }
  }
}

// Stores this split's partial sums in the workspace, [splits, tokens, fields, rows] floats per tile; the last warp to
// arrive then sums all splits in order and returns true.
template <int BITS, int TOKEN_TILES>
__device__ __forceinline__ bool sum_splits(Accumulators<BITS, TOKEN_TILES>& sum, const DecodeArguments& a, int tile) {
  constexpr int SIZE = Packing<BITS>::FIELDS * TILE_ROWS;  // of one token
  const int tokens = a.rotation.tokens;
  float* parts = a.partial + static_cast<int64_t>(tile) * a.splits * tokens * SIZE;
  float* own = parts + static_cast<int64_t>(block_y()) * tokens * SIZE;
  for_each_sum<BITS, TOKEN_TILES>(sum, tokens, TILE_ROWS, [&](float value, int token, int field, int row) {
    own[token * SIZE + field * TILE_ROWS + row] = value;
  });
  // Lane 0 increments the ticket for the warp: after all lanes' writes (release) and before their reads (acquire).
  sync_warp();
  fence();
  int last = 0;
  if (lane_index() == 0) last = arrive_last(a.tickets + tile, a.stamp, a.splits);
  last = broadcast(last);
  if (last == 0) return false;
  fence();
  sync_warp();
  sum = {};
  for (int split = 0; split < a.splits; ++split, parts += tokens * SIZE) {
    for_each_sum<BITS, TOKEN_TILES>(sum, tokens, TILE_ROWS, [&](float& value, int token, int field, int row) {
      value += load_past_l1(parts + token * SIZE + field * TILE_ROWS + row);
    });
  }
  return true;
}

template <class Format, int BITS, int TOKEN_TILES>
__device__ __forceinline__ void store_tile(Accumulators<BITS, TOKEN_TILES>& sum, const DecodeArguments& a,
                                           int tile) {
  const int first = tile * TILE_ROWS;
  for_each_sum<BITS, TOKEN_TILES>(
      sum, a.rotation.tokens, a.band_rows - first, [&](float value, int token, int field, int row) {
        const int output = weight_row(first + row, field, a.band_rows);
        if (a.bias != nullptr) value += widen<Format>(a.bias[output]);
        const auto rounded = static_cast<uint16_t>(narrow<Format>(value, 0.0f));
        a.y[static_cast<int64_t>(token) * a.out_features + output] = rounded;
      });
}

// Grid: (bands, splits). See `Plan` for what a block does, `shared_layout` for its shared memory.
template <class Format, int BITS, int SPAN, int TOKEN_TILES>
__global__ void __launch_bounds__(WARPS * WARP, max_resident(BITS, TOKEN_TILES))
    decode_kernel(const DecodeArguments a) {
  using P = Packing<BITS>;
  const SharedLayout layout =
      shared_layout(facts_of<BITS>(), warp_count(), TOKEN_TILES, SPAN, a.slice, a.scale_words, a.scale_buffers);
  int tile = block_x() * a.band_tiles + warp_index();
  Stream<BITS> stream(a, layout, tile);
  for (int stage = 0; stage < P::STAGES - 1; ++stage) stream.copy_next();

  if (a.chained) wait_for_previous_launch();
  fill_x<Format, BITS, SPAN, TOKEN_TILES>(a.rotation, layout, a.slice);

  const int group = lane_index() / 4, quad = lane_index() % 4;
  const uint16_t* x = reinterpret_cast<const uint16_t*>(shared_memory() + layout.x) + group * layout.x_stride +
                      quad * (STEPS * 4);
  const float* sums = reinterpret_cast<const float*>(shared_memory() + layout.sums) + accumulator_token(quad, 0);
  const int columns = a.rotation.in_features - stream.slice_begin;
  const int group_columns_left = a.group_size - stream.slice_begin % a.group_size;
  const int first_group = stream.slice_begin / a.group_size;
  const int odd[2] = {scale_is_odd(group, 0, a.band_rows, a.groups_per_row, first_group),
                      scale_is_odd(group, 1, a.band_rows, a.groups_per_row, first_group)};
  int slot = 0, buffer = 0;
  for (; tile < stream.tile_end; tile += warp_count()) {
    Accumulators<BITS, TOKEN_TILES> sum;
    const uint32_t* scales = reinterpret_cast<const uint32_t*>(stream.scales + buffer * layout.scale_buffer) + group;
    Reader<BITS, SPAN, TOKEN_TILES> reader{x, sums, scales, 0, group_columns_left};
    int columns_left = columns;
    for (int stage = 0; stage < stream.slice_stages; ++stage) {
      wait_copies<P::STAGES - 2>();
      sync_warp();  // all lanes' copies are complete, and all have read what the next copy overwrites
      stream.copy_next();
#pragma unroll
      for (int chunk = 0; chunk < P::STAGE_COLUMNS && columns_left > 0; chunk += CHUNK, columns_left -= CHUNK) {
        multiply_chunk<Format, BITS, SPAN, TOKEN_TILES>(sum, reader, stream.stages + slot * P::STAGE_BYTES, chunk,
                                                        layout.x_stride, odd, a.group_size, columns_left);
      }
      slot = slot + 1 == P::STAGES ? 0 : slot + 1;
    }
    buffer = buffer + 1 == a.scale_buffers ? 0 : buffer + 1;
    if (a.splits == 1 || sum_splits<BITS, TOKEN_TILES>(sum, a, tile)) {
      store_tile<Format, BITS, TOKEN_TILES>(sum, a, tile);
    }
  }
}

}  // namespace hqq_oft::cuda
