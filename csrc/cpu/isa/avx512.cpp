#define HQQ_OFT_ISA avx512
#include "../half.h"
#include "../vector_avx512.h"
#include "../kernels.h"

namespace hqq_oft::cpu {

extern const Kernels avx512_kernels{
    "avx512",
    0,
    0,
    avx512::rotate,
    avx512::rotate_gradient,
    avx512::dequantize,
    avx512::product,
    avx512::cayley,
    avx512::cayley_backward,
    avx512::quantize,
    avx512::pack_levels,
    avx512::widen,
    avx512::narrow,
};

}  // namespace hqq_oft::cpu
