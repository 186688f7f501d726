"""`y = x * blockdiag(R) * W^T + bias` from packed bytes.

M selects one of two paths (`regimes` of the tile tables):

- Small M (decoding): one fused launch. A program rotates a slice of x and multiplies it by a tile of rows of W. If the
  grid is too small to fill the device, K is split, and the last program to arrive adds the partial sums in split order.
  Every tile of outputs rotates x again and so reads D once; hence the tiles are wide. Bytes: the packed weight once,
  bits / 8 + 4 / group per weight with 16-bit scales. `linear_groups` has the kernel for most weights in 16 bits; the
  one below takes every weight and dtype.
- Large M (training, prefill): `W * R^T` is dequantized and rotated in one pass into bounded scratch, chunk by chunk;
  the vendor's GEMM multiplies each chunk. Rotating W is free in a memory-bound pass; rotating x would add a pass.

Other rotations are applied to x by a launch of their own: for M over 16, where every tile would repeat them, for blocks
over 64 or that do not divide a tile, and for rows of several adapters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft._config import scratch_bytes
from hqq_oft.ops.backends import Planner
from hqq_oft.ops.weight import QuantizedWeight

from . import _tiles
from ._launch import (
    Launch,
    check_device,
    empty,
    operand,
    optional,
    rows_contiguous,
    split_buffers,
    splits_for,
    wide,
)
from ._pieces import dot, narrow, rotation_tile, sum_splits, tile_rows, weight_tile
from .dequantize import Packing, dequantize_into, tensors
from .linear_groups import Linear, plan_groups_linear, rotates, serves
from .rotate import holds_slices, plan_rotate, rotate


@triton.jit(do_not_specialize=["M"])
def linear_fwd_kernel(
    x_ptr, d_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr, part_ptr, stamp,
    M, N, K, band_rows, band_elements, groups, stride_xm,
    BITS: tl.constexpr, FIELDS: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, BANDED: tl.constexpr,
    ALIGNED: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr, ROTATED: tl.constexpr,
    SHARED: tl.constexpr, BIASED: tl.constexpr, B: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of y over one of SPLITS parts of K. Rotated x and W are rounded to the dtype of x.

    Grid: (tiles of rows, tiles of outputs, SPLITS).
    """
    i_m, i_n, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    TILE_ROWS: tl.constexpr = BN // FIELDS if BANDED else BN
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    o_n, m_n = tile_rows(i_n * TILE_ROWS, band_rows, band_rows, FIELDS, BANDED, BN)
    o_s = tl.arange(0, BK)
    p_x = x_ptr + o_m[:, None].to(tl.int64) * stride_xm
    steps = tl.cdiv(K, BK)
    steps_per_split = tl.cdiv(steps, SPLITS)
    acc = tl.zeros((BM, BN), ACC)
    for i_k in range(i_split * steps_per_split, tl.minimum((i_split + 1) * steps_per_split, steps)):
        k0 = i_k * BK
        o_k = k0 + o_s
        m_k = tl.full((BK,), True, tl.int1) if EVEN else o_k < K
        x = tl.load(p_x + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        if ROTATED:
            d = rotation_tile(d_ptr, i_k, o_s, o_s, K, B, BK, SHARED, False).to(OPERAND)
            x = narrow(dot(x.to(OPERAND), d, x.to(ACC), PRECISION), x.dtype)
        w = weight_tile(
            w_ptr, s_ptr, z_ptr, i_n * TILE_ROWS, band_rows, o_n, m_n, o_k, m_k, k0, N, K, band_rows, band_elements,
            groups, BITS, FIELDS, GROUP, AXIS, BANDED, ALIGNED, GROUPS, BN, BK, ACC,
        )  # fmt: skip
        acc = dot(x, tl.trans(narrow(w, x.dtype)), acc, PRECISION)
    o_out = o_m[:, None].to(tl.int64) * N + o_n[None, :]
    m_out = m_m[:, None] & m_n[None, :]
    if SPLITS > 1:
        i_tile = i_m * tl.num_programs(1) + i_n
        size = M.to(tl.int64) * N
        acc, m_out = sum_splits(acc, part_ptr, stamp, i_tile, i_split, o_out, m_out, size, SPLITS)
    if BIASED:
        acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(ACC)[None, :]
    tl.store(y_ptr + o_out, narrow(acc, y_ptr.dtype.element_ty), mask=m_out)


# --- Launchers -------------------------------------------------------------------------------------------------------


_ROWS = 128  # scratch chunks start at multiples of this if possible: the vendor's GEMM prefers aligned outputs


def plan_fused_linear(
    x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, adapter_index: Tensor | None
) -> Linear:
    """Of the product in one launch, two where the rotation needs its own."""
    grouped = serves(x, weight)
    if d is not None:
        fits = rotates(x, weight, d) if grouped else _general_tile(x).bk % d.shape[-1] == 0
        if adapter_index is not None or not fits:
            rotate_first = plan_rotate(True, x, d, adapter_index, False)
            product = plan_fused_linear(empty(x, tuple(x.shape)), weight, None, bias, None)
            return lambda x, weight, d, bias, adapter_index: product(
                rotate_first(x, d, adapter_index, False), weight, None, bias, None
            )
    return (plan_groups_linear if grouped else plan_general_linear)(x, weight, d, bias)


def _general_tile(x: Tensor) -> _tiles.Tile:
    return _tiles.choose(x, "linear_general", x.shape[0])


def plan_general_linear(x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None) -> Linear:
    """Of the product of every weight in one launch; a tile holds whole blocks of `d`."""
    (M, K), tile = x.shape, _general_tile(x)
    packing = Packing.of(weight)
    constants, sizes = packing.constants(tile.bk), packing.sizes()
    bn = packing.fit_rows(tile.bn, constants["GROUPS"])
    m_tiles, n_tiles = triton.cdiv(M, tile.bm), triton.cdiv(packing.band_rows, packing.tile_rows(bn))
    splits = splits_for(m_tiles * n_tiles, triton.cdiv(K, tile.bk), x)
    accumulator = wide(x.dtype)
    rotation = accumulator if d is None else operand(x.dtype, d.dtype)
    launch = Launch(
        linear_fwd_kernel,
        (m_tiles, n_tiles, splits),
        rotation if d is not None else operand(x.dtype),
        **constants,
        EVEN=K % tile.bk == 0,
        ROTATED=d is not None,
        SHARED=d is not None and d.shape[-3] == 1,
        BIASED=bias is not None,
        B=1 if d is None else d.shape[-1],
        SPLITS=splits,
        BM=tile.bm,
        BN=bn,
        BK=tile.bk,
        ACC=accumulator,
        OPERAND=rotation,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )

    def general_linear(
        x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, adapter_index: Tensor | None
    ) -> Tensor:
        x, d = rows_contiguous(x), None if d is None else d.contiguous()
        y = empty(x, (M, packing.N))
        part, stamp = split_buffers(x, splits, (M, packing.N), m_tiles * n_tiles)
        launch(
            x,
            optional(d, x),
            *tensors(weight),
            optional(bias, x),
            y,
            part,
            stamp,
            M,
            *sizes,
            x.stride(0),
        )
        return y

    return general_linear


@torch.no_grad()
def scratch_linear(
    x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, adapter_index: Tensor | None
) -> Tensor:
    """The product by the vendor's GEMM, with `W * R^T` dequantized into scratch one chunk of outputs at a time."""
    M, K = x.shape
    if d is not None and (adapter_index is not None or not holds_slices(x.dtype, d, K)):
        x, d = rotate(x, d, adapter_index, False), None
    packing = Packing.of(weight)
    y = empty(x, (M, packing.N))
    if bias is not None:
        bias = bias.to(x.dtype)
    bands = packing.fields if packing.banded else 1
    fit = scratch_bytes() // (bands * K * x.element_size())
    chunk = min(packing.band_rows, max(fit // _ROWS * _ROWS, min(fit, _ROWS), 1))
    scratch = empty(x, (bands * chunk, K))
    for first in range(0, packing.band_rows, chunk):
        rows = min(chunk, packing.band_rows - first)
        dense = dequantize_into(scratch[: bands * rows], weight, d, rows=(first, first + rows))
        if rows == packing.band_rows:  # all bands in full: the rows are in their original order
            _multiply(x, dense, bias, y)
            continue
        for band in range(bands):
            outputs = slice(band * packing.band_rows + first, band * packing.band_rows + first + rows)
            part = None if bias is None else bias[outputs]
            _multiply(x, dense[band * rows : (band + 1) * rows], part, y[:, outputs])
    return y


def _multiply(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, w.t(), out=out)
    else:
        torch.addmm(bias, x, w.t(), out=out)


def takes_one_launch(x: Tensor) -> bool:
    """Whether the product is fused for this many rows; never for float32 on a GPU: Triton's float32 products spill."""
    return x.shape[0] < _tiles.regime(x, "scratch_from_m") and not (x.is_cuda and x.element_size() > 2)


def plan_linear(
    by_name: bool, x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, index: Tensor | None
) -> Linear:
    """Of `hqq_oft.ops.reference.linear`; M selects the path."""
    check_device(x, by_name)
    if x.shape[0] == 0:
        return lambda x, weight, d, bias, adapter_index: empty(x, (0, weight.out_features))
    return plan_fused_linear(x, weight, d, bias, index) if takes_one_launch(x) else scratch_linear


OPERATIONS: dict[str, Planner] = {"linear": plan_linear}
