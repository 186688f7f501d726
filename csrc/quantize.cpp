// The operator `quantize` of hqq_oft_native for CPU tensors, as in hqq_oft/ops/reference.py.

#include <cmath>
#include <optional>
#include <tuple>

#include "tensors.h"

namespace {

// After how many iterations the solver stops: at the first whose mean error is not less than the one before, compared in
// float32 as HQQ's. The zero of the next iteration is the result.
int64_t iterations_taken(const double* errors, int64_t iterations) {
  float best = INFINITY;
  for (int64_t i = 0; i < iterations; ++i) {
    auto error = static_cast<float>(errors[i]);
    if (!(error < best)) return i + 1;
    best = error;
  }
  return iterations;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize(const Tensor& w_in, int64_t levels, int64_t bits,
                                                            int64_t group_size, int64_t axis, bool round_zero,
                                                            int64_t iterations, ScalarType dtype,
                                                            const std::optional<Tensor>& of_the_whole) {
  STD_TORCH_CHECK(w_in.dim() == 2 && group_size > 0 && w_in.numel() % group_size == 0 && w_in.numel() > 0,
                  "group_size must divide the weight");
  STD_TORCH_CHECK(bits == 8 || bits == 4 || bits == 3 || bits == 2 || bits == 1, "bits must be 8, 4, 3, 2 or 1");
  Tensor w = compact(w_in);
  int64_t elements = w.numel(), groups = elements / group_size, stored = groups + kPad;
  auto top = static_cast<float>(levels - 1);
  Buffer<float> inverse(stored), zeros((iterations + 1) * groups + kPad), read_scale(stored), read_zero(stored);
  Quantize solver{source(w), elements,       group_size,   axis, top, round_zero,
                  iterations, inverse.data(), zeros.data(), nullptr};
  Buffer<double> errors(solver.tasks() * iterations), means(iterations);
  solver.errors = errors.data();
  run(kernels().quantize, solver);
  Tensor error_sums = torch::stable::new_empty(w, {iterations}, ScalarType::Double);
  auto totals = static_cast<double*>(error_sums.mutable_data_ptr());
  for (int64_t i = 0; i < iterations; ++i) {
    totals[i] = 0;
    for (int64_t task = 0; task < solver.tasks(); ++task) totals[i] += errors.data()[task * iterations + i];
    means.data()[i] = totals[i] / static_cast<double>(elements);
  }
  std::optional<Tensor> given;
  if (of_the_whole) given = compact(*of_the_whole);
  const double* decisive = given ? static_cast<const double*>(given->const_data_ptr()) : means.data();
  float* zero = zeros.data() + iterations_taken(decisive, iterations) * groups;

  std::vector<int64_t> shape = axis == 1 ? std::vector<int64_t>{groups, 1} : std::vector<int64_t>{1, groups};
  Tensor scale_out = empty(w, shape, dtype), zero_out = empty(w, shape, dtype);
  for (int64_t g = 0; g < groups; ++g) read_scale.data()[g] = 1 / inverse.data()[g];
  kernels().narrow(read_scale.data(), sink(scale_out), groups);
  kernels().narrow(zero, sink(zero_out), groups);
  kernels().widen(source(scale_out), read_scale.data(), groups);
  kernels().widen(source(zero_out), read_zero.data(), groups);

  PackLevels pack{source(w),         elements,         group_size, axis,   bits, top, inverse.data(), zero,
                  read_scale.data(), read_zero.data(), nullptr,    nullptr};
  STD_TORCH_CHECK(bits == 3 || pack.rows() % pack.fields() == 0, "the rows of levels do not fill whole bytes");
  Tensor packed = empty(w, {pack.packed_rows(), pack.columns()}, bits == 3 ? ScalarType::Int : ScalarType::Byte);
  Buffer<double> squares(2 * pack.tasks());
  pack.packed = packed.mutable_data_ptr();
  pack.errors = squares.data();
  run(kernels().pack_levels, pack);

  Tensor error = torch::stable::new_empty(w, {2}, ScalarType::Double);
  auto sums = static_cast<double*>(error.mutable_data_ptr());
  sums[0] = sums[1] = 0;
  for (int64_t task = 0; task < 2 * pack.tasks(); ++task) sums[task % 2] += squares.data()[task];
  return {packed, scale_out, zero_out, error, error_sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(hqq_oft_native, m) {
  m.def(
      "quantize(Tensor w, int levels, int bits, SymInt group_size, int axis, bool round_zero, int iterations, "
      "ScalarType dtype, Tensor? errors) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(hqq_oft_native, CPU, m) {
  m.impl("quantize", TORCH_BOX(&quantize));
}
