#define HQQ_OFT_ISA portable
#include "../half.h"
#include "../vector_portable.h"
#include "../kernels.h"

namespace hqq_oft::cpu {

extern const Kernels portable_kernels{
    "portable",
    0,
    0,
    portable::rotate,
    portable::rotate_gradient,
    portable::dequantize,
    portable::product,
    portable::cayley,
    portable::cayley_backward,
    portable::quantize,
    portable::pack_levels,
    portable::widen,
    portable::narrow,
};

}  // namespace hqq_oft::cpu
