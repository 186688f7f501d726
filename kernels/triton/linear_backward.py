"""`g = dy * W` from the same packed bytes, then `dx = g + g * D^T` and `dD_i = x_i^T g_i` in one pass over (x, g).

As in the forward: one launch for small M, else W in bounded scratch and the vendor's GEMM. Here a scratch chunk is a
range of columns, so that each GEMM is complete and no partial sums are added in half precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft._config import scratch_bytes
from hqq_oft.ops.backends import Planner
from hqq_oft.ops.reference import wide_dtype
from hqq_oft.ops.weight import QuantizedWeight

from . import _tiles
from ._launch import Launch, check_device, empty, operand, rows_contiguous, split_buffers, splits_for, wide
from ._pieces import dot, narrow, sum_splits, tile_rows, weight_tile
from .dequantize import Packing, dequantize_into, tensors
from .linear import takes_one_launch
from .rotate import holds_slices, plan_rotate, plan_rotation_gradient

Product = Callable[[Tensor, QuantizedWeight], Tensor]

_COLUMNS = 128  # scratch chunks start at multiples of this


@triton.jit(do_not_specialize=["M"])
def linear_bwd_kernel(
    g_ptr, w_ptr, s_ptr, z_ptr, out_ptr, part_ptr, stamp, M, N, K, band_rows, band_elements, groups, stride_gm,
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
        acc, m_out = sum_splits(acc, part_ptr, stamp, i_tile, i_split, o_out, m_out, size, SPLITS)
    tl.store(out_ptr + o_out, narrow(acc, out_ptr.dtype.element_ty), mask=m_out)


# --- Launchers -------------------------------------------------------------------------------------------------------


def plan_fused_input_gradient(grad: Tensor, weight: QuantizedWeight) -> Product:
    """Of `dy * W` in one launch."""
    M = grad.shape[0]
    tile = _tiles.choose(grad, "linear_backward", M)
    packing = Packing.of(weight)
    K, constants, sizes = packing.K, packing.constants(tile.bk), packing.sizes()
    bn = packing.fit_rows(tile.bn, constants["GROUPS"])
    m_tiles, k_tiles = triton.cdiv(M, tile.bm), triton.cdiv(K, tile.bk)
    splits = splits_for(m_tiles * k_tiles, triton.cdiv(packing.band_rows, packing.tile_rows(bn)), grad)
    launch = Launch(
        linear_bwd_kernel,
        (m_tiles, k_tiles, splits),
        operand(grad.dtype),
        **constants,
        EVEN=K % tile.bk == 0,
        SPLITS=splits,
        BM=tile.bm,
        BN=bn,
        BK=tile.bk,
        ACC=wide(grad.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )

    def fused_input_gradient(grad: Tensor, weight: QuantizedWeight) -> Tensor:
        grad = rows_contiguous(grad)
        g = empty(grad, (M, K))
        part, stamp = split_buffers(grad, splits, (M, K), m_tiles * k_tiles)
        launch(grad, *tensors(weight), g, part, stamp, M, *sizes, grad.stride(0))
        return g

    return fused_input_gradient


@torch.no_grad()
def scratch_input_gradient(grad: Tensor, weight: QuantizedWeight) -> Tensor:
    """`dy * W` by the vendor's GEMM, with W dequantized into scratch one chunk of columns at a time."""
    N, K = weight.shape
    g = empty(grad, (grad.shape[0], K))
    fit = scratch_bytes() // (N * grad.element_size())
    chunk = min(K, max(_COLUMNS, fit // _COLUMNS * _COLUMNS))
    scratch = empty(grad, (N * chunk,))
    for first in range(0, K, chunk):
        end = min(first + chunk, K)
        dense = scratch[: N * (end - first)].view(N, end - first)
        torch.mm(grad, dequantize_into(dense, weight, columns=(first, end)), out=g[:, first:end])
    return g


def plan_linear_backward(
    by_name: bool,
    grad: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    d: Tensor | None,
    adapter_index: Tensor | None,
    need_x: bool,
    need_d: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of `hqq_oft.ops.reference.linear_backward`; M selects the path of `g = dy * W`."""
    check_device(grad, by_name)
    M, K = grad.shape[0], weight.in_features
    product: Product
    if M == 0:
        product = lambda grad, weight: empty(grad, (0, K))  # noqa: E731
    else:
        product = plan_fused_input_gradient(grad, weight) if takes_one_launch(grad) else scratch_input_gradient
    if d is None:
        return lambda grad, x, weight, *_: (product(grad, weight), grad.new_empty(0))
    g_like = empty(grad, (M, K))
    in_place = need_x and need_d and adapter_index is None and holds_slices(x.dtype, d, K)
    back = plan_rotate(True, g_like, d, adapter_index, True) if need_x and not in_place else None
    gradient = plan_rotation_gradient(g_like, x, d, adapter_index, False, in_place) if need_d else None
    accumulator = wide_dtype(x.dtype, d.dtype)

    def linear_backward(
        grad: Tensor,
        x: Tensor,
        weight: QuantizedWeight,
        d: Tensor,
        adapter_index: Tensor | None,
        need_x: bool,
        need_d: bool,
    ) -> tuple[Tensor, Tensor]:
        g = product(grad, weight)
        if gradient is None:
            dd = d.new_empty(0, dtype=accumulator)
        else:
            dd = gradient(g, x, d, adapter_index, g if in_place else None)  # in place: g is ours
        if back is not None:
            return back(g, d, adapter_index, True), dd
        return g if in_place else g.new_empty(0), dd

    return linear_backward


OPERATIONS: dict[str, Planner] = {"linear_backward": plan_linear_backward}
