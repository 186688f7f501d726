#define HQQ_OFT_ISA amx_bf16
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

extern const Kernels amx_bf16_kernels{
    "amx_bf16",
    8,
    576,
    amx_bf16::rotate_bf16,
    amx_bf16::rotate_gradient_bf16,
    amx_bf16::dequantize_bf16,
    amx_bf16::product,
    amx_bf16::cayley,
    amx_bf16::cayley_backward,
    amx_bf16::quantize,
    amx_bf16::pack_levels,
    amx_bf16::widen,
    amx_bf16::narrow,
    amx_bf16::prepare_bf16,
    amx_bf16::product_bf16,
    amx_bf16::prepare_tile_bf16,
    amx_bf16::product_tile_bf16,
    amx_bf16::prepare_tokens_bf16,
    amx_bf16::product_tokens_bf16,
    amx_bf16::prepare_pairs_bf16,
    amx_bf16::product_transposed_bf16,
};

}  // namespace hqq_oft::cpu
