#define HQQ_OFT_ISA avx2
#include "../half.h"
#include "../vector_avx2.h"
#include "../kernels.h"

namespace hqq_oft::cpu {

extern const Kernels avx2_kernels{
    "avx2",
    0,
    0,
    avx2::rotate,
    avx2::rotate_gradient,
    avx2::dequantize,
    avx2::product,
    avx2::cayley,
    avx2::cayley_backward,
    avx2::quantize,
    avx2::pack_levels,
    avx2::widen,
    avx2::narrow,
};

}  // namespace hqq_oft::cpu
