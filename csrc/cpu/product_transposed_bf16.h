// g = dy * W for bfloat16 rows: the other product of a layer, summed over rows of W.
//
// Lanes are columns of W. Two bands share each packed byte, so that a byte gives one column of a pair of rows, the
// operand of one dot product instruction; the same pair of dy is broadcast. Scale and zero belong to the rows that are
// summed over: each pair and group has one table of its 2 x 16 weights in bfloat16, looked up by level (vpermw). AMX
// multiplies tiles in the same layout: pairs of sixteen rows of dy by sixteen columns of W.
#pragma once

#include "bf16_levels.h"
#include "tiles_bf16.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

using Transposed = ProductTransposedBF16;

// Interleaves columns of dy that belong to adjacent bands, one chunk of pairs at a time, all rows of a chunk together.
void prepare_pairs_bf16(const PreparePairsBF16& op, int64_t begin, int64_t end, float*) {
  for (int64_t task = begin; task < end; ++task) {
    int64_t first = task % op.chunks() * Transposed::kPairs, count = smaller(Transposed::kPairs, op.N / 2 - first);
    int64_t first_m = task / op.chunks() * op.kTokens, last_m = smaller(first_m + op.kTokens, op.M);
    for (int64_t m = first_m; m < last_m; ++m) {
      const uint16_t* from = op.dy + m * op.N;
      uint16_t* to = op.pairs + (first * op.M + m * count) * 2;
      for (int64_t i = 0; i < count;) {
        int64_t pair = first + i, row = pair % op.band_rows, n = smaller(count - i, op.band_rows - row);
        const uint16_t *left = from + pair / op.band_rows * 2 * op.band_rows + row, *right = left + op.band_rows;
        int64_t j = 0;
        for (; j + 16 <= n; j += 16) {
          __m512i low = _mm512_cvtepu16_epi32(load_32(left + j)), high = _mm512_cvtepu16_epi32(load_32(right + j));
          _mm512_storeu_si512(to + (i + j) * 2, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
        for (; j < n; ++j) to[(i + j) * 2] = left[j], to[(i + j) * 2 + 1] = right[j];
        i += n;
      }
    }
  }
}

// Decoded weights of pairs of rows, 64 columns: [half][pair][32 columns][2 rows]. Half of the columns are multiplied at
// a time, from the L1 cache.
constexpr int64_t kHalf = Transposed::kColumns / 2;

// `count` pairs from `first` on, columns from `column` on; those that are decoded next are `next` bytes ahead.
inline void decode_pairs(const Weight& w, int64_t first, int64_t count, int64_t column, int64_t next, Vec levels,
                         uint16_t* out) {
  int64_t band_rows = w.N / w.fields(), groups = w.K / w.group_size, group = column / w.group_size;
  const __m512i mask = _mm512_set1_epi32((1 << w.bits) - 1), second_table = _mm512_set1_epi32(16 << 16);
  auto packed = static_cast<const uint8_t*>(w.packed);
  with_type(w.scale.type, [&](auto type) {
    using S = typename decltype(type)::type;
    auto scale = static_cast<const S*>(w.scale.data), zero = static_cast<const S*>(w.zero.data);
    for (int64_t i = 0; i < count; ++i, out += 2 * kHalf) {
      int64_t pair = first + i, bands = pair / band_rows, row = pair % band_rows;
      int64_t one = (2 * bands * band_rows + row) * groups + group, other = one + band_rows * groups;
      __m512i table = table_of(group_weights(levels, scale[one], zero[one]),
                               group_weights(levels, scale[other], zero[other]));
      int shift = static_cast<int>(w.bits * (w.fields() - 2 - 2 * bands));  // of the second row's level
      __m128i to_first = _mm_cvtsi32_si128(shift + static_cast<int>(w.bits)), to_second = _mm_cvtsi32_si128(16 - shift);
      const uint8_t* from = packed + row * w.K + column;
      // the rows are too far apart for the hardware prefetcher; prefetching past the end is harmless
      _mm_prefetch(reinterpret_cast<const char*>(from + next), _MM_HINT_T1);
      for (int64_t j = 0; j < Transposed::kColumns; j += 16) {
        __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j)));
        __m512i first_level = _mm512_and_si512(_mm512_srl_epi32(bytes, to_first), mask);
        // lookup bits of a word's upper half: the level, the bits above it, and bit 4, which selects the table
        __m512i index = _mm512_ternarylogic_epi32(first_level, _mm512_sll_epi32(bytes, to_second), second_table, 0xfe);
        _mm512_storeu_si512(out + (j / kHalf * count * kHalf + j % kHalf) * 2, _mm512_permutexvar_epi16(index, table));
      }
    }
  });
}

// totals[r][64 columns] += dy_r . W over pairs begin ... end of `count`, from zero or not, for ROWS rows of dy.
template <int ROWS>
void pair_dots(const uint16_t* weights, const uint16_t* dy, int64_t begin, int64_t end, int64_t count, bool from_zero,
               float* totals) {
  constexpr int kVectors = Transposed::kColumns / kLanes;
  Vec acc[ROWS][kVectors];
  each<ROWS, kVectors>([&](int r, int v) {
    acc[r][v] = from_zero ? set(0) : load(totals + r * Transposed::kColumns + v * kLanes);
  });
  for (int64_t i = begin; i < end; ++i) {
    __m512bh w[kVectors];
    each<kVectors>([&](int v) { w[v] = as_bf16(_mm512_loadu_si512(weights + (v / 2 * count + i) * 64 + v % 2 * 32)); });
    each<ROWS>([&](int r) {
      __m512bh pair = broadcast_pair(dy + (r * count + i) * 2);
      each<kVectors>([&](int v) { acc[r][v] = _mm512_dpbf16_ps(acc[r][v], w[v], pair); });
    });
  }
  each<ROWS, kVectors>([&](int r, int v) { store(totals + r * Transposed::kColumns + v * kLanes, acc[r][v]); });
}

using PairDots = void (*)(const uint16_t*, const uint16_t*, int64_t, int64_t, int64_t, bool, float*);
// As many rows of dy as registers allow besides four vectors of W and one of dy.
constexpr int64_t kMostPairRows = 6;
constexpr PairDots kPairDots[kMostPairRows + 1] = {nullptr,      pair_dots<1>, pair_dots<2>, pair_dots<3>,
                                                   pair_dots<4>, pair_dots<5>, pair_dots<6>};

// The same for rows first_m ... last_m of dy.
inline void multiply_pairs(const uint16_t* weights, const uint16_t* dy, int64_t first_m, int64_t last_m, int64_t begin,
                           int64_t count, bool from_zero, float* totals) {
  share_out(last_m - first_m, kMostPairRows, [&](int64_t first, int64_t rows) {
    int64_t m = first_m + first;
    kPairDots[rows](weights, dy + m * count * 2, begin, count, count, from_zero, totals + m * Transposed::kColumns);
  });
}

#ifdef __AMX_BF16__
// The same, by tiles as far as there are whole ones.
inline void multiply_chunk(const uint16_t* weights, const uint16_t* dy, int64_t count, int64_t M, bool from_zero,
                           float* totals) {
  constexpr int64_t kColumns = Transposed::kColumns;
  int64_t pairs = count / kTile * kTile, rows = M / kTile * kTile, stride = 2 * count;
  for (int64_t j = 0; j < kColumns; j += kHalf) {
    Tiles right{weights + j * count * 2, 2 * kHalf, 2 * kTile, 2 * kHalf * kTile};
    for (int64_t m = 0; m < rows; m += 2 * kTile) {
      Tiles left{dy + m * stride, stride, kTile * stride, 2 * kTile};
      auto dots = m + kTile < rows ? tile_dots<2, 2> : tile_dots<1, 2>;
      dots(left, right, pairs, {totals + m * kColumns + j, kColumns, kTile * kColumns, kTile, from_zero});
    }
  }
  if (pairs < count) multiply_pairs(weights, dy, 0, rows, pairs, count, false, totals);
  if (rows < M) multiply_pairs(weights, dy, rows, M, 0, count, from_zero, totals);
}
#else
inline void multiply_chunk(const uint16_t* weights, const uint16_t* dy, int64_t count, int64_t M, bool from_zero,
                           float* totals) {
  multiply_pairs(weights, dy, 0, M, 0, count, from_zero, totals);
}
#endif

void product_transposed_bf16(const ProductTransposedBF16& op, int64_t begin, int64_t end, float* scratch) {
  const Weight& w = op.w;
  auto weights = reinterpret_cast<uint16_t*>(scratch);
  float* totals = scratch + Transposed::kPairs * Transposed::kColumns;
  Vec levels = level_vector(w.bits);
  [[maybe_unused]] TileRegisters registers;
  int64_t pairs = w.N / 2, groups = op.tile_groups(), together = op.tiles_of_a_task();
  for (int64_t task = begin; task < end; ++task) {
    int64_t first_tile = task % groups * together, tiles = smaller(together, op.columns() - first_tile);
    int64_t first_m = task / groups * op.tokens(), M = smaller(op.tokens(), op.M - first_m);
    int64_t size = M * Transposed::kColumns;  // of a tile's totals
    for (int64_t first = 0; first < pairs; first += Transposed::kPairs) {
      int64_t count = smaller(Transposed::kPairs, pairs - first);
      const uint16_t* dy = op.dy + (first * op.M + first_m * count) * 2;
      int64_t next = tiles == 1 && first + count < pairs ? count * w.K : Transposed::kColumns;
      for (int64_t i = 0; i < tiles; ++i) {
        decode_pairs(w, first, count, (first_tile + i) * Transposed::kColumns, next, levels, weights);
        multiply_chunk(weights, dy, count, M, first == 0, totals + i * size);
      }
    }
    for (int64_t m = 0; m < M; ++m)
      for (int64_t i = 0; i < tiles; ++i) {
        const float* from = totals + i * size + m * Transposed::kColumns;
        auto to = reinterpret_cast<BF16*>(op.g + (first_m + m) * w.K + (first_tile + i) * Transposed::kColumns);
        for (int64_t j = 0; j < Transposed::kColumns; j += kLanes) store(to + j, load(from + j));
      }
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
