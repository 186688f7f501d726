// y = x * W^T + bias for many bfloat16 rows of x.
//
// Lanes are rows of x, which is transposed: one vector holds a pair of columns of sixteen rows. Scale and zero are part
// of the lookup (vpermw): each group of a row has a table of its weights in bfloat16. A pair of weights is broadcast to
// all lanes. AMX multiplies tiles in the same layout: sixteen rows of W by pairs of sixteen rows of x.
#pragma once

#include "bf16_levels.h"
#include "rotate_bf16.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

using Tokens = ProductTokensBF16;

// acc[r][v] += pair of w for row r . vector v of x, over the pairs.
template <int ROWS, int VECTORS>
inline void add_dots(const uint16_t* w, int64_t row_stride, int64_t pair_stride, const uint16_t* x, int64_t x_stride,
                     int64_t pairs, Vec (&acc)[ROWS][VECTORS]) {
  for (int64_t i = 0; i < pairs; ++i) {
    __m512bh columns[VECTORS];
    each<VECTORS>([&](int v) { columns[v] = as_bf16(_mm512_loadu_si512(x + (v * x_stride + i) * 32)); });
    each<ROWS>([&](int r) {
      __m512bh weights = broadcast_pair(w + (r * row_stride + i * pair_stride) * 2);
      each<VECTORS>([&](int v) { acc[r][v] = _mm512_dpbf16_ps(acc[r][v], columns[v], weights); });
    });
  }
}

// y = x + x * D for one block of sixteen rows, both in pairs of columns: [b / 2][16].
inline void rotate_pairs(const uint16_t* x, const uint16_t* d, int64_t b, uint16_t* y) {
  constexpr int kColumns = 8;
  const __m512i high_half = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t j = 0; j < b; j += kColumns) {
    Vec acc[kColumns][1];
    each<kColumns / 2>([&](int c) {
      __m512i own = _mm512_loadu_si512(x + (j + 2 * c) * kLanes);
      acc[2 * c][0] = _mm512_castsi512_ps(_mm512_slli_epi32(own, 16));
      acc[2 * c + 1][0] = _mm512_castsi512_ps(_mm512_and_si512(own, high_half));
    });
    add_dots<kColumns, 1>(d + 2 * j, 1, b, x, 0, b / 2, acc);
    each<kColumns / 2>([&](int c) {
      __m512i low = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(acc[2 * c][0])));
      __m512i high = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(acc[2 * c + 1][0])));
      _mm512_storeu_si512(y + (j + 2 * c) * kLanes, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    });
  }
}

// Sixteen rows of x, `stride` apart, in pairs of columns: [pair][16]. Lanes past n are zero.
inline void columns_of(const uint16_t* x, int64_t stride, int64_t n, int64_t columns, uint16_t* out) {
  for (int64_t j = 0; j < columns; j += 32) {
    __m512i v[16];
    each<16>([&](int i) { v[i] = i < n ? _mm512_loadu_si512(x + i * stride + j) : _mm512_setzero_si512(); });
    transpose(v);
    each<16>([&](int i) { _mm512_storeu_si512(out + j * kLanes + i * 32, v[i]); });
  }
}

// The same of x + x * D. `copy` and `sums` are scratch for sixteen rows.
inline void rotated_columns_of(const uint16_t* x, int64_t stride, int64_t n, const uint16_t* d, int64_t b,
                               int64_t columns, uint16_t* copy, float* sums, uint16_t* out) {
  for (int64_t r = kLanes; r < 2 * kLanes; ++r) prefetch_row(x + r * stride, columns);
  if (n < kLanes) {  // tiles are read whole
    for (int64_t r = 0; r < n; ++r) __builtin_memcpy(copy + r * columns, x + r * stride, columns * sizeof *copy);
    x = copy, stride = columns;
  }
  multiply_blocks(x, stride, d, b, columns / b, sums, columns);
  for (int64_t j = 0; j < columns; j += 32) {
    __m512i v[16];
    each<16>([&](int i) {
      auto own = reinterpret_cast<const BF16*>(x + i * stride + j);
      v[i] = i < n ? rounded_sums(own, sums + i * columns + j) : _mm512_setzero_si512();
    });
    transpose(v);
    each<16>([&](int i) { _mm512_storeu_si512(out + j * kLanes + i * 32, v[i]); });
  }
}

// Pairs of columns as 32-bit words, sixteen rows of x in a vector: [chunk of columns][vector][pair][16]. Lanes past the
// last row are zero.
void prepare_tokens_bf16(const PrepareTokensBF16& op, int64_t begin, int64_t end, float* scratch) {
  int64_t vectors = Tokens::vectors(op.M), b = op.blocks ? op.blocks->b : 0;
  bool by_tiles = op.blocks && in_tiles(*op.blocks);
  float* sums = scratch;
  auto plain = reinterpret_cast<uint16_t*>(sums + op.together() * Tokens::kRowsOfX);
  uint16_t* d = plain + op.together() * Tokens::kRowsOfX;
  [[maybe_unused]] TileRegisters registers;
  for (int64_t task = begin; task < end; ++task) {
    int64_t first = task % op.chunks() * op.chunk, columns = smaller(op.chunk, op.K - first);
    int64_t first_vector = task / op.chunks() * op.kVectors, last_vector = smaller(first_vector + op.kVectors, vectors);
    int64_t together = smaller(op.together(), columns);
    for (int64_t column = 0; column < columns; column += together) {
      if (b) pack_pairs(*op.blocks, 0, (first + column) / b, together / b, d);
      for (int64_t vector = first_vector; vector < last_vector; ++vector) {
        int64_t m = vector * kLanes, n = smaller(kLanes, op.M - m);
        const uint16_t* x = op.x + m * op.K + first + column;
        uint16_t* out = op.columns + (first * vectors + vector * columns + column) * kLanes;
        if (by_tiles) {
          rotated_columns_of(x, op.K, n, d, b, together, plain, sums, out);
          continue;
        }
        columns_of(x, op.K, n, together, b ? plain : out);
        for (int64_t j = 0; b && j < together; j += b)
          rotate_pairs(plain + j * kLanes, d + j * b, b, out + j * kLanes);
      }
    }
  }
}

// Weights of the tile's rows, `columns` of them from `column` on: [band][row][columns]. Those that are decoded next are
// `next` bytes ahead.
inline void decode_rows(const Weight& w, const RowTile& tile, int64_t column, int64_t columns, int64_t next, Vec levels,
                        uint16_t* out) {
  constexpr int64_t kBytes = 64;  // within one group
  int64_t groups = w.K / w.group_size;
  with_type(w.scale.type, [&](auto type) {
    using S = typename decltype(type)::type;
    auto scale = static_cast<const S*>(w.scale.data), zero = static_cast<const S*>(w.zero.data);
    for (int64_t row = 0; row < kBandRows; ++row) {
      const uint8_t* from = tile.bytes(w, row) + column;
      for (int64_t j = 0; j < columns; j += kBytes) {
        __m512i words[2] = {_mm512_cvtepu8_epi16(load_32(from + j)), _mm512_cvtepu8_epi16(load_32(from + j + 32))};
        for (int band = 0; band < 2; ++band) {
          int64_t group = tile.row_of_w(band, row) * groups + (column + j) / w.group_size;
          Vec weights = group_weights(levels, scale[group], zero[group]);
          __m512i table = table_of(weights, weights);
          uint16_t* to = out + (band * kBandRows + row) * columns + j;
          for (int half = 0; half < 2; ++half) {
            __m512i index = _mm512_srl_epi16(words[half], _mm_cvtsi32_si128(tile.shift[band]));
            _mm512_storeu_si512(to + half * 32, _mm512_permutexvar_epi16(index, table));
          }
        }
        // prefetching past the end is harmless
        _mm_prefetch(reinterpret_cast<const char*>(from + j + next), _MM_HINT_T1);
      }
    }
  });
}

#ifdef __AMX_BF16__
// totals[vector][row] += w_row . x over the pairs of columns, from zero or not, for the tile's rows of W.
inline void multiply_tokens(const uint16_t* w, const uint16_t* x, int64_t pairs, int64_t vectors, bool from_zero,
                            float* totals) {
  Tiles rows{w, 2 * pairs, kBandRows * 2 * pairs, 2 * kTile};
  for (int64_t v = 0; v < vectors; v += 2) {
    Tiles columns{x + v * pairs * 32, 32, pairs * 32, 32 * kTile};
    TileSums sums{totals + v * kTwoBands * kLanes, kLanes, kBandRows * kLanes, kTwoBands * kLanes, from_zero};
    (v + 1 < vectors ? tile_dots<2, 2> : tile_dots<2, 1>)(rows, columns, pairs, sums);
  }
}
#else
// totals[vector][row] += w_row . x over the pairs of columns, for ROWS rows of W and VECTORS vectors of rows of x.
template <int ROWS, int VECTORS>
void token_dots(const uint16_t* w, const uint16_t* x, int64_t pairs, bool from_zero, float* totals) {
  Vec acc[ROWS][VECTORS];
  each<ROWS, VECTORS>([&](int r, int v) {
    acc[r][v] = from_zero ? set(0) : load(totals + (v * kTwoBands + r) * kLanes);
  });
  add_dots<ROWS, VECTORS>(w, pairs, 1, x, pairs, pairs, acc);
  each<ROWS, VECTORS>([&](int r, int v) { store(totals + (v * kTwoBands + r) * kLanes, acc[r][v]); });
}

// 24 accumulators, three vectors of x and one of W, of 32 registers.
constexpr int64_t kMostVectors = 3;
using TokenDots = void (*)(const uint16_t*, const uint16_t*, int64_t, bool, float*);
constexpr TokenDots kTokenDots[kMostVectors + 1] = {nullptr, token_dots<kRowsAtATime, 1>, token_dots<kRowsAtATime, 2>,
                                                    token_dots<kRowsAtATime, 3>};

inline void multiply_tokens(const uint16_t* w, const uint16_t* x, int64_t pairs, int64_t vectors, bool from_zero,
                            float* totals) {
  share_out(vectors, kMostVectors, [&](int64_t v, int64_t count) {
    for (int64_t r = 0; r < kTwoBands; r += kRowsAtATime)
      kTokenDots[count](w + r * 2 * pairs, x + v * pairs * 32, pairs, from_zero,
                        totals + (v * kTwoBands + r) * kLanes);
  });
}
#endif

// y = totals + bias for the rows of one tile.
inline void store_tile(const ProductTokensBF16& op, const RowTile& tile, int64_t first_vector, int64_t vectors,
                       const float* totals) {
  for (int band = 0; band < 2; ++band) {
    float bias[kLanes] = {};
    if (op.bias) widen(op.bias->from(tile.first[band]), bias, tile.rows);
    for (int64_t v = 0; v < vectors; ++v) {
      __m512i outputs[16];
      const float* from = totals + (v * kTwoBands + band * kBandRows) * kLanes;
      each<16>([&](int i) { outputs[i] = _mm512_loadu_si512(from + i * kLanes); });
      transpose(outputs);
      int64_t m = (first_vector + v) * kLanes;
      for (int64_t i = 0; i < smaller(op.M - m, kLanes); ++i)
        store_band(_mm512_castsi512_ps(outputs[i]), load(bias), op.y + (m + i) * op.w.N + tile.first[band], tile.rows);
    }
  }
}

void product_tokens_bf16(const ProductTokensBF16& op, int64_t begin, int64_t end, float* scratch) {
  const Weight& w = op.w;
  auto weights = reinterpret_cast<uint16_t*>(scratch);
  float* totals = scratch + kTwoBands * op.chunk / 2;
  Vec levels = level_vector(w.bits);
  [[maybe_unused]] TileRegisters registers;
  int64_t all_vectors = Tokens::vectors(op.M), groups = op.tile_groups(), together = op.tiles_of_a_task();
  for (int64_t task = begin; task < end; ++task) {
    int64_t band_pair = task % w.band_pairs(), first_tile = task / w.band_pairs() % groups * together;
    int64_t tiles = smaller(together, w.row_tiles() - first_tile);
    int64_t first_vector = task / w.band_pairs() / groups * op.vectors_of_a_task();
    int64_t vectors = smaller(op.vectors_of_a_task(), all_vectors - first_vector);
    for (int64_t column = 0; column < w.K; column += op.chunk) {
      int64_t columns = smaller(op.chunk, w.K - column);
      const uint16_t* x = op.x + (column * all_vectors + first_vector * columns) * kLanes;
      int64_t next = tiles == 1 && column + columns < w.K ? columns : kBandRows * w.K;
      for (int64_t i = 0; i < tiles; ++i) {
        decode_rows(w, RowTile(w, band_pair, first_tile + i), column, columns, next, levels,
                    weights);
        multiply_tokens(weights, x, columns / 2, vectors, column == 0, totals + i * op.totals());
      }
    }
    for (int64_t i = 0; i < tiles; ++i)
      store_tile(op, RowTile(w, band_pair, first_tile + i), first_vector, vectors, totals + i * op.totals());
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
