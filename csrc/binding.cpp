// The operators of `hqq_oft_native` for CPU tensors, but for the quantizer: check arguments and call kernels.
//
// Uses only PyTorch's stable ABI, so that one build supports every PyTorch >= 2.10. Arguments and results are those of
// the functions of the same name in hqq_oft/ops/reference.py.

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "tensors.h"

namespace {

// --- Weights ---------------------------------------------------------------------------------------------------------

// The tensors of a weight. Their addresses are read at every call: FSDP frees and allocates storage under a tensor.
struct HeldWeight {
  Tensor packed, scale, zero;
  int64_t N, K, bits, group_size, axis;

  Weight view() const {
    return {packed.const_data_ptr(), source(scale), source(zero), N, K, bits, group_size, axis};
  }
};

HeldWeight hold(const Tensor& packed, const Tensor& scale, const Tensor& zero, int64_t N, int64_t K, int64_t bits,
                int64_t group_size, int64_t axis) {
  STD_TORCH_CHECK(bits == 8 || bits == 4 || bits == 3 || bits == 2 || bits == 1, "bits must be 8, 4, 3, 2 or 1");
  STD_TORCH_CHECK(group_size > 0 && N * K % group_size == 0, "group_size must divide the weight");
  auto plain = [&](const Tensor& t) {
    return compact(scale.scalar_type() == zero.scalar_type() ? t : torch::stable::to(t, ScalarType::Float));
  };
  HeldWeight held{compact(packed), plain(scale), plain(zero), N, K, bits, group_size, axis};
  Weight w = held.view();
  STD_TORCH_CHECK(packed.scalar_type() == (bits == 3 ? ScalarType::Int : ScalarType::Byte), "packed has a wrong dtype");
  STD_TORCH_CHECK(packed.numel() == w.band_elements() && scale.numel() == w.groups() && zero.numel() == w.groups(),
                  "packed, scale and zero do not fit the weight's shape");
  return held;
}

// Weights that are used again and again, by handle: converting eight arguments takes longer than a small product.
class KeptWeights {
 public:
  int64_t add(HeldWeight weight) {
    std::lock_guard<std::mutex> lock(mutex_);
    weights_.emplace(++last_, std::make_shared<const HeldWeight>(std::move(weight)));
    return last_;
  }

  std::shared_ptr<const HeldWeight> find(int64_t handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = weights_.find(handle);
    STD_TORCH_CHECK(found != weights_.end(), "no kept weight has this handle");
    return found->second;
  }

  void remove(int64_t handle) {
    std::shared_ptr<const HeldWeight> last;  // freed outside of the lock
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = weights_.find(handle);
    if (found == weights_.end()) return;
    last = std::move(found->second);
    weights_.erase(found);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const HeldWeight>> weights_;
  int64_t last_ = 0;
};

KeptWeights& kept_weights() {
  static auto* kept = new KeptWeights;  // never destroyed: PyTorch may go first when the process ends
  return *kept;
}

#define WEIGHT                                                                                                         \
  const Tensor &packed, const Tensor &scale, const Tensor &zero, int64_t N, int64_t K, int64_t bits,                   \
      int64_t group_size, int64_t axis
#define HELD_WEIGHT hold(packed, scale, zero, N, K, bits, group_size, axis)

// --- Rotation --------------------------------------------------------------------------------------------------------

// Rows grouped by adapter with a counting sort; rows without an adapter come last.
class GroupedRows {
 public:
  GroupedRows(const std::optional<Tensor>& index, int64_t adapters) : adapters_(index ? adapters : 1) {
    if (!index) return;
    Tensor dense = compact(*index);
    STD_TORCH_CHECK(dense.scalar_type() == ScalarType::Long, "adapter_index must be int64");
    auto adapter = static_cast<const int64_t*>(dense.const_data_ptr());
    int64_t rows = dense.numel();
    auto bucket = [&](int64_t row) { return adapter[row] < 0 || adapter[row] >= adapters ? adapters : adapter[row]; };
    first_.assign(adapters + 2, 0);
    for (int64_t row = 0; row < rows; ++row) ++first_[bucket(row) + 1];
    for (int64_t a = 0; a <= adapters; ++a) first_[a + 1] += first_[a];
    std::vector<int64_t> next(first_.begin(), first_.end() - 1);
    order_.resize(rows);
    for (int64_t row = 0; row < rows; ++row) order_[next[bucket(row)]++] = row;
  }
  RowsByAdapter view() const {
    return first_.empty() ? RowsByAdapter{1, nullptr, nullptr} : RowsByAdapter{adapters_, order_.data(), first_.data()};
  }

 private:
  int64_t adapters_;
  std::vector<int64_t> order_, first_;
};

Blocks blocks_of(const Tensor& d, int64_t K, bool transpose, bool indexed = false) {
  STD_TORCH_CHECK(d.dim() == (indexed ? 4 : 3) && d.size(-2) == d.size(-1), "d must hold square blocks");
  int64_t b = d.size(-1), stored = d.size(-3);
  STD_TORCH_CHECK(b > 0 && K % b == 0 && (stored == 1 || stored == K / b), "d does not fit the features that it rotates");
  return {source(d), K, b, stored, transpose};
}

Tensor rotate(const Tensor& x_in, const Tensor& d, const std::optional<Tensor>& index, bool transpose) {
  Tensor x = with_contiguous_rows(x_in), blocks = compact(d);
  GroupedRows rows(index, index ? d.size(0) : 1);
  STD_TORCH_CHECK(!index || index->numel() == x.size(0), "adapter_index must have an entry per row of x");
  int64_t M = x.size(0), K = x.size(1);
  Tensor y = empty(x, {M, K}, x.scalar_type());
  run(kernels().rotate, Rotate{source(x), sink(y), M, x.stride(0), K,
                               blocks_of(blocks, K, transpose, index.has_value()), rows.view()});
  return y;
}

// dD of left^T * right; with `in_place`, right becomes right + right * blockdiag(D)^T.
Tensor rotation_gradient(const Tensor& left_in, const Tensor& right_in, const Tensor& d,
                         const std::optional<Tensor>& index, bool in_place = false) {
  Tensor blocks = compact(d), left = with_contiguous_rows(left_in), right = with_contiguous_rows(right_in);
  STD_TORCH_CHECK(shape_of(left) == shape_of(right) && left.dim() == 2, "x and its gradient must have one shape");
  GroupedRows rows(index, index ? d.size(0) : 1);
  STD_TORCH_CHECK(!index || index->numel() == left.size(0), "adapter_index must have an entry per row of x");
  RotateGradient op{source(left), source(right), left.stride(0), right.stride(0), left.size(0),
                    blocks_of(blocks, left.size(1), true, index.has_value()), rows.view(),
                    in_place ? right.mutable_data_ptr() : nullptr, nullptr};
  Tensor dd = empty(d, shape_of(d), ScalarType::Float);
  auto out = static_cast<float*>(dd.mutable_data_ptr());
  int64_t n = op.elements(), parts = op.parts();
  Buffer<float> part(parts > 1 ? parts * n : 0);
  op.part = parts > 1 ? part.data() : out;
  run(kernels().rotate_gradient, op);
  if (parts > 1)
    for (int64_t i = 0; i < n; ++i) {
      float total = op.part[i];
      for (int64_t p = 1; p < parts; ++p) total += op.part[p * n + i];
      out[i] = total;
    }
  return dd;
}

std::tuple<Tensor, Tensor> rotate_backward(const Tensor& grad, const Tensor& x, const Tensor& d,
                                           const std::optional<Tensor>& index, bool transpose, bool need_x,
                                           bool need_d) {
  Tensor dx = need_x ? rotate(grad, d, index, !transpose) : empty(grad, {0}, grad.scalar_type());
  if (!need_d) return {dx, empty(d, {0}, ScalarType::Float)};
  return {dx, transpose ? rotation_gradient(grad, x, d, index) : rotation_gradient(x, grad, d, index)};
}

// --- Weights, dense --------------------------------------------------------------------------------------------------

// Rows and columns of W, or of W * blockdiag(D)^T, from (first_row, first_column) on, as many as `out` has.
void dequantize_into(const Tensor& out, WEIGHT, const std::optional<Tensor>& d, int64_t first_row,
                     int64_t first_column) {
  HeldWeight held = HELD_WEIGHT;
  int64_t rows = out.size(0), columns = out.size(1);
  STD_TORCH_CHECK(first_row >= 0 && first_row + rows <= N && first_column >= 0 && first_column + columns <= K &&
                      out.stride(1) == 1,
                  "out must be a window of the weight with contiguous rows");
  Dequantize op{held.view(), sink(out), first_row, rows, first_column, columns, out.stride(0), d.has_value(), {}};
  std::optional<Tensor> blocks;
  if (d) {
    blocks = compact(*d);
    Blocks all = blocks_of(*blocks, K, true);
    STD_TORCH_CHECK(first_column % all.b == 0 && columns % all.b == 0, "the window must hold whole blocks");
    op.blocks = {all.d.from(all.offset(first_column / all.b)), columns, all.b, all.stored == 1 ? 1 : columns / all.b,
                 true};
  }
  run(kernels().dequantize, op);
}

Tensor dequantize(WEIGHT, ScalarType dtype) {
  Tensor out = empty(packed, {N, K}, dtype);
  dequantize_into(out, packed, scale, zero, N, K, bits, group_size, axis, std::nullopt, 0, 0);
  return out;
}

Tensor dequantize_rotate(WEIGHT, const Tensor& d, ScalarType dtype) {
  Tensor out = empty(packed, {N, K}, dtype);
  dequantize_into(out, packed, scale, zero, N, K, bits, group_size, axis, d, 0, 0);
  return out;
}

// --- Product ---------------------------------------------------------------------------------------------------------

// Whether the bfloat16 kernels support the product of x and w.
bool on_bf16_levels(const Tensor& x, const Weight& w) {
  return kernels().product_bf16 && ProductBF16::serves(w, dtype_of(x.scalar_type()));
}

// Number of rows, of `columns` bfloat16 each, to rearrange at a time. Limits the size of the copy; larger is better
// otherwise, because the weight is decoded again for each chunk of rows.
int64_t rows_at_once(int64_t M, int64_t columns) {
  constexpr int64_t kBytes = int64_t{32} << 20, kMost = 2048, kLeast = 128;
  return smaller(M, larger(smaller(kBytes / (2 * columns), kMost) / kLeast * kLeast, kLeast));
}

const uint16_t* bf16_rows(const Tensor& t) { return static_cast<const uint16_t*>(t.const_data_ptr()); }
uint16_t* bf16_results(const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

void multiply_few(const uint16_t* x, int64_t M, const Weight& w, const Source* bias, const Tensor& y) {
  int64_t K = w.K, groups = K / w.group_size;
  Buffer<uint16_t> columns(M * K);
  Buffer<float> sums(M * groups);
  run(kernels().prepare_bf16, PrepareBF16{x, M, K, w.group_size, columns.data(), sums.data()});
  run(kernels().product_bf16, ProductBF16{columns.data(), sums.data(), w, bias, sink(y), M});
}

void multiply_some(const uint16_t* x, int64_t M, const Weight& w, const Source* bias, uint16_t* y) {
  Buffer<uint16_t> columns(M * w.K);
  Buffer<float> sums(M * (w.K / ProductTileBF16::kColumns));
  run(kernels().prepare_tile_bf16, PrepareTileBF16{x, M, w.K, columns.data(), sums.data()});
  run(kernels().product_tile_bf16, ProductTileBF16{columns.data(), sums.data(), w, bias, y, M});
}

void multiply_many(const uint16_t* x, int64_t M, const Blocks* blocks, const Weight& w, const Source* bias,
                   uint16_t* y) {
  int64_t most = rows_at_once(M, w.K);
  int64_t chunk = ProductTokensBF16::chunk_of(w.K, blocks ? blocks->b : 1, kernels().tokens_chunk);
  Buffer<uint16_t> columns(ProductTokensBF16::vectors(most) * ProductTokensBF16::kRowsOfX * w.K);
  for (int64_t m = 0; m < M; m += most) {
    int64_t count = smaller(M - m, most);
    run(kernels().prepare_tokens_bf16, PrepareTokensBF16{x + m * w.K, count, w.K, columns.data(), blocks, chunk});
    run(kernels().product_tokens_bf16, ProductTokensBF16{columns.data(), w, bias, y + m * w.N, count, chunk});
  }
}

Tensor multiply(const Tensor& x, const std::optional<Tensor>& d, const HeldWeight& held,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& index) {
  Weight w = held.view();
  int64_t N = w.N, K = w.K;
  int64_t M = x.size(0);
  STD_TORCH_CHECK(x.size(1) == K, "x does not fit the weight's in-features");
  Tensor y = empty(x, {M, N}, x.scalar_type());
  if (M == 0) return y;
  bool bf16_levels = on_bf16_levels(x, w);
  std::optional<Tensor> compact_d;
  std::optional<Blocks> blocks;  // of a rotation that the product makes as it rearranges x
  if (d && !index && bf16_levels && M >= kernels().tokens_from) {
    compact_d = compact(*d);
    Blocks all = blocks_of(*compact_d, K, false);
    if (PrepareTokensBF16::rotates(all)) blocks = all;
  }
  Tensor rotated = d && !blocks ? rotate(x, *d, index, false) : compact(x);
  std::optional<Tensor> bias_row;
  Source bias_source{};
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == N, "bias must have an entry per out-feature");
    bias_row = compact(*bias);
    bias_source = source(*bias_row);
  }
  const Source* bias_pointer = bias ? &bias_source : nullptr;
  if (bf16_levels) {
    const uint16_t* rows = bf16_rows(rotated);
    if (M < ProductTileBF16::kFrom) {
      multiply_few(rows, M, w, bias_pointer, y);
    } else if (M < kernels().tokens_from) {
      multiply_some(rows, M, w, bias_pointer, bf16_results(y));
    } else {
      multiply_many(rows, M, blocks ? &*blocks : nullptr, w, bias_pointer, bf16_results(y));
    }
  } else {
    Buffer<float> wide(M * K);
    kernels().widen(source(rotated), wide.data(), M * K);
    run(kernels().product, Product{wide.data(), w, bias_pointer, sink(y), M});
  }
  return y;
}

Tensor linear(const Tensor& x, const std::optional<Tensor>& d, WEIGHT, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& index) {
  return multiply(x, d, HELD_WEIGHT, bias, index);
}

Tensor linear_kept(const Tensor& x, const std::optional<Tensor>& d, int64_t handle, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& index) {
  return multiply(x, d, *kept_weights().find(handle), bias, index);
}

// A handle for `linear_kept` until `release_weight`; 0 if the kernels need a copy of a part, which would grow stale.
int64_t keep_weight(WEIGHT) {
  HeldWeight held = HELD_WEIGHT;
  bool same = packed.is_contiguous() && scale.is_contiguous() && zero.is_contiguous() &&
              scale.scalar_type() == zero.scalar_type();
  return same ? kept_weights().add(std::move(held)) : 0;
}

void release_weight(int64_t handle) { kept_weights().remove(handle); }

// g = dy * W.
Tensor multiply_transposed(const Tensor& dy, const HeldWeight& held) {
  Weight w = held.view();
  int64_t N = w.N, K = w.K, M = dy.size(0), band_rows = N / w.fields();
  STD_TORCH_CHECK(dy.size(1) == N, "dy does not fit the weight's out-features");
  STD_TORCH_CHECK(on_bf16_levels(dy, w), "packed product not supported for these arguments; check `multiplies_packed`");
  Tensor g = empty(dy, {M, K}, dy.scalar_type()), rows = compact(dy);
  int64_t most = rows_at_once(M, N);
  Buffer<uint16_t> pairs(most * N);
  for (int64_t m = 0; m < M; m += most) {
    int64_t count = smaller(M - m, most);
    run(kernels().prepare_pairs_bf16, PreparePairsBF16{bf16_rows(rows) + m * N, count, N, band_rows, pairs.data()});
    run(kernels().product_transposed_bf16,
        ProductTransposedBF16{pairs.data(), w, bf16_results(g) + m * K, count});
  }
  return g;
}

Tensor linear_transposed(const Tensor& dy, WEIGHT) { return multiply_transposed(dy, HELD_WEIGHT); }

// dD of y = x * R, and dx in place of its gradient g.
Tensor rotate_backward_in_place(const Tensor& g, const Tensor& x, const Tensor& d, const std::optional<Tensor>& index) {
  STD_TORCH_CHECK(g.is_contiguous(), "g must be contiguous");
  return rotation_gradient(x, g, d, index, true);
}

// Both gradients of the rotated product, dx in place of g = dy * W.
std::tuple<Tensor, Tensor> linear_backward_kept(const Tensor& dy, const Tensor& x, const Tensor& d, int64_t handle,
                                                const std::optional<Tensor>& index) {
  Tensor g = multiply_transposed(dy, *kept_weights().find(handle));
  return {g, rotate_backward_in_place(g, x, d, index)};
}

// Whether `linear` and `linear_transposed` multiply packed weights for any number of rows of x's dtype.
bool multiplies_packed(const Tensor& x, int64_t N, int64_t K, int64_t bits, int64_t group_size, int64_t axis) {
  return on_bf16_levels(x, Weight{nullptr, {}, {}, N, K, bits, group_size, axis});
}

// --- Cayley ----------------------------------------------------------------------------------------------------------

// Coefficients of Q, Q^2, ... in D: `series_coefficients` of the reference.
std::vector<float> series_coefficients(std::optional<int64_t> terms) {
  if (!terms) return {};
  if (*terms < 3) return std::vector<float>(*terms - 1, 2);
  std::vector<float> coefficients(larger(*terms, 4) - 1, 2);
  coefficients.back() = 1;
  return coefficients;
}

struct HeldCayley {
  Tensor v;
  std::optional<Tensor> keep;
  std::optional<double> max_norm;
  std::vector<float> coefficients;
  bool exact;

  HeldCayley(const Tensor& v_in, std::optional<int64_t> terms, const std::optional<Tensor>& keep_in,
             std::optional<double> max_norm_in)
      : v(compact(v_in)), max_norm(max_norm_in), coefficients(series_coefficients(terms)), exact(!terms) {
    if (!keep_in) return;
    STD_TORCH_CHECK(keep_in->scalar_type() == ScalarType::Bool, "keep must be bool");
    keep = compact(*keep_in);
  }
  int64_t count() const { return keep ? keep->numel() : v.size(0); }
  Cayley view(int64_t b) const {
    STD_TORCH_CHECK(v.size(1) == b * (b - 1) / 2, "v does not fit the block size");
    STD_TORCH_CHECK(!keep || v.size(0) == 1 || v.size(0) == count(), "keep must have an entry per block");
    return {source(v), v.size(0), b, count(), coefficients.data(), static_cast<int64_t>(coefficients.size()), exact,
            keep ? static_cast<const bool*>(keep->const_data_ptr()) : nullptr, max_norm ? &*max_norm : nullptr};
  }
};

Tensor cayley(const Tensor& v, int64_t b, std::optional<int64_t> terms, const std::optional<Tensor>& keep,
              std::optional<double> max_norm, ScalarType dtype) {
  HeldCayley held(v, terms, keep, max_norm);
  Tensor d = empty(v, {held.count(), b, b}, dtype);
  run(kernels().cayley, CayleyForward{held.view(b), sink(d)});
  return d;
}

Tensor cayley_backward(const Tensor& grad_in, const Tensor& v, int64_t b, std::optional<int64_t> terms,
                       const std::optional<Tensor>& keep, std::optional<double> max_norm) {
  HeldCayley held(v, terms, keep, max_norm);
  Tensor grad = compact(grad_in), dv = empty(v, shape_of(v), v.scalar_type());
  STD_TORCH_CHECK(grad.numel() == held.count() * b * b, "grad must have the shape of D");
  run(kernels().cayley_backward, CayleyBackward{held.view(b), source(grad), sink(dv)});
  return dv;
}

// --- Instruction set -------------------------------------------------------------------------------------------------

std::string instruction_sets() {
  std::string names;
  for (const Kernels* each : available()) names += (names.empty() ? "" : ", ") + std::string(each->name);
  return names;
}

std::string instruction_set() { return kernels().name; }

bool select_instruction_set(std::string name) { return select(name); }

}  // namespace

#define WEIGHT_SCHEMA \
  "Tensor packed, Tensor scale, Tensor zero, SymInt out_features, SymInt in_features, int bits, SymInt group_size, " \
  "int axis"

// The schemas of hqq_oft/ops/table.py, and additional operators of this library.
STABLE_TORCH_LIBRARY(hqq_oft_native, m) {
  m.def("cayley(Tensor v, int block_size, int? terms, Tensor? keep, float? max_norm, ScalarType dtype) -> Tensor");
  m.def("cayley_backward(Tensor grad, Tensor v, int block_size, int? terms, Tensor? keep, float? max_norm) -> Tensor");
  m.def("rotate(Tensor x, Tensor d, Tensor? adapter_index, bool transpose) -> Tensor");
  m.def(
      "rotate_backward(Tensor grad, Tensor x, Tensor d, Tensor? adapter_index, bool transpose, bool need_x, "
      "bool need_d) -> (Tensor, Tensor)");
  m.def("dequantize(" WEIGHT_SCHEMA ", ScalarType dtype) -> Tensor");
  m.def("dequantize_rotate(" WEIGHT_SCHEMA ", Tensor d, ScalarType dtype) -> Tensor");
  m.def("linear(Tensor x, Tensor? d, " WEIGHT_SCHEMA ", Tensor? bias, Tensor? adapter_index) -> Tensor");
  m.def("linear_kept(Tensor x, Tensor? d, int handle, Tensor? bias, Tensor? adapter_index) -> Tensor");
  m.def("linear_backward_kept(Tensor dy, Tensor x, Tensor d, int handle, Tensor? adapter_index) -> (Tensor, Tensor)");
  m.def("keep_weight(" WEIGHT_SCHEMA ") -> int");
  m.def("release_weight(int handle) -> ()");
  m.def("linear_transposed(Tensor dy, " WEIGHT_SCHEMA ") -> Tensor");
  m.def(
      "multiplies_packed(Tensor x, SymInt out_features, SymInt in_features, int bits, SymInt group_size, int axis) -> "
      "bool");
  m.def("dequantize_into(Tensor(a!) out, " WEIGHT_SCHEMA ", Tensor? d, int first_row, int first_column) -> ()");
  m.def("rotate_backward_in_place(Tensor(a!) g, Tensor x, Tensor d, Tensor? adapter_index) -> Tensor");
  m.def("instruction_sets() -> str");
  m.def("instruction_set() -> str");
  m.def("select_instruction_set(str name) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(hqq_oft_native, CPU, m) {
  m.impl("cayley", TORCH_BOX(&cayley));
  m.impl("cayley_backward", TORCH_BOX(&cayley_backward));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("rotate_backward", TORCH_BOX(&rotate_backward));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("dequantize_rotate", TORCH_BOX(&dequantize_rotate));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_kept", TORCH_BOX(&linear_kept));
  m.impl("linear_backward_kept", TORCH_BOX(&linear_backward_kept));
  m.impl("keep_weight", TORCH_BOX(&keep_weight));
  m.impl("linear_transposed", TORCH_BOX(&linear_transposed));
  m.impl("multiplies_packed", TORCH_BOX(&multiplies_packed));
  m.impl("dequantize_into", TORCH_BOX(&dequantize_into));
  m.impl("rotate_backward_in_place", TORCH_BOX(&rotate_backward_in_place));
}

STABLE_TORCH_LIBRARY_IMPL(hqq_oft_native, CompositeExplicitAutograd, m) {
  m.impl("release_weight", TORCH_BOX(&release_weight));
  m.impl("instruction_sets", TORCH_BOX(&instruction_sets));
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("select_instruction_set", TORCH_BOX(&select_instruction_set));
}
