// Shared by the products of bfloat16 levels. AVX-512's bfloat16 dot product multiplies pairs. A level is converted to
// bfloat16 by table lookup (vpermw) with the low five bits of a 16-bit word; for levels of fewer bits the table
// repeats, so that the bits above the level do not matter.
#pragma once

#include <immintrin.h>

#include "convert.h"
#include "unroll.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

inline __m512bh as_bf16(__m512i v) { return reinterpret_cast<__m512bh>(v); }

// Rows of accumulators: enough, with two or three vectors each, to hide the latency of the dot product.
constexpr int kRowsAtATime = 8;

// The pair of bfloat16 at p, in every lane.
inline __m512bh broadcast_pair(const uint16_t* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return as_bf16(_mm512_set1_epi32(pair));
}

// Part of a row that will be read soon; harmless past the end.
inline void prefetch_row(const uint16_t* row, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 32) _mm_prefetch(reinterpret_cast<const char*>(row + j), _MM_HINT_T0);
}

// Levels 0 ... 2^bits - 1, repeated.
inline Vec level_vector(int64_t bits) {
  alignas(64) float level[kLanes];
  for (int i = 0; i < kLanes; ++i) level[i] = static_cast<float>(i & ((1 << bits) - 1));
  return load(level);
}

// The two halves of a table of 32 words.
inline __m512i table_of(Vec first, Vec second) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
}

// Weights of one group by level: (level - zero) * scale.
template <class S>
inline Vec group_weights(Vec levels, const S& scale, const S& zero) {
  return mul(sub(levels, set(float_of(zero))), set(float_of(scale)));
}

// Transposes a 16 x 16 matrix of 32-bit words.
inline void transpose(__m512i* v) {
  __m512i t[16];
  each<4>([&](int quarter) {
    int i = 4 * quarter;
    __m512i low01 = _mm512_unpacklo_epi32(v[i], v[i + 1]), high01 = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    __m512i low23 = _mm512_unpacklo_epi32(v[i + 2], v[i + 3]), high23 = _mm512_unpackhi_epi32(v[i + 2], v[i + 3]);
    t[i] = _mm512_unpacklo_epi64(low01, low23), t[i + 1] = _mm512_unpackhi_epi64(low01, low23);
    t[i + 2] = _mm512_unpacklo_epi64(high01, high23), t[i + 3] = _mm512_unpackhi_epi64(high01, high23);
  });
  // t[4 i + j] holds word j of each 128-bit quarter of rows 4 i ... 4 i + 3; the quarters are transposed next
  each<4>([&](int j) {
    __m512i low02 = _mm512_shuffle_i32x4(t[j], t[4 + j], 0x88), high02 = _mm512_shuffle_i32x4(t[j], t[4 + j], 0xdd);
    __m512i low13 = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0x88);
    __m512i high13 = _mm512_shuffle_i32x4(t[8 + j], t[12 + j], 0xdd);
    v[j] = _mm512_shuffle_i32x4(low02, low13, 0x88), v[8 + j] = _mm512_shuffle_i32x4(low02, low13, 0xdd);
    v[4 + j] = _mm512_shuffle_i32x4(high02, high13, 0x88), v[12 + j] = _mm512_shuffle_i32x4(high02, high13, 0xdd);
  });
}

// Splits `total` items into the fewest shares of at most `most`, as equal as possible: f(first, count).
template <class F>
inline void share_out(int64_t total, int64_t most, F&& f) {
  int64_t shares = ceil_div(total, most);
  for (int64_t i = 0, first = 0; i < shares; ++i) {
    int64_t count = total / shares + (i < total % shares ? 1 : 0);
    f(first, count);
    first += count;
  }
}

// Thirty-two rows of W that share packed bytes: sixteen of one band, and the sixteen of the next band in the same
// bytes.
struct RowTile {
  int64_t rows;               // of each band; fewer in the last tile
  int64_t first[2];           // row of W, by band
  int64_t packed[kBandRows];  // rows of bytes; the last one is repeated
  int shift[2];               // right, to bring a level to the low bits

  RowTile(const Weight& w, int64_t band_pair, int64_t tile) {
    int64_t band_rows = w.N / w.fields(), begin = tile * kBandRows, bits = w.bits;
    rows = smaller(kBandRows, band_rows - begin);
    for (int band = 0; band < 2; ++band) {
      first[band] = (2 * band_pair + band) * band_rows + begin;
      shift[band] = static_cast<int>(bits * (w.fields() - 1 - 2 * band_pair - band));
    }
    for (int64_t i = 0; i < kBandRows; ++i) packed[i] = begin + smaller(i, rows - 1);
  }
  const uint8_t* bytes(const Weight& w, int64_t row) const {
    return static_cast<const uint8_t*>(w.packed) + packed[row] * w.K;
  }
  // Row of W for the tile's `row` in a band.
  int64_t row_of_w(int band, int64_t row) const { return first[band] + smaller(row, rows - 1); }
};

// y = total + bias for the rows of one band, sixteen totals per row of x.
inline void store_band(Vec total, Vec bias, uint16_t* y, int64_t rows) {
  auto outputs = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_add_ps(total, bias)));
  if (rows == kLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), outputs);
  } else {
    _mm256_mask_storeu_epi16(y, static_cast<__mmask16>((1 << rows) - 1), outputs);
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
