// y = x * W^T + bias for more than a few bfloat16 rows of x: a matrix product on levels.
//
// Lanes are rows of W. Sixteen rows of bytes are transposed as 32-bit words, so that a lane holds four columns of its
// row. Table lookup of a word's bytes 0 and 2, or 1 and 3, gives a row's operand of one dot product instruction; the
// same pair of columns of x is broadcast to all lanes. Two bands share each broadcast. Scale and zero are applied once
// per 64 columns: s * (q . x - z * sum(x)).
#pragma once

#include "bf16_levels.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

using Tile = ProductTileBF16;

// Rearranges x into units of 64 columns, with all rows of a unit together; swaps the middle two of each four columns.
// Sums each row over each unit.
void prepare_tile_bf16(const PrepareTileBF16& op, int64_t begin, int64_t end, float*) {
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  auto swapped = [](__m512i v) { return _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(v, 0xd8), 0xd8); };
  for (int64_t unit = begin; unit < end; ++unit)
    for (int64_t m = 0; m < op.M; ++m) {
      const uint16_t* from = op.x + m * op.K + unit * Tile::kColumns;
      uint16_t* to = op.columns + (unit * op.M + m) * Tile::kColumns;
      __m512i first = _mm512_loadu_si512(from), second = _mm512_loadu_si512(from + 32);
      _mm512_storeu_si512(to, swapped(first));
      _mm512_storeu_si512(to + 32, swapped(second));
      Vec total = _mm512_dpbf16_ps(set(0), as_bf16(first), as_bf16(ones));
      op.sums[unit * op.M + m] = sum(_mm512_dpbf16_ps(total, as_bf16(second), as_bf16(ones)));
    }
}

// Decodes 64 columns from `column` on: levels of one pair of columns after another, of 16 rows in each of both bands.
inline void decode_tile(const Weight& w, const RowTile& tile, int64_t column, __m512i table, uint16_t* levels) {
  __m512i v[16];
  each<16>([&](int i) {
    const uint8_t* from = tile.bytes(w, i) + column;
    v[i] = _mm512_loadu_si512(from);
    // sixteen streams are too many for the hardware prefetcher; prefetching past the end is harmless
    _mm_prefetch(reinterpret_cast<const char*>(from + Tile::kColumns), _MM_HINT_T0);
  });
  transpose(v);
  each<16>([&](int i) {
    each<2, 2>([&](int odd, int band) {
      __m512i index = _mm512_srl_epi16(v[i], _mm_cvtsi32_si128(tile.shift[band] + 8 * odd));
      _mm512_storeu_si512(levels + ((i * 2 + odd) * 2 + band) * 32, _mm512_permutexvar_epi16(index, table));
    });
  });
}

// to[group][band][row] from values [N, groups].
inline void transpose_groups(const Source& values, const RowTile& tile, int64_t groups, float* to) {
  with_type(values.type, [&](auto type) {
    auto p = static_cast<const typename decltype(type)::type*>(values.data);
    for (int64_t group = 0; group < groups; group += kLanes)
      for (int band = 0; band < 2; ++band) {
        int64_t n = smaller(kLanes, groups - group);
        __m512i v[16];
        each<16>([&](int i) {
          auto from = p + tile.row_of_w(band, i) * groups + group;
          v[i] = _mm512_castps_si512(n == kLanes ? load(from) : load_first(from, n));
        });
        transpose(v);
        for (int64_t i = 0; i < n; ++i) _mm512_storeu_si512(to + ((group + i) * 2 + band) * kLanes, v[i]);
      }
  });
}

// totals[r][band] += s * (q . x_r - z * sum(x_r)) over one unit of columns, for ROWS rows of x.
template <int ROWS>
void tile_dots(const uint16_t* levels, const uint16_t* x, const float* sums, const float* scale, const float* zero,
               float* totals) {
  Vec acc[ROWS][2];
  each<ROWS, 2>([&](int r, int band) { acc[r][band] = mul(load(zero + band * kLanes), set(-sums[r])); });
  for (int64_t pair = 0; pair < Tile::kColumns / 2; ++pair) {
    __m512bh w[2] = {as_bf16(_mm512_loadu_si512(levels + pair * 64)),
                     as_bf16(_mm512_loadu_si512(levels + pair * 64 + 32))};
    each<ROWS>([&](int r) {
      __m512bh columns = broadcast_pair(x + r * Tile::kColumns + 2 * pair);
      each<2>([&](int band) { acc[r][band] = _mm512_dpbf16_ps(acc[r][band], w[band], columns); });
    });
  }
  each<ROWS, 2>([&](int r, int band) {
    float* total = totals + (r * 2 + band) * kLanes;
    store(total, fma(acc[r][band], load(scale + band * kLanes), load(total)));
  });
}

using TileDots = void (*)(const uint16_t*, const uint16_t*, const float*, const float*, const float*, float*);
// Rows of x at a time: 24 accumulators. Registers would suffice for two more rows, but without a speedup.
constexpr int64_t kMostRows = 12;
constexpr TileDots kTileDots[kMostRows + 1] = {nullptr,       tile_dots<1>,  tile_dots<2>, tile_dots<3>, tile_dots<4>,
                                               tile_dots<5>,  tile_dots<6>,  tile_dots<7>, tile_dots<8>, tile_dots<9>,
                                               tile_dots<10>, tile_dots<11>, tile_dots<12>};

void product_tile_bf16(const ProductTileBF16& op, int64_t begin, int64_t end, float* scratch) {
  const Weight& w = op.w;
  int64_t M = op.M, groups = w.K / w.group_size;
  auto levels = reinterpret_cast<uint16_t*>(scratch);
  float* scale = scratch + Tile::kColumns * kLanes;
  float* zero = scale + groups * 2 * kLanes;
  float* totals = zero + groups * 2 * kLanes;
  Vec level = level_vector(w.bits);
  __m512i table = table_of(level, level);
  for (int64_t task = begin; task < end; ++task) {
    RowTile tile(w, task % w.band_pairs(), task / w.band_pairs());
    transpose_groups(w.scale, tile, groups, scale);
    transpose_groups(w.zero, tile, groups, zero);
    for (int64_t i = 0; i < 2 * M * kLanes; i += kLanes) store(totals + i, set(0));
    for (int64_t unit = 0; unit < w.K / Tile::kColumns; ++unit) {
      decode_tile(w, tile, unit * Tile::kColumns, table, levels);
      int64_t of_group = unit * Tile::kColumns / w.group_size * 2 * kLanes;
      share_out(M, kMostRows, [&](int64_t m, int64_t count) {
        int64_t at = unit * M + m;
        kTileDots[count](levels, op.x + at * Tile::kColumns, op.sums + at, scale + of_group, zero + of_group,
                         totals + m * 2 * kLanes);
      });
    }
    for (int band = 0; band < 2; ++band) {
      float bias[kLanes] = {};
      if (op.bias) widen(op.bias->from(tile.first[band]), bias, tile.rows);
      for (int64_t m = 0; m < M; ++m)
        store_band(load(totals + (m * 2 + band) * kLanes), load(bias), op.y + m * w.N + tile.first[band], tile.rows);
    }
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
