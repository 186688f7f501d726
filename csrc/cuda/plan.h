// How a product is divided into blocks, and their shared memory: plain C++, decided before each launch.
//
// A block owns a band of outputs and a slice of the columns K. It writes its slice of rotated x to shared memory once
// and then streams the band's packed rows through it. Wide bands and narrow slices read D less often; wide slices have
// fewer partial sums. `choose_plan` minimizes the total cost.
#pragma once

#include <algorithm>
#include <cstdint>

#include "arguments.h"
#include "layout.h"

namespace hqq_oft::cuda {

struct Problem {
  int tokens;
  int out_features;
  int in_features;
  int bits;
  int group_size;
  int block_size;  // of the rotation; 0 for none
  int adapters;    // that the rows of x use, at most
};

struct Device {
  int multiprocessors;
  int shared_per_block;           // bytes that one block may have
  int shared_per_multiprocessor;  // bytes
};

// Values that depend only on the packing: see `Packing`.
struct PackingFacts {
  int fields, element_bytes, stage_columns, stage_bytes, stages, scale_word_stride;
};

template <int BITS>
HQQ_OFT_HOST_DEVICE constexpr PackingFacts facts_of() {
  using P = Packing<BITS>;
  return {P::FIELDS, P::ELEMENT_BYTES, P::STAGE_COLUMNS, P::STAGE_BYTES, P::STAGES, ScaleLayout<BITS>::WORD_STRIDE};
}

inline PackingFacts packing_facts(int bits) {
  switch (bits) {
    case 8: return facts_of<8>();
    case 4: return facts_of<4>();
    case 3: return facts_of<3>();
    case 2: return facts_of<2>();
    default: return facts_of<1>();
  }
}

struct Plan {
  int warps;          // of a block
  int token_tiles;    // of TOKENS
  int span;           // columns that share a scale and divide a chunk: 64 or 32
  int tiles;          // of TILE_ROWS packed rows
  int band_tiles;     // tiles of one block
  int bands;
  int slice;          // columns of one block, a multiple of a stage's
  int splits;         // of K
  int scale_words;    // 32-bit words of scales that one row of a slice may need
  int scale_buffers;  // tiles whose scales are in shared memory at once
  int resident;       // blocks that share a multiprocessor
  bool chained;       // a separate launch rotates x, and this one is chained to it
};

// Byte offsets in a block's shared memory. Each warp has its own `stages`, scales and zeros.
struct SharedLayout {
  int x, sums, stages, scales, total;
  int x_stride;      // elements
  int scale_buffer;  // bytes of the scales and zeros of one tile
};

HQQ_OFT_HOST_DEVICE SharedLayout shared_layout(const PackingFacts& p, int warps, int token_tiles, int span, int slice,
                                               int scale_words, int scale_buffers) {
  SharedLayout s{};
  s.x_stride = slice + X_PADDING;
  s.scale_buffer = scale_words * p.scale_word_stride * 4;
  s.stages = 0;
  s.x = warps * p.stages * p.stage_bytes;
  s.sums = s.x + token_tiles * TOKENS * s.x_stride * 2;
  s.scales = s.sums + slice / span * token_tiles * TOKENS * 4;
  s.total = s.scales + warps * scale_buffers * s.scale_buffer;
  return s;
}

inline SharedLayout shared_layout(const PackingFacts& p, const Plan& plan) {
  return shared_layout(p, plan.warps, plan.token_tiles, plan.span, plan.slice, plan.scale_words, plan.scale_buffers);
}

inline int ceil_div(int value, int divisor) { return (value + divisor - 1) / divisor; }

// The plan with bands of `band_tiles` tiles and slices of `slice_stages` stages; ignores the shared memory limit.
inline Plan make_plan(const Problem& problem, int warps, int band_tiles, int slice_stages, bool chained) {
  const PackingFacts p = packing_facts(problem.bits);
  Plan plan{};
  plan.warps = warps;
  plan.token_tiles = ceil_div(std::max(problem.tokens, 1), TOKENS);
  plan.span = problem.group_size % 64 == 0 ? 64 : GROUP_UNIT;
  plan.tiles = ceil_div(problem.out_features / p.fields, TILE_ROWS);
  plan.band_tiles = band_tiles;
  plan.bands = ceil_div(plan.tiles, band_tiles);
  plan.slice = slice_stages * p.stage_columns;
  plan.splits = ceil_div(problem.in_features, plan.slice);
  const int group = problem.group_size, groups_per_row = problem.in_features / group;
  const bool whole = plan.slice % group == 0;
  // A slice that starts inside a group overlaps one more, but never more than a row has.
  const int groups = std::min(groups_per_row, whole ? plan.slice / group : plan.slice / group + 2);
  const bool may_begin_odd = groups_per_row % 2 != 0 || !whole || (plan.slice / group) % 2 != 0;
  plan.scale_words = ceil_div(groups + (may_begin_odd ? 1 : 0), 2);
  // The copies run at most stages - 1 stages ahead of the products: across more tiles if a slice, such as the last, is
  // short.
  const int last_slice = problem.in_features - (plan.splits - 1) * plan.slice;
  plan.scale_buffers = ceil_div(p.stages - 1, ceil_div(last_slice, p.stage_columns)) + 1;
  plan.resident = 1;
  plan.chained = chained;
  return plan;
}

// Approximate L2 throughput during the 1.5 us of a second, chained launch: reading more bytes of D costs more than the
// launch.
constexpr int64_t CHAIN_BYTES = 8 << 20;
// Bytes of shared memory that the system reserves per block.
constexpr int BLOCK_SHARED = 1024;
// Minimum size of an L2 read: narrow slices of few groups read more of the scales than they use.
constexpr int SECTOR = 32;
// Cost of starting a block, in bytes that a multiprocessor could stream in that time.
constexpr int64_t BLOCK_BYTES = 8 << 10;

// Bytes of D that all blocks together read if each rotates its own slice of x.
inline int64_t rotation_bytes(const Problem& problem, int bands) {
  const int64_t blocks = std::max(problem.adapters, 1);
  return blocks * bands * problem.in_features * problem.block_size * 2;
}

// Bytes through the slowest multiprocessor slot.
inline int64_t cost(const Problem& problem, const Plan& plan, int slots) {
  const PackingFacts p = packing_facts(problem.bits);
  const int64_t waves = ceil_div(plan.bands * plan.splits, slots);
  const int64_t rows = plan.band_tiles * TILE_ROWS;
  const int64_t levels = rows * plan.slice * p.element_bytes;
  const int64_t scales = rows * p.fields * 2 * ceil_div(plan.scale_words * 4, SECTOR) * SECTOR;
  const int64_t partial = plan.splits > 1 ? 2 * rows * p.fields * problem.tokens * 4 : 0;
  const int64_t whole = std::min(rotation_bytes(problem, plan.bands), CHAIN_BYTES);
  return waves * (levels + scales + partial + BLOCK_BYTES) + whole / (static_cast<int64_t>(plan.bands) * plan.splits);
}

// The cheapest plan for `resident` blocks per multiprocessor of `warps` warps; a plan with 0 bands if none fits.
inline Plan cheapest_plan(const Problem& problem, const Device& device, int resident, int warps) {
  const PackingFacts p = packing_facts(problem.bits);
  const int tiles = ceil_div(problem.out_features / p.fields, TILE_ROWS);
  const int stages = ceil_div(problem.in_features, p.stage_columns);
  const int slots = resident * device.multiprocessors;
  const int limit = std::min(device.shared_per_block, device.shared_per_multiprocessor / resident - BLOCK_SHARED);
  Plan best{};
  int64_t best_cost = INT64_MAX;
  // Among band sizes with the same number of bands the smallest is cheapest, so try one size per number of bands.
  for (int band_tiles = warps;;) {
    const int bands = ceil_div(tiles, band_tiles);
    int slice_stages = ceil_div(stages, std::max(1, slots / bands));
    Plan plan = make_plan(problem, warps, band_tiles, slice_stages, false);
    while (shared_layout(p, plan).total > limit && slice_stages > 1) {
      plan = make_plan(problem, warps, band_tiles, --slice_stages, false);
    }
    plan.resident = resident;
    if (shared_layout(p, plan).total <= limit && cost(problem, plan, slots) < best_cost) {
      best = plan;
      best_cost = cost(problem, plan, slots);
    }
    if (bands == 1) return best;
    band_tiles = ceil_div(ceil_div(tiles, bands - 1), warps) * warps;
  }
}

// The cheapest plan. With two blocks per multiprocessor one streams while the other starts or ends. If shared memory
// does not suffice (sm_89), use one block, with fewer warps if necessary (many scales per byte).
inline Plan choose_plan(const Problem& problem, const Device& device) {
  const int token_tiles = ceil_div(std::max(problem.tokens, 1), TOKENS);
  Plan best{};
  for (int resident = max_resident(problem.bits, token_tiles); resident >= 1 && best.bands == 0; --resident) {
    best = cheapest_plan(problem, device, resident, WARPS);
  }
  for (int warps = WARPS / 2; warps >= 1 && best.bands == 0; warps /= 2) {
    best = cheapest_plan(problem, device, 1, warps);
  }
  best.chained = problem.block_size > 0 && rotation_bytes(problem, best.bands) > CHAIN_BYTES;
  return best;
}

// Elements of the workspace for partial sums (float32), and number of tickets (64 bits each); 0 if K is not split.
inline int64_t partial_elements(const Problem& problem, const Plan& plan) {
  const int64_t tile = TILE_ROWS * packing_facts(problem.bits).fields * problem.tokens;
  return plan.splits == 1 ? 0 : tile * plan.tiles * plan.splits;
}
inline int64_t ticket_count(const Plan& plan) { return plan.splits == 1 ? 0 : plan.tiles; }

// Copies the sizes of the problem and the plan into the kernel's arguments.
inline void apply_plan(const Problem& problem, const Plan& plan, DecodeArguments* a) {
  a->out_features = problem.out_features;
  a->band_rows = problem.out_features / packing_facts(problem.bits).fields;
  a->group_size = problem.group_size;
  a->groups_per_row = problem.in_features / problem.group_size;
  a->tiles = plan.tiles;
  a->band_tiles = plan.band_tiles;
  a->slice = plan.slice;
  a->splits = plan.splits;
  a->scale_words = plan.scale_words;
  a->scale_buffers = plan.scale_buffers;
  a->chained = plan.chained;
}

}  // namespace hqq_oft::cuda
