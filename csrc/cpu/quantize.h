// HQQ's quantizer: `quantize` of hqq_oft/ops/reference.py, of which this has the same sums in the same order.
//
// Lanes are groups: as many as a register holds are solved at a time, out of the L1 cache. A group's zero point soon stays
// the same from one iteration to the next, which ends that register's work. When to stop is decided for the whole weight,
// from the errors of all iterations; every zero is therefore recorded. Vectors are the compiler's, one source for every
// instruction set, as wide as its registers: GCC scalarizes wider ones. No product is contracted with a sum
// (-ffp-contract=off), so that the bytes do not depend on the processor.
#pragma once

#include "convert.h"
#include "unroll.h"

namespace hqq_oft::cpu::HQQ_OFT_ISA {
namespace {

using Groups = float __attribute__((vector_size(4 * kRegister)));
using GroupBits = int32_t __attribute__((vector_size(4 * kRegister)));
using HalfGroups = float __attribute__((vector_size(2 * kRegister)));
using Doubles = double __attribute__((vector_size(4 * kRegister)));
using DoubleBits = uint64_t __attribute__((vector_size(4 * kRegister)));

constexpr int64_t kGroups = Quantize::kGroups;
constexpr int kParts = kGroups / kRegister;  // registers for one value of each group of a task

inline Groups all(float value) { return Groups{} + value; }
inline Groups least(Groups a, Groups b) { return a < b ? a : b; }
inline Groups most(Groups a, Groups b) { return a > b ? a : b; }
inline Groups magnitude(Groups a) { return reinterpret_cast<Groups>(reinterpret_cast<GroupBits>(a) & 0x7fffffff); }
inline bool any(GroupBits mask) { return any_bit(&mask); }
inline Groups read(const float* from) {
  Groups values;
  __builtin_memcpy(&values, from, sizeof values);
  return values;
}

// The level nearest to u, ties to even, from 0 to `top`: of numbers below 2^22, adding 1.5 * 2^23 leaves no fraction.
inline Groups nearest_level(Groups u, Groups top) {
  constexpr float kNoFraction = 12582912;
  return (least(most(u, Groups{}), top) + kNoFraction) - kNoFraction;
}

// a^-0.3 for positive a, in double precision, rounded once.
inline Groups power(Groups a) {
  constexpr double kTwoOverLn2 = 2.8853900817779268, kLn2 = 0.69314718055994531, kRoot2 = 1.4142135623730951;
  // Integers in the lowest bits of a double: 2^52 more than a positive one, 1.5 * 2^52 more than any.
  constexpr double kInteger = 4503599627370496, kNoFraction = 6755399441055744;
  HalfGroups halves[2];
  __builtin_memcpy(halves, &a, sizeof a);
  for (HalfGroups& half : halves) {
    auto bits = reinterpret_cast<DoubleBits>(__builtin_convertvector(half, Doubles));
    auto m = reinterpret_cast<Doubles>((bits & 0xfffffffffffff) | 0x3ff0000000000000);
    Doubles exponent = reinterpret_cast<Doubles>((bits >> 52) | 0x4330000000000000) - (kInteger + 1023);
    auto high = m > kRoot2;
    m = high ? m * 0.5 : m;
    exponent = high ? exponent + 1 : exponent;
    Doubles s = (m - 1) / (m + 1), s2 = s * s;
    Doubles log = ((((s2 * (1.0 / 11) + 1.0 / 9) * s2 + 1.0 / 7) * s2 + 1.0 / 5) * s2 + 1.0 / 3) * s2 + 1;
    Doubles y = (s * log * kTwoOverLn2 + exponent) * -0.3, shifted = y + kNoFraction, f = (y - (shifted - kNoFraction)) * kLn2;
    Doubles exp = f * (1.0 / 9) + 1;
    for (int i = 8; i > 0; --i) exp = exp * f * (1.0 / i) + 1;
    DoubleBits scale = (reinterpret_cast<DoubleBits>(shifted) + 1023) << 52;
    half = __builtin_convertvector(exp * reinterpret_cast<Doubles>(scale), HalfGroups);
  }
  __builtin_memcpy(&a, halves, sizeof a);
  return a;
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
    if (count < run) continue;  // the others are zero
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
    auto of_row = [&](int64_t i, int r) __attribute__((always_inline)) { return x((i * kRows + r) * kVector + lane); };
    cascade<kRows>(count, of_row, part);
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

// The groups of one task; the last one is repeated if there are fewer. SIZE: of a group, or 0.
template <int SIZE>
class TaskOfGroups {
 public:
  TaskOfGroups(const Quantize& op, int64_t task, float* scratch)
      : op_(op), task_(task), first_(task * kGroups), count_(smaller(kGroups, op.groups() - first_)), w_(scratch),
        t_(w_ + kGroups * size()), errors_(t_ + kGroups * size()) {
    with_type(op.w.type, [&](auto type) { load(static_cast<const typename decltype(type)::type*>(op.w.data)); });
  }

  void solve() {
    for (int64_t part = 0; part * kRegister < count_; ++part) solve(part);
    // In an order that does not depend on the width of registers.
    for (int64_t i = 0; i < op_.iterations; ++i) {
      double sums[kGroups / 2];
      float* errors = errors_ + i * kGroups;
      for (int64_t g = count_; g < kGroups; ++g) errors[g] = 0;
      for (int g = 0; g < kGroups / 2; ++g) sums[g] = static_cast<double>(errors[g]) + errors[g + kGroups / 2];
      for (int n = kGroups / 4; n > 0; n /= 2)
        for (int g = 0; g < n; ++g) sums[g] += sums[g + n];
      op_.errors[task_ * op_.iterations + i] = sums[0];
    }
  }

 private:
  int64_t size() const { return SIZE ? SIZE : op_.group_size; }

  template <class T>
  void load(const T* w) const {
    if (op_.axis == 0) {
      for (int64_t k = 0; k < size(); ++k) {
        float* to = w_ + k * kGroups;
        widen(op_.w.from(k * op_.groups() + first_), to, count_);
        for (int64_t g = count_; g < kGroups; ++g) to[g] = to[count_ - 1];
      }
      return;
    }
    w += first_ * size();
    int64_t k = 0;
    if (count_ == kGroups)
      for (; k + kRegister <= size(); k += kRegister)
        for (int g = 0; g < kGroups; g += kRegister) transpose(w + g * size() + k, size(), w_ + k * kGroups + g, kGroups);
    for (; k < size(); ++k)
      for (int64_t g = 0; g < kGroups; ++g) w_[k * kGroups + g] = float_of(w[smaller(g, count_ - 1) * size() + k]);
  }

  void solve(int64_t part) {
    constexpr float kLeastRange = 1e-4f, kMostScale = 2e4f;  // HQQ's
    const float* w = w_ + part * kRegister;
    Groups low = read(w), high = low;
    for (int64_t k = 1; k < size(); ++k) {
      Groups x = read(w + k * kGroups);
      low = least(low, x), high = most(high, x);
    }
    Groups range = high - low, scale = all(1) / range * op_.top;  // rounded twice, as PyTorch divides a number by a tensor
    scale = least(magnitude(range) <= kLeastRange ? all(1) : scale, all(kMostScale));
    Groups zero = -low * scale;
    if (op_.round_zero)
      for (int g = 0; g < kRegister; ++g) zero[g] = __builtin_rintf(zero[g]);
    for (int64_t k = 0; k < size(); ++k) {
      Groups t = read(w + k * kGroups) * scale;
      __builtin_memcpy(t_ + k * kGroups + part * kRegister, &t, sizeof t);
    }
    keep(op_.scale, part, scale);
    keep(op_.zeros, part, zero);

    // The residual below which HQQ's shrinkage gives 0: e^1.3 = 0.1, and a margin.
    constexpr float kShrunkToZero = 0.16f;
    Groups top = all(op_.top), limit = scale * kShrunkToZero, low_t = low * scale, high_t = high * scale, error;
    bool same = false;
    for (int64_t i = 0; i < op_.iterations; ++i) {
      if (!same) {
        Groups largest = most(all(.5f), most(-(low_t + zero), high_t + zero - top));
        bool shrinks = any(~(largest <= limit));
        Groups next = shrinks ? step<true>(part, scale, zero, error) : step<false>(part, scale, zero, error);
        same = !any(next != zero);
        zero = next;
      }
      __builtin_memcpy(errors_ + i * kGroups + part * kRegister, &error, sizeof error);
      keep(op_.zeros + (i + 1) * op_.groups(), part, zero);
    }
  }

  void keep(float* to, int64_t part, Groups values) const {
    to += first_ + part * kRegister;
    int64_t count = count_ - part * kRegister;
    if (count >= kRegister) {
      __builtin_memcpy(to, &values, sizeof values);
    } else {
      __builtin_memcpy(to, &values, static_cast<size_t>(count) * sizeof(float));
    }
  }

  // The next zero, mean(q - scale * (w - shrunk residual)), and each group's sum of absolute residuals.
  template <bool SHRINKS>
  Groups step(int64_t part, Groups scale, Groups zero, Groups& error) const {
    constexpr float kShrunkToZero = 0.1699f;
    const float *w = w_ + part * kRegister, *t = t_ + part * kRegister;
    Groups top = all(op_.top), sums[2] = {};
    auto term = [&](int64_t k) __attribute__((always_inline)) {
      Groups x = read(t + k * kGroups), u = x + zero, q = nearest_level(u, top);
      sums[k / 8 % 2] += magnitude(u - q);  // the same for either SHRINKS, which the other groups of a register decide
      if constexpr (!SHRINKS) return q - x;
      Groups left = read(w + k * kGroups), residual = left - (q - zero) / scale, size = magnitude(residual);
      if (any(~(size <= kShrunkToZero))) {
        Groups shrunk = most(size - power(size) * 0.1f, Groups{});
        left -= residual < 0.0f ? -shrunk : shrunk;
      }
      return q - left * scale;
    };
    Groups sum = op_.axis == 1 ? sum_of_row(size(), term) : sum_of_column(size(), term);
    error = (sums[0] + sums[1]) / scale;
    return sum / static_cast<float>(size());
  }

  const Quantize& op_;
  int64_t task_, first_, count_;
  float *w_, *t_, *errors_;  // W and W * scale, [group_size, kGroups]; sums of residuals, [iterations, kGroups]
};

void quantize(const Quantize& op, int64_t begin, int64_t end, float* scratch) {
  for (int64_t task = begin; task < end; ++task) {
    if (op.group_size == 64) {
      TaskOfGroups<64>(op, task, scratch).solve();
    } else {
      TaskOfGroups<0>(op, task, scratch).solve();
    }
  }
}

// Levels from W, scale and zero, packed as HQQ does, and the squared error of the weight that they stand for.
void pack_levels(const PackLevels& of, int64_t begin, int64_t end, float* scratch) {
  const PackLevels op = of;  // which no store below can change
  auto words = reinterpret_cast<int32_t*>(scratch);
  float* w = scratch + PackLevels::kColumns;
  const Groups top = all(op.top);
  GroupBits lane;
  for (int g = 0; g < kRegister; ++g) lane[g] = g;
  struct OfGroups {
    Groups scale, zero, stored_scale, stored_zero;
  };
  for (int64_t task = begin; task < end; ++task) {
    int64_t first = task % op.column_chunks() * PackLevels::kColumns;
    int64_t columns = smaller(PackLevels::kColumns, op.columns() - first);
    int64_t row = task / op.column_chunks() * op.rows_of_a_task();
    int64_t last = smaller(row + op.rows_of_a_task(), op.packed_rows());
    Doubles totals[2][2 * kParts] = {};  // of squared errors and of W's squares, by column modulo kGroups
    for (; row < last; ++row) {
      Groups sums[2][kParts] = {};
      for (int64_t i = 0; i < padded(columns); ++i) words[i] = 0;
      for (int64_t field = 0; field < op.fields(); ++field) {
        int64_t of_w = row + field * op.packed_rows();
        if (of_w >= op.rows()) {  // words of ten levels may be more than there are
          for (int64_t i = 0; i < columns; ++i) words[i] <<= op.bits;
          continue;
        }
        widen(op.w.from(of_w * op.columns() + first), w, columns);
        // kGroups columns from i on, of which `count` exist.
        auto pack = [&](int64_t i, int64_t count, auto groups_at) __attribute__((always_inline)) {
          each<kParts>([&](int part) __attribute__((always_inline)) {
            int64_t at = i + part * kRegister;
            OfGroups groups = groups_at(at);
            Groups x = read(w + at), q = nearest_level(x * groups.scale + groups.zero, top);
            Groups difference = x - (q - groups.stored_zero) * groups.stored_scale;
            if (count < kGroups) {
              GroupBits inside = lane < static_cast<int>(count - part * kRegister);
              difference = inside ? difference : Groups{};
              x = inside ? x : Groups{};
            }
            sums[0][part] += difference * difference;
            sums[1][part] += x * x;
            auto word = reinterpret_cast<GroupBits>(read(scratch + at));
            word = word << static_cast<int>(op.bits) | __builtin_convertvector(q, GroupBits);
            __builtin_memcpy(words + at, &word, sizeof word);
          });
        };
        auto pack_row = [&](auto groups_at) __attribute__((always_inline)) {
          int64_t i = 0;
          for (; i + kGroups <= columns; i += kGroups) pack(i, kGroups, groups_at);
          if (i < columns) pack(i, columns - i, groups_at);
        };
        if (op.axis == 1) {
          const OfGroups groups{all(op.scale[of_w]), all(op.zero[of_w]), all(op.stored_scale[of_w]),
                                all(op.stored_zero[of_w])};
          pack_row([&](int64_t) { return groups; });
        } else {
          pack_row([&](int64_t at) {
            at += first;
            return OfGroups{read(op.scale + at), read(op.zero + at), read(op.stored_scale + at),
                            read(op.stored_zero + at)};
          });
        }
      }
      HalfGroups halves[2][2 * kParts];
      __builtin_memcpy(halves, sums, sizeof halves);
      each<2, 2 * kParts>([&](int i, int half) { totals[i][half] += __builtin_convertvector(halves[i][half], Doubles); });
      int64_t to = row * op.columns() + first;
      if (op.bits == 3) {
        __builtin_memcpy(static_cast<int32_t*>(op.packed) + to, words, static_cast<size_t>(4 * columns));
      } else {
        auto bytes = static_cast<uint8_t*>(op.packed) + to;
        for (int64_t i = 0; i < columns; ++i) bytes[i] = static_cast<uint8_t>(words[i]);
      }
    }
    for (int i = 0; i < 2; ++i) {
      double& total = op.errors[2 * task + i];
      total = 0;
      for (const Doubles& part : totals[i])
        for (int g = 0; g < kRegister / 2; ++g) total += part[g];
    }
  }
}

}  // namespace
}  // namespace hqq_oft::cpu::HQQ_OFT_ISA
