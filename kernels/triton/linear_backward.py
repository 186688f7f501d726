"""`g = dy * W` from the same packed bytes, then `dx = g + g * D^T` and `dD_i = x_i^T g_i` in one pass over (x, g).

As in the forward: one launch for small M, else W in bounded scratch and the vendor's GEMM. Here a scratch chunk is a
range of columns, so that each GEMM is complete and no partial sums are added in half precision.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft._config import scratch_bytes
from hqq_oft.ops.reference import wide_dtype

from . import _tiles
from ._launch import check_device, empty, on_device, product_precision, rows_contiguous, split_buffers, splits_for, wide
from ._pieces import dot, narrow, sum_splits, tile_rows, weight_tile
from .dequantize import Packed, dequantize_into
from .linear import takes_one_launch
from .rotate import holds_slices, rotate, rotation_gradient

_COLUMNS = 128  # scratch chunks start at multiples of this


@triton.jit(do_not_specialize=["M"])
def linear_bwd_kernel(
    g_ptr, w_ptr, s_ptr, z_ptr, out_ptr, part_ptr, count_ptr, M, N, K, band_rows, band_elements, groups, stride_gm,
    BITS: tl.constexpr, FIELDS: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, BANDED: tl.constexpr,
    ALIGNED: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BK] of `dy * W` over one of SPLITS parts of N. Grid: (tiles of rows, tiles of columns, SPLITS)."""
    i_m, i_k, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    TILE_ROWS: tl.constexpr = BN // FIELDS if BANDED else BN
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    k0 = i_k * BK
    o_k = k0 + tl.arange(0, BK)
    m_k = tl.full((BK,), True, tl.int1) if EVEN else o_k < K
    steps = tl.cdiv(band_rows, TILE_ROWS)
    steps_per_split = tl.cdiv(steps, SPLITS)
    acc = tl.zeros((BM, BK), ACC)
    for i_n in range(i_split * steps_per_split, tl.minimum((i_split + 1) * steps_per_split, steps)):
        start = i_n * TILE_ROWS
        o_n, m_n = tile_rows(start, band_rows, band_rows, FIELDS, BANDED, BN)
        p_g = g_ptr + o_m[:, None].to(tl.int64) * stride_gm + o_n[None, :]
        g = tl.load(p_g, mask=m_m[:, None] & m_n[None, :], other=0.0)
        w = weight_tile(
            w_ptr, s_ptr, z_ptr, start, band_rows, o_n, m_n, o_k, m_k, k0, N, K, band_rows, band_elements, groups,
            BITS, FIELDS, GROUP, AXIS, BANDED, ALIGNED, GROUPS, BN, BK, ACC,
        )  # fmt: skip
        acc = dot(g, narrow(w, g.dtype), acc, PRECISION)
    o_out = o_m[:, None].to(tl.int64) * K + o_k[None, :]
    m_out = m_m[:, None] & m_k[None, :]
    if SPLITS > 1:
        i_tile = i_m * tl.num_programs(1) + i_k
        size = M.to(tl.int64) * K
        acc, m_out = sum_splits(acc, part_ptr, count_ptr, i_tile, i_split, o_out, m_out, size, SPLITS)
    tl.store(out_ptr + o_out, narrow(acc, out_ptr.dtype.element_ty), mask=m_out)


# --- Launchers -------------------------------------------------------------------------------------------------------


def fused_input_gradient(grad: Tensor, weight: Packed) -> Tensor:
    """`dy * W` in one launch."""
    M = grad.shape[0]
    grad = rows_contiguous(grad)
    tile = _tiles.choose(grad, "linear_backward", M)
    g = empty(grad, (M, weight.K))
    constants = weight.constants(tile.bk)
    bn = weight.fit_rows(tile.bn, constants["GROUPS"])
    m_tiles, k_tiles = triton.cdiv(M, tile.bm), triton.cdiv(weight.K, tile.bk)
    splits = splits_for(m_tiles * k_tiles, triton.cdiv(weight.band_rows, weight.tile_rows(bn)), grad)
    accumulator = wide(grad.dtype)
    part, count = split_buffers(grad, splits, (M, weight.K), m_tiles * k_tiles)
    with on_device(grad):
        linear_bwd_kernel[(m_tiles, k_tiles, splits)](
            grad, weight.packed, weight.scale, weight.zero, g, part, count, M, *weight.sizes(), grad.stride(0),
            **constants, EVEN=weight.K % tile.bk == 0, SPLITS=splits, BM=tile.bm, BN=bn, BK=tile.bk,
            ACC=accumulator, PRECISION=product_precision(accumulator), enable_fp_fusion=True,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return g


@torch.no_grad()
def scratch_input_gradient(grad: Tensor, weight: Packed) -> Tensor:
    """`dy * W` by the vendor's GEMM, with W dequantized into scratch one chunk of columns at a time."""
    g = empty(grad, (grad.shape[0], weight.K))
    fit = scratch_bytes() // (weight.N * grad.element_size())
    chunk = min(weight.K, max(_COLUMNS, fit // _COLUMNS * _COLUMNS))
    scratch = empty(grad, (weight.N * chunk,))
    for first in range(0, weight.K, chunk):
        end = min(first + chunk, weight.K)
        dense = scratch[: weight.N * (end - first)].view(weight.N, end - first)
        torch.mm(grad, dequantize_into(dense, weight, columns=(first, end)), out=g[:, first:end])
    return g


def linear_backward(
    grad: Tensor, x: Tensor, d: Tensor | None, packed: Tensor, scale: Tensor, zero: Tensor, out_features: int,
    in_features: int, bits: int, group_size: int, axis: int, adapter_index: Tensor | None, need_x: bool, need_d: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`hqq_oft.ops.reference.linear_backward`; M selects the path."""
    check_device(grad)
    weight = Packed.of(packed, scale, zero, out_features, in_features, bits, group_size, axis)
    M = grad.shape[0]
    if M == 0:
        g = empty(grad, (0, in_features))
    elif takes_one_launch(grad):
        g = fused_input_gradient(grad, weight)
    else:
        g = scratch_input_gradient(grad, weight)
    if d is None:
        return g, g.new_empty(0)
    if not need_d:
        dx = rotate(g, d, adapter_index, True) if need_x else g.new_empty(0)
        return dx, d.new_empty(0, dtype=wide_dtype(x.dtype, d.dtype))
    if not need_x:
        return g.new_empty(0), rotation_gradient(g, x, d, adapter_index, False, None)
    if adapter_index is None and holds_slices(x.dtype, d, in_features):
        return g, rotation_gradient(g, x, d, None, False, g)  # in place: g was allocated here
    dd = rotation_gradient(g, x, d, adapter_index, False, None)
    return rotate(g, d, adapter_index, True), dd


OPERATIONS: dict[str, Any] = {"linear_backward": linear_backward}
