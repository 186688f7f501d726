// HQQ's quantizer: `quantize` of hqq_oft/ops/reference.py, of which this has the same sums in the same order.
//
// Lanes are groups: sixteen are solved at a time, out of the L1 cache. A group's zero point soon stays the same from one
// iteration to the next, which ends its block. When to stop is decided for the whole weight, from the errors of all
// iterations; every zero is therefore recorded. Vectors are the compiler's, one source for every instruction set, and
// no product is contracted with a sum (-ffp-contract=off), so that the bytes do not depend on the processor.
#pragma once

#include "convert.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

using Groups = float __attribute__((vector_size(64)));
using GroupBits = int32_t __attribute__((vector_size(64)));
using Doubles = double __attribute__((vector_size(128)));
using DoubleBits = int64_t __attribute__((vector_size(128)));
using Bytes = uint8_t __attribute__((vector_size(16)));

constexpr int64_t kGroups = Quantize::kGroups;

inline Groups all(float value) { return Groups{} + value; }
inline Groups least(Groups a, Groups b) { return a < b ? a : b; }
inline Groups most(Groups a, Groups b) { return a > b ? a : b; }
inline Groups magnitude(Groups a) { return reinterpret_cast<Groups>(reinterpret_cast<GroupBits>(a) & 0x7fffffff); }
inline bool any(GroupBits mask) {
  GroupBits none{};
  return __builtin_memcmp(&mask, &none, sizeof mask) != 0;
}

// The level nearest to u, ties to even, from 0 to `top`: of numbers below 2^22, adding 1.5 * 2^23 leaves no fraction.
inline Groups nearest_level(Groups u, Groups top) {
  constexpr float kNoFraction = 12582912;
  return (least(most(u, Groups{}), top) + kNoFraction) - kNoFraction;
}

// a^-0.3 for positive a, in double precision, rounded once.
inline Groups power(Groups a) {
  constexpr double kTwoOverLn2 = 2.8853900817779268, kLn2 = 0.69314718055994531, kRoot2 = 1.4142135623730951;
  constexpr double kNoFraction = 6755399441055744;
  auto bits = reinterpret_cast<DoubleBits>(__builtin_convertvector(a, Doubles));
  auto m = reinterpret_cast<Doubles>((bits & 0xfffffffffffff) | 0x3ff0000000000000);
  auto exponent = __builtin_convertvector((bits >> 52) - 1023, Doubles);
  DoubleBits high = m > kRoot2;
  m = high ? m * 0.5 : m;
  exponent = high ? exponent + 1 : exponent;
  Doubles s = (m - 1) / (m + 1), s2 = s * s;
  Doubles log = ((((s2 / 11 + 1.0 / 9) * s2 + 1.0 / 7) * s2 + 1.0 / 5) * s2 + 1.0 / 3) * s2 + 1;
  Doubles y = (s * log * kTwoOverLn2 + exponent) * -0.3, whole = (y + kNoFraction) - kNoFraction;
  Doubles f = (y - whole) * kLn2, power = f / 9 + 1;
  for (int i = 8; i > 0; --i) power = power * f / i + 1;
  auto scale = (__builtin_convertvector(whole, DoubleBits) + 1023) << 52;
  return __builtin_convertvector(power * reinterpret_cast<Doubles>(scale), Groups);
}

// Adds x(0) ... x(count - 1), where x(i) is ROWS independent terms, in the order of PyTorch's sums: runs of at least
// sixteen, runs of runs, and so on.
template <int ROWS, class F>
inline void cascade(int64_t count, F&& x, Groups (&total)[ROWS]) {
  constexpr int kLevels = 4;
  int power = 0;
  while ((int64_t{1} << power) < count) ++power;
  power = power / kLevels > 4 ? power / kLevels : 4;
  int64_t run = int64_t{1} << power, i = 0;
  Groups sums[kLevels][ROWS] = {};
  while (i + run <= count) {
    for (int64_t end = i + run; i < end; ++i)
      for (int r = 0; r < ROWS; ++r) sums[0][r] += x(i, r);
    for (int level = 1; level < kLevels; ++level) {
      for (int r = 0; r < ROWS; ++r) sums[level][r] += sums[level - 1][r], sums[level - 1][r] = Groups{};
      if (i & ((run - 1) << (level * power))) break;
    }
  }
  for (; i < count; ++i)
    for (int r = 0; r < ROWS; ++r) sums[0][r] += x(i, r);
  for (int r = 0; r < ROWS; ++r) {
    total[r] = sums[0][r];
    for (int level = 1; level < kLevels; ++level) total[r] += sums[level][r];
  }
}

// The sum of x(0) ... x(size - 1) along a row, as PyTorch adds with vectors of eight lanes: four vectors at a time.
template <class F>
inline Groups sum_of_row(int64_t size, F&& x) {
  constexpr int kRows = 4, kVector = 8;
  int64_t vectors = size / kVector, count = vectors / kRows;
  Groups total{};
  for (int64_t k = vectors * kVector; k < size; ++k) total += x(k);
  for (int lane = 0; lane < kVector; ++lane) {
    Groups part[kRows];
    cascade<kRows>(count, [&](int64_t i, int r) { return x((i * kRows + r) * kVector + lane); }, part);
    for (int64_t v = count * kRows; v < vectors; ++v) part[0] += x(v * kVector + lane);
    total += ((part[0] + part[1]) + part[2]) + part[3];
  }
  return total;
}

template <class F>
inline Groups sum_of_column(int64_t size, F&& x) {
  Groups total[1];
  cascade<1>(size, [&](int64_t i, int) { return x(i); }, total);
  return total[0];
}

// One block of groups; the last one is repeated if there are fewer. t is w * scale; SIZE: of a group, or 0.
template <int SIZE>
class BlockOfGroups {
 public:
  BlockOfGroups(const Quantize& op, int64_t block, float* scratch)
      : op_(op), first_(block * kGroups), count_(smaller(kGroups, op.groups() - first_)),
        w_(reinterpret_cast<Groups*>(scratch)), t_(w_ + size()) {
    float* row = scratch + 2 * kGroups * size();
    if (op.axis == 1) {
      for (int64_t g = 0; g < kGroups; ++g) {
        widen(op.w.from((first_ + smaller(g, count_ - 1)) * size()), row, size());
        for (int64_t k = 0; k < size(); ++k) w_[k][g] = row[k];
      }
    } else {
      for (int64_t k = 0; k < size(); ++k) {
        auto to = reinterpret_cast<float*>(w_ + k);
        widen(op.w.from(k * op.groups() + first_), to, count_);
        for (int64_t g = count_; g < kGroups; ++g) to[g] = to[count_ - 1];
      }
    }
  }

  void solve() {
    constexpr float kLeastRange = 1e-4f, kMostScale = 2e4f;  // HQQ's
    Groups low = w_[0], high = w_[0];
    for (int64_t k = 1; k < size(); ++k) low = least(low, w_[k]), high = most(high, w_[k]);
    Groups range = high - low;
    scale_ = all(1) / range * op_.top;  // rounded twice, as PyTorch divides a number by a tensor
    scale_ = least(magnitude(range) <= kLeastRange ? all(1) : scale_, all(kMostScale));
    Groups zero = -low * scale_;
    if (op_.round_zero)
      for (int64_t g = 0; g < kGroups; ++g) zero[g] = __builtin_rintf(zero[g]);
    for (int64_t k = 0; k < size(); ++k) t_[k] = w_[k] * scale_;
    keep(op_.scale, scale_);
    keep(op_.zeros, zero);

    // The residual below which HQQ's shrinkage gives 0: e^1.3 = 0.1, and a margin.
    constexpr float kShrunkToZero = 0.16f;
    Groups top = all(op_.top), limit = scale_ * kShrunkToZero, low_t = low * scale_, high_t = high * scale_;
    double* errors = op_.errors + first_ / kGroups * op_.iterations;
    for (int64_t i = 0; i < op_.iterations; ++i) {
      Groups largest = most(all(.5f), most(-(low_t + zero), high_t + zero - top));
      Groups error{}, next = any(~(largest <= limit)) ? step<true>(zero, error) : step<false>(zero, error);
      errors[i] = 0;
      for (int64_t g = 0; g < count_; ++g) errors[i] += error[g];
      keep(op_.zeros + (i + 1) * op_.groups(), next);
      bool same = !any(next != zero);
      zero = next;
      if (same)
        for (++i; i < op_.iterations; ++i) {
          errors[i] = errors[i - 1];
          keep(op_.zeros + (i + 1) * op_.groups(), zero);
        }
    }
  }

 private:
  int64_t size() const { return SIZE ? SIZE : op_.group_size; }

  void keep(float* to, Groups values) const {
    __builtin_memcpy(to + first_, &values, static_cast<size_t>(count_) * sizeof(float));
  }

  // The next zero, mean(q - scale * (w - shrunk residual)), and each group's sum of absolute residuals.
  template <bool SHRINKS>
  Groups step(Groups zero, Groups& error) const {
    constexpr float kShrunkToZero = 0.1699f;
    Groups top = all(op_.top), even{}, odd{};
    bool is_even = false;
    auto term = [&](int64_t k) __attribute__((always_inline)) {
      Groups u = t_[k] + zero, q = nearest_level(u, top);
      if constexpr (!SHRINKS) {
        Groups residual = magnitude(u - q);
        is_even = !is_even;
        if (is_even) even += residual; else odd += residual;
        return q - t_[k];
      }
      Groups residual = w_[k] - (q - zero) / scale_, size = magnitude(residual), left = w_[k];
      even += size;
      if (any(~(size <= kShrunkToZero))) {
        Groups shrunk = most(size - power(size) * 0.1f, Groups{});
        left -= residual < 0.0f ? -shrunk : shrunk;
      }
      return q - left * scale_;
    };
    Groups sum = op_.axis == 1 ? sum_of_row(size(), term) : sum_of_column(size(), term);
    error = SHRINKS ? even : (even + odd) / scale_;
    return sum / static_cast<float>(size());
  }

  const Quantize& op_;
  int64_t first_, count_;
  Groups *w_, *t_, scale_{};
};

void quantize(const Quantize& op, int64_t begin, int64_t end, float* scratch) {
  for (int64_t block = begin; block < end; ++block) {
    if (op.group_size == 64) {
      BlockOfGroups<64>(op, block, scratch).solve();
    } else {
      BlockOfGroups<0>(op, block, scratch).solve();
    }
  }
}

// Levels from W, scale and zero, packed as HQQ does, and the squared error of the weight that they stand for.
void pack_levels(const PackLevels& op, int64_t begin, int64_t end, float* scratch) {
  auto words = reinterpret_cast<GroupBits*>(scratch);
  float* w = scratch + PackLevels::kColumns;
  const GroupBits lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Groups top = all(op.top);
  for (int64_t task = begin; task < end; ++task) {
    int64_t first = task % op.column_chunks() * PackLevels::kColumns;
    int64_t columns = smaller(PackLevels::kColumns, op.columns() - first), vectors = ceil_div(columns, kGroups);
    int64_t row = task / op.column_chunks() * op.rows_of_a_task();
    int64_t last = smaller(row + op.rows_of_a_task(), op.packed_rows());
    double *error = op.errors + 2 * task, *size = error + 1;
    for (*error = *size = 0; row < last; ++row) {
      for (int64_t i = 0; i < vectors; ++i) words[i] = GroupBits{};
      for (int64_t field = 0; field < op.fields(); ++field) {
        int64_t of_w = row + field * op.packed_rows();
        bool exists = of_w < op.rows();  // words of ten levels may be more than there are
        if (exists) widen(op.w.from(of_w * op.columns() + first), w, columns);
        Groups errors{}, sizes{};
        for (int64_t i = 0; i < vectors; ++i) {
          words[i] <<= static_cast<int>(op.bits);
          if (!exists) continue;
          int64_t group = op.axis == 1 ? of_w : first + i * kGroups;
          auto of_groups = [&](const float* values) {
            Groups v = all(values[group]);
            if (op.axis == 0) __builtin_memcpy(&v, values + group, sizeof v);
            return v;
          };
          Groups x, scale = of_groups(op.scale);
          __builtin_memcpy(&x, w + i * kGroups, sizeof x);
          Groups q = nearest_level(x * scale + of_groups(op.zero), top);
          Groups difference = x - (q - of_groups(op.stored_zero)) * of_groups(op.stored_scale);
          GroupBits inside = lane < static_cast<int>(columns - i * kGroups);
          errors += inside ? difference * difference : Groups{};
          sizes += inside ? x * x : Groups{};
          words[i] |= __builtin_convertvector(q, GroupBits);
        }
        for (int64_t g = 0; g < kGroups; ++g) *error += errors[g], *size += sizes[g];
      }
      int64_t to = row * op.columns() + first;
      for (int64_t i = 0; i < vectors; ++i) {
        int64_t count = smaller(kGroups, columns - i * kGroups);
        if (op.bits == 3) {
          __builtin_memcpy(static_cast<int32_t*>(op.packed) + to + i * kGroups, &words[i], static_cast<size_t>(4 * count));
        } else {
          auto bytes = __builtin_convertvector(words[i], Bytes);
          __builtin_memcpy(static_cast<uint8_t*>(op.packed) + to + i * kGroups, &bytes, static_cast<size_t>(count));
        }
      }
    }
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
