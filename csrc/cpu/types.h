// Arguments of the CPU kernels, and the table of kernels of each instruction set. Independent of PyTorch.
#pragma once

#include <cstdint>

namespace hqq_oft::cpu {

enum class DType { f32, f16, bf16 };

constexpr int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// Elements of a tensor, of a type known at run time.
struct Source {
  const void* data;
  DType type;
  Source from(int64_t element) const { return {static_cast<const char*>(data) + element * size_of(type), type}; }
};

struct Sink {
  void* data;
  DType type;
  Sink from(int64_t element) const { return {static_cast<char*>(data) + element * size_of(type), type}; }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows of blocks in scratch start at multiples of this many floats, the widest vector.
constexpr int64_t kPad = 16;
constexpr int64_t padded(int64_t n) { return ceil_div(n, kPad) * kPad; }

// Rows of bytes per tile of some kernels, one per AVX-512 lane; with two bands, twice as many rows of W.
constexpr int64_t kBandRows = 16;
constexpr int64_t kTwoBands = 2 * kBandRows;

// W = (level - zero) * scale, [N, K], as HQQ packs it. Level e of W, read row by row, is field e / band_elements of
// packed element e mod band_elements, the first field in the highest bits; its scale and zero are those of group
// e / group_size (axis 1) or e mod groups (axis 0).
struct Weight {
  const void* packed;  // uint8, or int32 words of ten levels for 3 bits
  Source scale, zero;  // [groups], of one type
  int64_t N, K, bits, group_size, axis;

  int64_t fields() const { return bits == 3 ? 10 : 8 / bits; }
  // If each band is whole rows: pairs of bands, and tiles of sixteen rows of bytes.
  int64_t band_pairs() const { return fields() / 2; }
  int64_t row_tiles() const { return ceil_div(N / fields(), kBandRows); }
  int64_t groups() const { return N * K / group_size; }
  int64_t band_elements() const {
    int64_t rows = axis == 1 ? groups() : group_size, columns = axis == 1 ? group_size : groups();
    return ceil_div(rows, fields()) * columns;
  }
};

// Order of rows first ... first + count of W in which rows that share packed bytes are adjacent, so that the bytes are
// still in cache: one row of each band, then the next.
struct RowOrder {
  int64_t first, count, fields, stride;

  static RowOrder of(const Weight& w, int64_t first, int64_t count) {
    bool all = first == 0 && count == w.N;
    int64_t fields = all ? w.fields() : 1;
    return {first, count, fields, ceil_div(count, fields)};
  }
  int64_t positions() const { return fields * stride; }
  // Row at a position; -1 for a position past the last row of its band.
  int64_t row(int64_t position) const {
    int64_t row = position % fields * stride + position / fields;
    return row < count ? first + row : -1;
  }
};

// Blockwise rotation: D [adapters, stored, b, b] with stored = K / b, or 1 block for all positions.
struct Blocks {
  Source d;
  int64_t K, b, stored;
  bool transpose;

  int64_t count() const { return K / b; }
  int64_t elements() const { return stored * b * b; }  // of one adapter
  int64_t offset(int64_t block) const { return (stored == 1 ? 0 : block) * b * b; }
  // Adjacent blocks per task: about 256 features for long contiguous accesses, fewer if there are few, so that tasks can
  // be shared out.
  int64_t per_slice() const { return larger(smaller(256, K / 16) / b, 1); }
  int64_t slices() const { return ceil_div(count(), per_slice()); }
  struct Slice {
    int64_t first, count, column, columns;  // blocks, and the features that they rotate
  };
  Slice slice(int64_t number) const {
    int64_t first = number * per_slice(), blocks = smaller(per_slice(), count() - first);
    return {first, blocks, first * b, blocks * b};
  }
  int64_t slice_columns() const { return per_slice() * b; }
  // Includes padding for a vector that starts in the last column. A multiple of a cache line in bfloat16 too.
  int64_t tile_stride() const { return ceil_div(slice_columns(), 2 * kPad) * 2 * kPad + 2 * kPad; }
  int64_t packed_floats() const { return per_slice() * b * padded(b); }
};

// Rows grouped by adapter: order[first[a] ... first[a + 1]] are adapter a's rows; rows from first[adapters] on have
// none. If order is null: one adapter, all rows.
struct RowsByAdapter {
  int64_t adapters;
  const int64_t* order;
  const int64_t* first;

  int64_t row(int64_t position) const { return order ? order[position] : position; }
};

constexpr int64_t kTileRows = 16;
constexpr int64_t kChunkRows = 512;

// y = x + x * blockdiag(D), [M, K]; y may alias x.
struct Rotate {
  Source x;
  Sink y;
  int64_t M, x_stride, y_stride;
  Blocks blocks;
  RowsByAdapter rows;

  int64_t tasks() const { return blocks.slices() * ceil_div(M, kChunkRows); }
  int64_t scratch() const { return blocks.packed_floats() + padded(blocks.b) + 2 * kTileRows * blocks.tile_stride(); }
  int64_t cost() const { return smaller(M, kChunkRows) * blocks.slice_columns() * blocks.b; }
};

// dD_i = left_i^T * right_i, as `parts` added in a fixed order: independent of the number of threads. If `dx` is not
// null, it is right, which is replaced by right + right * blockdiag(D)^T, row by row after its last use.
struct RotateGradient {
  Source left, right;
  int64_t left_stride, right_stride, M;
  Blocks blocks;  // transposed
  RowsByAdapter rows;
  void* dx;
  float* part;  // [parts, adapters, stored, b, b]

  // Splits tokens if there are too few blocks to distribute.
  int64_t chunks() const {
    int64_t independent = blocks.slices() * rows.adapters;
    return independent >= 16 ? 1 : larger(1, smaller(ceil_div(M, kChunkRows), 16));
  }
  int64_t parts() const { return chunks() * (blocks.stored == 1 ? blocks.slices() : 1); }
  int64_t elements() const { return rows.adapters * blocks.elements(); }
  int64_t tasks() const { return rows.adapters * blocks.slices() * chunks(); }
  int64_t scratch() const {
    return 2 * blocks.packed_floats() + padded(blocks.b) + 3 * kTileRows * blocks.tile_stride();
  }
  int64_t cost() const { return ceil_div(M, chunks()) * blocks.slice_columns() * blocks.b * (dx ? 2 : 1); }
};

// out = W[first_row ..., first_column ...] in its type, with `rotated` W * blockdiag(D)^T.
struct Dequantize {
  Weight w;
  Sink out;
  int64_t first_row, rows, first_column, columns, out_stride;
  bool rotated;
  Blocks blocks;  // transposed; only those of the selected columns

  RowOrder order() const { return RowOrder::of(w, first_row, rows); }
  int64_t slice_columns() const { return rotated ? blocks.slice_columns() : smaller(columns, 4096); }
  int64_t slices() const { return rotated ? blocks.slices() : ceil_div(columns, slice_columns()); }
  int64_t chunk_rows() const { return rotated ? kChunkRows : kTileRows; }
  int64_t tasks() const { return slices() * ceil_div(order().positions(), chunk_rows()); }
  int64_t scratch() const {
    return rotated ? blocks.packed_floats() + padded(blocks.b) + 3 * kTileRows * blocks.tile_stride()
                   : padded(slice_columns());
  }
  int64_t cost() const { return chunk_rows() * slice_columns() * (rotated ? blocks.b : 4); }
};

constexpr int64_t kProductRows = 4;
constexpr int64_t kProductColumns = 2048;

// y = x * W^T + bias, [M, N], for few rows of x.
struct Product {
  const float* x;  // [M, K]
  Weight w;
  const Source* bias;
  Sink y;
  int64_t M;

  RowOrder order() const { return RowOrder::of(w, 0, w.N); }
  int64_t tasks() const { return ceil_div(order().positions(), kProductRows); }
  int64_t scratch() const { return kProductRows * (padded(smaller(w.K, kProductColumns)) + padded(M)); }
  int64_t cost() const { return kProductRows * w.K * (M + 4); }
};

// The same for a few bfloat16 rows and levels that bfloat16 holds exactly.
struct ProductBF16 {
  const uint16_t* x;   // [M, K], even and odd columns of each 64 separated
  const float* sums;   // [M, K / group_size], of x over each group
  Weight w;
  const Source* bias;
  Sink y;
  int64_t M;

  // Whether the products with the bfloat16 dot product support w: bands within bytes; whole vectors in each group,
  // whole groups in each row, whole rows in each band.
  static bool serves(const Weight& w, DType x) {
    return x == DType::bf16 && w.axis == 1 && w.bits != 3 && w.bits != 8 && w.group_size % 64 == 0 &&
           w.K % w.group_size == 0 && w.N % w.fields() == 0;
  }
  static constexpr int64_t kRows = 8;  // of W in a task

  RowOrder order() const { return RowOrder::of(w, 0, w.N); }
  int64_t row_groups() const { return w.K / w.group_size; }
  // Number of columns for which all rows of x stay in the L1 cache while the task iterates over its rows of W.
  int64_t slice_columns() const { return larger(16384 / M / w.group_size, 1) * w.group_size; }
  int64_t tasks() const { return ceil_div(w.N, kRows); }
  int64_t scratch() const { return kRows * (2 * padded(row_groups()) + M * kPad); }
  int64_t cost() const { return kRows * w.K * (M + 4) / 4; }
};

// x in the layout of `ProductBF16`.
struct PrepareBF16 {
  const uint16_t* x;  // [M, K]
  int64_t M, K, group_size;
  uint16_t* columns;
  float* sums;

  int64_t tasks() const { return M; }
  int64_t scratch() const { return 0; }
  int64_t cost() const { return K; }
};

// The same product, for weights that `ProductBF16::serves`, with more rows of x.
struct ProductTileBF16 {
  const uint16_t* x;  // [K / 64, M, 64], with the middle two of each four columns swapped
  const float* sums;  // [K / 64, M], of x over 64 columns
  Weight w;
  const Source* bias;
  uint16_t* y;  // bfloat16, as x
  int64_t M;

  static constexpr int64_t kFrom = 5;      // rows of x from which it is faster than `ProductBF16`
  static constexpr int64_t kColumns = 64;  // decoded at a time

  int64_t tasks() const { return w.band_pairs() * w.row_tiles(); }
  int64_t scratch() const { return kColumns * kBandRows + kTwoBands * (2 * w.K / w.group_size + M); }
  int64_t cost() const { return kTwoBands * w.K * (M + 4) / 4; }
};

// x in the layout of `ProductTileBF16`.
struct PrepareTileBF16 {
  const uint16_t* x;  // [M, K]
  int64_t M, K;
  uint16_t* columns;
  float* sums;

  int64_t tasks() const { return K / ProductTileBF16::kColumns; }
  int64_t scratch() const { return 0; }
  int64_t cost() const { return M * ProductTileBF16::kColumns; }
};

// Tiles of W in a task that multiplies them by `elements` of bfloat16: several if the L2 cache does not hold these, so
// that they are read less often.
constexpr int64_t tiles_for(int64_t elements) { return elements > (int64_t{1} << 19) ? 4 : 1; }

// Rows of x or dy in a task of a product with n results per row. The fewer results, the more it matters that a thread
// multiplies the rows that it has rearranged, in its own cache; the more, that weights are decoded less often.
constexpr int64_t rows_for(int64_t n) { return n < 2048 ? 256 : 512; }

// The same for many rows of x.
struct ProductTokensBF16 {
  const uint16_t* x;  // [chunks of columns, vectors, pairs of columns, kRowsOfX, 2]
  Weight w;
  const Source* bias;
  uint16_t* y;  // bfloat16, as x
  int64_t M;
  int64_t chunk;  // columns decoded at a time, into the L1 cache

  static constexpr int64_t kColumns = 64;  // a chunk's are a multiple of these
  static constexpr int64_t kRowsOfX = 16;  // in a vector

  // About equal chunks of at most `most` columns, of whole blocks of b <= most.
  static int64_t chunk_of(int64_t K, int64_t b, int64_t most) {
    int64_t unit = larger(kColumns, b), units = K / unit;
    return ceil_div(units, ceil_div(units, most / unit)) * unit;
  }
  static int64_t vectors(int64_t M) { return ceil_div(M, kRowsOfX); }
  int64_t vectors_of_a_task() const { return smaller(vectors(M), rows_for(w.N) / kRowsOfX); }
  int64_t tiles_of_a_task() const { return smaller(tiles_for(vectors_of_a_task() * kRowsOfX * w.K), w.row_tiles()); }
  int64_t tile_groups() const { return ceil_div(w.row_tiles(), tiles_of_a_task()); }
  int64_t totals() const { return kTwoBands * kRowsOfX * vectors_of_a_task(); }  // of a tile
  int64_t tasks() const { return w.band_pairs() * tile_groups() * ceil_div(vectors(M), vectors_of_a_task()); }
  int64_t scratch() const { return kTwoBands * chunk / 2 + tiles_of_a_task() * totals(); }
  int64_t cost() const { return tiles_of_a_task() * kTwoBands * w.K * vectors_of_a_task() * 4; }
};

// x, or x + x * blockdiag(D), in the layout of `ProductTokensBF16`.
struct PrepareTokensBF16 {
  const uint16_t* x;  // [M, K]
  int64_t M, K;
  uint16_t* columns;
  const Blocks* blocks;  // or null
  int64_t chunk;

  static constexpr int64_t kVectors = 8;  // in a task
  static constexpr int64_t kLargestBlock = 256;

  // Whether a chunk of columns consists of whole blocks, of bfloat16, of whole vectors.
  static bool rotates(const Blocks& blocks) {
    return blocks.d.type == DType::bf16 && blocks.b % ProductTokensBF16::kRowsOfX == 0 && kLargestBlock % blocks.b == 0;
  }
  int64_t chunks() const { return ceil_div(K, chunk); }
  // Columns rearranged at a time: what is needed of D stays in the L1 cache.
  int64_t together() const { return blocks ? larger(ProductTokensBF16::kColumns, blocks->b) : chunk; }
  int64_t tasks() const { return chunks() * ceil_div(ProductTokensBF16::vectors(M), kVectors); }
  int64_t scratch() const {
    return blocks ? together() / 2 * (3 * ProductTokensBF16::kRowsOfX + blocks->b) : 0;
  }
  int64_t cost() const {
    return kVectors * ProductTokensBF16::kRowsOfX * chunk * (blocks ? 1 + blocks->b / 4 : 1);
  }
};

// g = dy * W, [M, K], for weights that `ProductBF16::serves`. Rows of W in the bands 2 i and 2 i + 1 that share bytes
// are a pair: pair p is rows p / band_rows * 2 * band_rows + p % band_rows and band_rows on.
struct ProductTransposedBF16 {
  const uint16_t* dy;  // [chunks of kPairs, M, pairs of the chunk, 2]
  Weight w;
  uint16_t* g;  // bfloat16, as dy
  int64_t M;

  static constexpr int64_t kPairs = 288;   // of rows of W decoded at a time, into the L2 cache
  static constexpr int64_t kColumns = 64;  // of W in a task: within one group

  int64_t columns() const { return w.K / kColumns; }
  int64_t tokens() const { return smaller(rows_for(w.K), M); }  // in a task
  int64_t tiles_of_a_task() const { return smaller(tiles_for(tokens() * w.N), columns()); }
  int64_t tile_groups() const { return ceil_div(columns(), tiles_of_a_task()); }
  int64_t tasks() const { return tile_groups() * ceil_div(M, tokens()); }
  int64_t scratch() const { return kColumns * (kPairs + tiles_of_a_task() * tokens()); }
  int64_t cost() const { return tiles_of_a_task() * kColumns * w.N * (tokens() + 4) / 4; }
};

// dy in the layout of `ProductTransposedBF16`.
struct PreparePairsBF16 {
  const uint16_t* dy;  // [M, N]
  int64_t M, N, band_rows;
  uint16_t* pairs;

  static constexpr int64_t kTokens = 128;  // rows of dy in a task

  int64_t chunks() const { return ceil_div(N / 2, ProductTransposedBF16::kPairs); }
  int64_t tasks() const { return chunks() * ceil_div(M, kTokens); }
  int64_t scratch() const { return 0; }
  int64_t cost() const { return 2 * ProductTransposedBF16::kPairs * smaller(kTokens, M); }
};

// D = R - I from skew parameters v [stored, b(b-1)/2]; coefficients[k] multiplies Q^(k + 1); unused by the exact map.
struct Cayley {
  Source v;
  int64_t stored, b, count;  // count: blocks of the result
  const float* coefficients;
  int64_t terms;  // number of coefficients
  bool exact;
  const bool* keep;         // [count] or null
  const double* max_norm;   // or null

  int64_t block() const { return b * padded(b); }
  int64_t parameters() const { return b * (b - 1) / 2; }
};

struct CayleyForward {
  Cayley map;
  Sink d;

  int64_t tasks() const { return map.count; }
  int64_t scratch() const { return 4 * map.block(); }
  int64_t cost() const { return map.b * map.b * map.b * larger(map.terms, 2); }
};

struct CayleyBackward {
  Cayley map;
  Source grad;  // [count, b, b]
  Sink dv;

  int64_t tasks() const { return map.stored; }
  int64_t scratch() const { return (5 + larger(map.terms, 1)) * map.block(); }
  int64_t cost() const { return 3 * map.b * map.b * map.b * larger(map.terms, 2); }
};

// The solver of HQQ's quantizer. W is [groups, group_size] (axis 1) or [group_size, groups] (axis 0).
struct Quantize {
  Source w;
  int64_t elements, group_size, axis;
  float top;  // the largest level
  bool round_zero;
  int64_t iterations;
  float* scale;    // [groups], by which W is multiplied
  float* zeros;    // [iterations + 1, groups]
  double* errors;  // [tasks, iterations], sums of absolute residuals

  static constexpr int64_t kGroups = 16;  // in a task

  int64_t groups() const { return elements / group_size; }
  int64_t tasks() const { return ceil_div(groups(), kGroups); }
  int64_t scratch() const { return kGroups * (2 * group_size + iterations); }
  int64_t cost() const { return kGroups * group_size * (4 + 2 * iterations); }
};

// Levels packed by rows of the same matrix: band by band, the first in the highest bits.
struct PackLevels {
  Source w;
  int64_t elements, group_size, axis, bits;
  float top;
  const float *scale, *zero;                // [groups], the solver's, with which levels are made
  const float *stored_scale, *stored_zero;  // [groups], with which they will be read; all four end with a vector's pad
  void* packed;
  double* errors;  // [tasks, 2], squared error and square of W

  static constexpr int64_t kColumns = 1024;   // in a task, at most
  static constexpr int64_t kElements = 8192;  // packed, about

  int64_t groups() const { return elements / group_size; }
  int64_t rows() const { return axis == 1 ? groups() : group_size; }
  int64_t columns() const { return elements / rows(); }
  int64_t fields() const { return bits == 3 ? 10 : 8 / bits; }
  int64_t packed_rows() const { return ceil_div(rows(), fields()); }
  int64_t column_chunks() const { return ceil_div(columns(), kColumns); }
  int64_t rows_of_a_task() const { return larger(kElements / smaller(columns(), kColumns), 1); }
  int64_t tasks() const { return column_chunks() * ceil_div(packed_rows(), rows_of_a_task()); }
  int64_t scratch() const { return 2 * kColumns; }
  int64_t cost() const { return kElements * fields() * 4; }
};

// Kernels of one instruction set. Each runs tasks begin ... end with `scratch()` floats of its own, 64-byte aligned.
struct Kernels {
  const char* name;
  int64_t tokens_from;   // rows of x from which `product_tokens_bf16` is faster than `product_tile_bf16`
  int64_t tokens_chunk;  // columns that it decodes at a time, at most
  void (*rotate)(const Rotate&, int64_t begin, int64_t end, float* scratch);
  void (*rotate_gradient)(const RotateGradient&, int64_t begin, int64_t end, float* scratch);
  void (*dequantize)(const Dequantize&, int64_t begin, int64_t end, float* scratch);
  void (*product)(const Product&, int64_t begin, int64_t end, float* scratch);
  void (*cayley)(const CayleyForward&, int64_t begin, int64_t end, float* scratch);
  void (*cayley_backward)(const CayleyBackward&, int64_t begin, int64_t end, float* scratch);
  void (*quantize)(const Quantize&, int64_t begin, int64_t end, float* scratch);
  void (*pack_levels)(const PackLevels&, int64_t begin, int64_t end, float* scratch);
  void (*widen)(Source from, float* to, int64_t n);
  void (*narrow)(const float* from, Sink to, int64_t n);
  // Null for instruction sets without a bfloat16 dot product.
  void (*prepare_bf16)(const PrepareBF16&, int64_t begin, int64_t end, float* scratch) = nullptr;
  void (*product_bf16)(const ProductBF16&, int64_t begin, int64_t end, float* scratch) = nullptr;
  void (*prepare_tile_bf16)(const PrepareTileBF16&, int64_t begin, int64_t end, float* scratch) = nullptr;
  void (*product_tile_bf16)(const ProductTileBF16&, int64_t begin, int64_t end, float* scratch) = nullptr;
  void (*prepare_tokens_bf16)(const PrepareTokensBF16&, int64_t begin, int64_t end, float* scratch) = nullptr;
  void (*product_tokens_bf16)(const ProductTokensBF16&, int64_t begin, int64_t end, float* scratch) = nullptr;
  void (*prepare_pairs_bf16)(const PreparePairsBF16&, int64_t begin, int64_t end, float* scratch) = nullptr;
  void (*product_transposed_bf16)(const ProductTransposedBF16&, int64_t begin, int64_t end, float* scratch) = nullptr;
};

}  // namespace hqq_oft::cpu
