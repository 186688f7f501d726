#define HQQ_OFT_ISA avx512_bf16
#include "../half.h"
#include "../vector_avx512.h"
#include "../kernels.h"
#include "../product_bf16.h"
#include "../rotate_bf16.h"
#include "../rotate_gradient_bf16.h"
#include "../product_tile_bf16.h"
#include "../product_tokens_bf16.h"
#include "../product_transposed_bf16.h"

namespace hqq_oft::cpu {

extern const Kernels avx512_bf16_kernels{
    "avx512_bf16",
    64,
    256,
    avx512_bf16::rotate_bf16,
    avx512_bf16::rotate_gradient_bf16,
    avx512_bf16::dequantize_bf16,
    avx512_bf16::product,
    avx512_bf16::cayley,
    avx512_bf16::cayley_backward,
    avx512_bf16::quantize,
    avx512_bf16::pack_levels,
    avx512_bf16::widen,
    avx512_bf16::narrow,
    avx512_bf16::prepare_bf16,
    avx512_bf16::product_bf16,
    avx512_bf16::prepare_tile_bf16,
    avx512_bf16::product_tile_bf16,
    avx512_bf16::prepare_tokens_bf16,
    avx512_bf16::product_tokens_bf16,
    avx512_bf16::prepare_pairs_bf16,
    avx512_bf16::product_transposed_bf16,
};

}  // namespace hqq_oft::cpu
