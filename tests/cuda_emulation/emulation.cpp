// The decode kernel's own source, run thread by thread on a host (see emulated.h), behind a C interface for the tests.
#include "emulated.h"

#include "decode.cuh"
#include "plan.h"

using namespace hqq_oft::cuda;

namespace {

template <class Format, int BITS, int SPAN, int TOKEN_TILES>
void run_blocks(const Plan& plan, const DecodeArguments& a, std::mt19937& random) {
  const int shared = shared_layout(packing_facts(BITS), plan).total;
  std::vector<int> order(plan.bands * plan.splits);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::shuffle(order.begin(), order.end(), random);  // blocks arrive in any order
  for (const int i : order) {
    previous_launch.hide();
    run_block(i % plan.bands, i / plan.bands, plan.warps, shared,
              [&] { decode_kernel<Format, BITS, SPAN, TOKEN_TILES>(a); });
  }
}

template <class Format, int BITS, int SPAN>
void by_tokens(const Plan& plan, const DecodeArguments& a, std::mt19937& random) {
  if constexpr (max_tokens(BITS) > TOKENS) {
    if (plan.token_tiles == 2) return run_blocks<Format, BITS, SPAN, 2>(plan, a, random);
  }
  run_blocks<Format, BITS, SPAN, 1>(plan, a, random);
}

template <class Format, int BITS>
void by_span(const Plan& plan, const DecodeArguments& a, std::mt19937& random) {
  plan.span == 64 ? by_tokens<Format, BITS, 64>(plan, a, random) : by_tokens<Format, BITS, 32>(plan, a, random);
}

template <class Format>
void run(const Problem& problem, const Plan& plan, DecodeArguments a, std::mt19937& random) {
  std::vector<uint16_t>& rotated = previous_launch.written;
  rotated.clear();
  if (plan.chained) {
    rotated.assign(static_cast<size_t>(problem.tokens) * problem.in_features, 0xFFFF);
    for (int i = 0; i < ceil_div(problem.in_features, WARPS * STEP); ++i) {
      run_block(i, 0, WARPS, 0, [&] { rotate_kernel<Format>(a.rotation, rotated.data()); });
    }
    previous_launch.hide();
    a.rotation.x = previous_launch.seen.data();
    a.rotation.x_stride = problem.in_features;
    a.rotation.d = nullptr;
  }
  switch (problem.bits) {
    case 8: by_span<Format, 8>(plan, a, random); break;
    case 4: by_span<Format, 4>(plan, a, random); break;
    case 3: by_span<Format, 3>(plan, a, random); break;
    case 2: by_span<Format, 2>(plan, a, random); break;
    default: by_span<Format, 1>(plan, a, random);
  }
}

}  // namespace

extern "C" {

struct Result {
  Plan plan;
  int shared_bytes;
  int64_t partial_elements, tickets;
};

// The plan for a device, or with `warps` > 0 that plan in particular.
Result plan(const Problem* problem, const Device* device, int warps, int band_tiles, int slice_stages, int chained) {
  const Plan plan = warps > 0 ? make_plan(*problem, warps, band_tiles, slice_stages, chained != 0)
                                   : choose_plan(*problem, *device);
  return {plan, shared_layout(packing_facts(problem->bits), plan).total, partial_elements(*problem, plan),
          ticket_count(plan)};
}

// Runs the plan `repeats` times over the same workspace, each time with another order of threads and blocks. All
// pointers are as in `DecodeArguments`. False with a reason where the emulated machine would have gone wrong.
bool emulate(const Problem* problem, const Plan* plan, int bfloat16, const uint16_t* x, int64_t x_stride,
             const uint16_t* d, int stored_blocks, const int64_t* adapter_index, const uint8_t* packed,
             const uint16_t* scale, const uint16_t* zero, const uint16_t* bias, uint16_t* y, float* partial,
             uint64_t* tickets, int repeats, char* reason) {
  previous_launch.awaited = false;
  DecodeArguments a{};
  a.rotation = {x,  x_stride, d, adapter_index, problem->tokens, problem->in_features, problem->block_size,
                stored_blocks, problem->adapters};
  a.packed = packed;
  a.scale = scale;
  a.zero = zero;
  a.bias = bias;
  a.partial = partial;
  a.tickets = tickets;
  a.stamp = uint64_t{0x5EED} << 16;
  apply_plan(*problem, *plan, &a);
  try {
    for (int repeat = 0; repeat < repeats; ++repeat) {
      std::mt19937 random(repeat);
      block.random.seed(repeat);
      a.y = y + static_cast<int64_t>(repeat) * problem->tokens * problem->out_features;
      bfloat16 != 0 ? run<BFloat16>(*problem, *plan, a, random) : run<Half>(*problem, *plan, a, random);
    }
    if (plan->chained != previous_launch.awaited) throw std::runtime_error("x was read before it was rotated");
  } catch (const std::exception& error) {
    std::strncpy(reason, error.what(), 255);
    return false;
  }
  return true;
}

// Most lanes of one transaction of `bytes` each that meet in a bank when levels are read: 1 where there is no conflict.
int level_conflicts(int bits, int span) {
  const auto count = [](auto packing, int run) {
    using P = decltype(packing);
    const int bytes = run * 4 * P::ELEMENT_BYTES, lanes = 128 / bytes;
    int most = 0;
    for (int step = 0; step < STEPS * P::STAGE_COLUMNS / CHUNK; step += run) {
      for (int first = 0; first < WARP; first += lanes) {
        int banks[32] = {};
        for (int lane = first; lane < first + lanes; ++lane) {
          const int byte = (step / STEPS * CHUNK + fragment_column(lane % 4, step % STEPS, run)) * P::ELEMENT_BYTES;
          const int at = stage_byte(lane / 4, byte / UNIT, P::ROW_BYTES) + byte % UNIT;
          for (int word = 0; word < bytes / 4; ++word) most = std::max(most, ++banks[(at / 4 + word) % 32]);
        }
      }
    }
    return most;
  };
  return bits == 3 ? count(Packing<3>{}, 1) : count(Packing<8>{}, span / STEP);
}

void widen_all(const uint16_t* bits, float* values, int count, int bfloat16) {
  for (int i = 0; i < count; ++i) values[i] = bfloat16 != 0 ? widen<BFloat16>(bits[i]) : widen<Half>(bits[i]);
}

void narrow_all(const float* values, uint16_t* bits, int count, int bfloat16) {
  for (int i = 0; i < count; ++i) {
    bits[i] = static_cast<uint16_t>(bfloat16 != 0 ? narrow<BFloat16>(values[i], 0) : narrow<Half>(values[i], 0));
  }
}

}  // extern "C"
