"""Block rotation of rows: `x + x * blockdiag(D)`, its transpose, and its gradients in one pass over (x, g).

Forward: reads x and writes y, 2 M K elements, and reads D, b K elements, once per tile of rows; 2 M K b operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft.ops.backends import Planner
from hqq_oft.ops.reference import wide_dtype

from . import _tiles
from ._launch import Launch, adapters, check_device, empty, operand, optional, rows_contiguous, splits_for, wide
from ._pieces import dot, narrow, rotation_tile

_NARROWEST_SLICE = 32

Rotate = Callable[[Tensor, Tensor, Tensor | None, bool], Tensor]


@triton.jit(do_not_specialize=["M"])
def rotate_fwd_kernel(
    x_ptr, d_ptr, index_ptr, y_ptr, M, K, stride_xm, stride_da, adapters,
    B: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, TRANSPOSE: tl.constexpr, INDEXED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`y = x + x * blockdiag(D)` for BM rows and BN columns of one slice of WIDTH columns (whole blocks).

    Grid: (tiles of rows, slices, tiles of columns of a slice). Products in OPERAND, sums in ACC, one rounding.
    """
    i_m, i_slice = tl.program_id(0), tl.program_id(1)
    o_m = i_m * BM + tl.arange(0, BM)
    o_j = tl.program_id(2) * BN + tl.arange(0, BN)
    m_m = o_m < M
    p_x = x_ptr + o_m[:, None].to(tl.int64) * stride_xm + i_slice * WIDTH
    m_j = (o_j < WIDTH) & (i_slice * WIDTH + o_j < K)
    x = tl.load(p_x + o_j[None, :], mask=m_m[:, None] & m_j[None, :], other=0.0)
    y = x.to(ACC)
    for start in range(0, WIDTH, BK):
        o_i = start + tl.arange(0, BK)
        m_i = (o_i < WIDTH) & (i_slice * WIDTH + o_i < K)
        x_i = tl.load(p_x + o_i[None, :], mask=m_m[:, None] & m_i[None, :], other=0.0).to(OPERAND)
        if INDEXED:
            adapter = tl.load(index_ptr + o_m, mask=m_m, other=-1).to(tl.int32)
            p_d = d_ptr
            for a in range(adapters):
                if tl.max((adapter == a).to(tl.int32), 0) > 0:
                    d = rotation_tile(p_d, i_slice, o_i, o_j, K, B, WIDTH, SHARED, TRANSPOSE).to(OPERAND)
                    y = dot(tl.where((adapter == a)[:, None], x_i, 0.0).to(OPERAND), d, y, PRECISION)
                p_d += stride_da
        else:
            d = rotation_tile(d_ptr, i_slice, o_i, o_j, K, B, WIDTH, SHARED, TRANSPOSE).to(OPERAND)
            y = dot(x_i, d, y, PRECISION)
    p_y = y_ptr + o_m[:, None].to(tl.int64) * K + (i_slice * WIDTH + o_j)[None, :]
    tl.store(p_y, narrow(y, y_ptr.dtype.element_ty), mask=m_m[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_split"])
def rotate_bwd_kernel(
    g_ptr, x_ptr, d_ptr, index_ptr, dx_ptr, part_ptr, M, K, stride_gm, stride_xm, stride_dxm, rows_per_split,
    B: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, TRANSPOSE: tl.constexpr, INDEXED: tl.constexpr,
    NEED_X: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dD_i = x_i^T g_i` over one split of the rows, [BI, BJ] of one slice; with NEED_X also `dx = g + g * D^T`.

    With TRANSPOSE the rotation was by D^T: `dD_i = g_i^T x_i`, `dx = g + g * D`. NEED_X requires a tile of the whole
    slice, so that the rows of `g` are read once; `dx` may alias `g`.

    Grid: (slices * TILES * TILES, splits, adapters). `part_ptr`: [splits, adapters, K / B, B, B].
    """
    i_tile, i_split, i_a = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_slice = i_tile // (TILES * TILES)
    o_i = (i_tile // TILES % TILES) * BI + tl.arange(0, BI)
    o_j = (i_tile % TILES) * BJ + tl.arange(0, BJ)
    m_i, m_j = (o_i < WIDTH) & (i_slice * WIDTH + o_i < K), (o_j < WIDTH) & (i_slice * WIDTH + o_j < K)
    o_ki, o_kj = i_slice * WIDTH + o_i, i_slice * WIDTH + o_j
    if NEED_X:
        d = rotation_tile(d_ptr, i_slice, o_i, o_j, K, B, WIDTH, SHARED, not TRANSPOSE).to(OPERAND)
    acc = tl.zeros((BI, BJ), ACC)
    for start in range(i_split * rows_per_split, tl.minimum((i_split + 1) * rows_per_split, M), BM):
        o_m = start + tl.arange(0, BM)
        m_m = o_m < M
        o_rows = o_m[:, None].to(tl.int64)
        if TRANSPOSE:
            left = tl.load(g_ptr + o_rows * stride_gm + o_ki[None, :], mask=m_m[:, None] & m_i[None, :], other=0.0)
            right = tl.load(x_ptr + o_rows * stride_xm + o_kj[None, :], mask=m_m[:, None] & m_j[None, :], other=0.0)
        else:
            left = tl.load(x_ptr + o_rows * stride_xm + o_ki[None, :], mask=m_m[:, None] & m_i[None, :], other=0.0)
            right = tl.load(g_ptr + o_rows * stride_gm + o_kj[None, :], mask=m_m[:, None] & m_j[None, :], other=0.0)
        if NEED_X:
            g = left if TRANSPOSE else right
            dx = dot(g.to(OPERAND), d, g.to(ACC), PRECISION)
            p_dx = dx_ptr + o_rows * stride_dxm + o_kj[None, :]
            tl.store(p_dx, narrow(dx, dx_ptr.dtype.element_ty), mask=m_m[:, None] & m_j[None, :])
        if INDEXED:
            adapter = tl.load(index_ptr + o_m, mask=m_m, other=-1)
            left = tl.where((adapter == i_a)[:, None], left, 0.0).to(left.dtype)
        acc = dot(tl.trans(left.to(OPERAND)), right.to(OPERAND), acc, PRECISION)
    block = i_slice.to(tl.int64) * (WIDTH // B) + o_i // B
    i_part = i_split.to(tl.int64) * tl.num_programs(2) + i_a
    p_part = part_ptr + i_part * (K * B) + block[:, None] * (B * B) + (o_i % B)[:, None] * B + (o_j % B)[None, :]
    tl.store(p_part, acc, mask=m_i[:, None] & m_j[None, :] & (o_i[:, None] // B == o_j[None, :] // B))


# --- Launchers -------------------------------------------------------------------------------------------------------


def slice_width(block_size: int, features: int) -> int:
    """Columns that one program rotates: whole blocks, at least 32 columns if x has that many."""
    return block_size * max(1, min(_NARROWEST_SLICE, features) // block_size)


def holds_slices(dtype: torch.dtype, d: Tensor, features: int) -> bool:
    """Whether a slice of rows of `dtype` and its rotation fit one tile; wider blocks are split into tiles."""
    halves = dtype == d.dtype and dtype.itemsize == 2
    return slice_width(d.shape[-1], features) <= (128 if halves else 64)


def plan_rotate(by_name: bool, x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool) -> Rotate:
    """Of `hqq_oft.ops.reference.rotate`."""
    check_device(x, by_name)
    M, K = x.shape
    if x.numel() == 0:
        return lambda x, d, adapter_index, transpose: empty(x, (M, K))
    b, width = d.shape[-1], slice_width(d.shape[-1], K)
    tile = _tiles.choose(x, "rotate", M)
    halves = x.element_size() == d.element_size() == 2
    bm, bn, bk = (tile.bm, tile.bn, tile.bk) if halves else (max(16, tile.bm // 2), tile.bn, tile.bk // 2)
    if holds_slices(x.dtype, d, K):
        bn = bk = max(16, triton.next_power_of_2(width))
    operands = operand(x.dtype, d.dtype)
    launch = Launch(
        rotate_fwd_kernel,
        (triton.cdiv(M, bm), triton.cdiv(K, width), triton.cdiv(width, bn)),
        operands,
        B=b,
        WIDTH=width,
        SHARED=d.shape[-3] == 1,
        TRANSPOSE=transpose,
        INDEXED=adapter_index is not None,
        BM=bm,
        BN=bn,
        BK=bk,
        ACC=wide(x.dtype, d.dtype),
        OPERAND=operands,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )

    def rotate(x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool) -> Tensor:
        y = empty(x, (M, K))
        x, d = rows_contiguous(x), d.contiguous()
        launch(x, d, optional(adapter_index, x), y, M, K, x.stride(0), *adapters(d, adapter_index))
        return y

    return rotate


def rotate(x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool) -> Tensor:
    """`hqq_oft.ops.reference.rotate`, planned for this call only."""
    return plan_rotate(True, x, d, adapter_index, transpose)(x, d, adapter_index, transpose)


def plan_rotate_backward(
    by_name: bool,
    grad: Tensor,
    x: Tensor,
    d: Tensor,
    adapter_index: Tensor | None,
    transpose: bool,
    need_x: bool,
    need_d: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Of `hqq_oft.ops.reference.rotate_backward`."""
    check_device(grad, by_name)
    one_pass = need_x and need_d and adapter_index is None and holds_slices(x.dtype, d, x.shape[1])
    back = plan_rotate(True, grad, d, adapter_index, not transpose) if need_x and not one_pass else None
    gradient = plan_rotation_gradient(grad, x, d, adapter_index, transpose, one_pass) if need_d else None
    accumulator = wide_dtype(x.dtype, d.dtype)

    def rotate_backward(
        grad: Tensor, x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool, need_x: bool, need_d: bool
    ) -> tuple[Tensor, Tensor]:
        dx = empty(grad, tuple(grad.shape)) if one_pass else grad.new_empty(0)
        if back is not None:
            dx = back(grad, d, adapter_index, not transpose)
        if gradient is None:
            return dx, d.new_empty(0, dtype=accumulator)
        return dx, gradient(grad, x, d, adapter_index, dx if one_pass else None)

    return rotate_backward


def plan_rotation_gradient(
    grad: Tensor, x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool, need_x: bool
) -> Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """Of `dD`, shaped as `d`, in float32 or wider, from (grad, x, d, adapter_index, dx); `need_x` also fills dx.

    `dx` may be `grad`; it requires a tile that holds whole slices (`holds_slices`) and no `adapter_index`.
    """
    M, K = x.shape
    b, width = d.shape[-1], slice_width(d.shape[-1], K)
    accumulator = wide_dtype(x.dtype, d.dtype)
    if x.numel() == 0:
        return lambda grad, x, d, adapter_index, dx: empty(d, tuple(d.shape), accumulator).zero_()
    tile = _tiles.choose(x, "rotate_backward", M)
    side = max(16, triton.next_power_of_2(width)) if holds_slices(x.dtype, d, K) else tile.bk
    halves = x.element_size() == d.element_size() == 2
    bm, warps = (tile.bm, tile.warps) if side <= 64 and halves else (tile.bm // 2, tile.warps * 2)
    tiles, count = triton.cdiv(width, side), 1 if adapter_index is None else d.shape[0]
    programs = triton.cdiv(K, width) * tiles * tiles
    steps = triton.cdiv(M, bm)
    splits = splits_for(programs * count, steps, x)
    rows_per_split = triton.cdiv(steps, splits) * bm
    shared = d.shape[-3] == 1
    operands = operand(x.dtype, grad.dtype, d.dtype) if need_x else operand(x.dtype, grad.dtype)
    launch = Launch(
        rotate_bwd_kernel,
        (programs, splits, count),
        operands,
        B=b,
        WIDTH=width,
        SHARED=shared,
        TRANSPOSE=transpose,
        INDEXED=adapter_index is not None,
        NEED_X=need_x,
        TILES=tiles,
        BM=bm,
        BI=side,
        BJ=side,
        ACC=wide(x.dtype, d.dtype),
        OPERAND=operands,
        num_warps=warps,
        num_stages=tile.stages,
    )

    def rotation_gradient(
        grad: Tensor, x: Tensor, d: Tensor, adapter_index: Tensor | None, dx: Tensor | None
    ) -> Tensor:
        grad, x = rows_contiguous(grad), rows_contiguous(x)
        part = empty(x, (splits, count, K // b, b, b), accumulator)
        launch(
            grad,
            x,
            d.contiguous(),
            optional(adapter_index, x),
            grad if dx is None else dx,
            part,
            M,
            K,
            grad.stride(0),
            x.stride(0),
            K,
            rows_per_split,
        )
        if shared:
            part = part.sum(dim=2, keepdim=True)
        dd = part.sum(dim=0) if splits > 1 else part[0]  # in a fixed order
        return dd if adapter_index is not None else dd[0]

    return rotation_gradient


OPERATIONS: dict[str, Planner] = {"rotate": plan_rotate, "rotate_backward": plan_rotate_backward}
