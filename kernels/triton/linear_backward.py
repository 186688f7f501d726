"""`g = dy * W` from the same packed bytes, then `dx = g + g * D^T` and `dD_i = x_i^T g_i` in one pass over (x, g).

As in the forward: one launch for small M, else W in bounded scratch and the vendor's GEMM. Here a scratch chunk is a
range of columns, so that each GEMM is complete and no partial sums are added in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft._config import scratch_bytes
from hqq_oft.ops.backends import Planner
from hqq_oft.ops.reference import wide_dtype
from hqq_oft.ops.weight import QuantizedWeight

from . import _tiles
from ._launch import PTX, Launch, check_device, empty, operand, rows_contiguous, split_buffers, splits_for, wide
from ._levels import digits, half_of, level_bias, original_columns, row_digit
from ._pieces import dot, narrow, sum_splits, tile_rows, weight_tile
from .dequantize import Packing, dequantize_into, tensors
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


@triton.jit
def scaled_product(
    acc, zeros, g, s, z, packed, HALF: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr, SCALE: tl.constexpr,
    RESUM: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + (g * s) * (level + bias)`, summed over rows, and `zeros + (g * s) * (zero + bias)`, not summed.

    The product takes `g * s` as the sum of two bfloat16 numbers, its leading bits and the rest, which is off by 2^-17.
    With RESUM the zero is multiplied by the same sum, so that the bias cancels entirely.

    Args:
        acc: [BM, columns], float32, the columns in the order of `row_digit`.
        zeros, g: [BM, rows], float32.
        s, z: [rows], pairs of scales and of zeros in SCALE, of which HALF is taken.
        packed: [rows, columns], uint8.
    """
    scaled = g * half_of(s, HALF, SCALE)[None, :]
    leading = (scaled.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
    high = leading.to(tl.bfloat16)
    low = narrow(scaled - leading, tl.bfloat16)
    if RESUM:
        scaled = leading + low.to(tl.float32)
    for j in tl.static_range(digits(BITS, tl.bfloat16)):
        q = row_digit(packed, FIELD, j, BITS, tl.bfloat16, PTX)
        acc = dot(low, q, dot(high, q, acc, PRECISION), PRECISION)
    bias: tl.constexpr = level_bias(FIELD, BITS, tl.bfloat16)
    return acc, zeros + scaled * (half_of(z, HALF, SCALE) + bias)[None, :]


@triton.jit(do_not_specialize=["M"])
def linear_bwd_bands_kernel(
    g_ptr, w_ptr, s_ptr, z_ptr, out_ptr, part_ptr, count_ptr, M, K, band_rows, stride_gm,
    BITS: tl.constexpr, GROUP: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PTX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `linear_bwd_kernel`, for bands of whole rows and 16-bit scales in groups of 64 or of a multiple of 128.

    The product takes exact levels: dy is multiplied by the scale, instead of every weight, and the zero goes into a
    float32 sum over the rows. `dy * scale` enters as two bfloat16 numbers: rounded to one it would cost more accuracy
    than rounded weights do, and in float16 it could underflow.

    A program's 128 columns are two halves. If a group has 64 columns, each half has its own scale, and the two are one
    32-bit word; otherwise both have the same scale, which is one half of a word.

    Grid: (tiles of rows, tiles of columns, SPLITS).
    """
    FIELDS: tl.constexpr = 8 // BITS
    R: tl.constexpr = BN // FIELDS
    SCALE: tl.constexpr = s_ptr.dtype.element_ty
    RESUM: tl.constexpr = tl.float16 == g_ptr.dtype.element_ty
    SECOND: tl.constexpr = 1 if GROUP == 64 else 0  # the second half's scale in a word
    i_m, i_k, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    k0 = i_k * BK
    o_k = tl.arange(0, BK // 2)
    words, i_word = K // (2 * GROUP), k0 // (2 * GROUP)
    p_s = s_ptr.to(tl.pointer_type(tl.uint32)) + i_word
    p_z = z_ptr.to(tl.pointer_type(tl.uint32)) + i_word
    shift = (k0 // GROUP % 2 * 16).to(tl.uint32)
    steps = tl.cdiv(band_rows, R)
    steps_per_split = tl.cdiv(steps, SPLITS)
    end = tl.minimum((i_split + 1) * steps_per_split, steps)
    acc0 = tl.zeros((BM, BK // 2), tl.float32)
    acc1 = tl.zeros((BM, BK // 2), tl.float32)
    for i_n in tl.range(i_split * steps_per_split, end, num_stages=STAGES):
        o_r = i_n * R + tl.arange(0, R)
        m_r = o_r < band_rows
        p_w = w_ptr + o_r[:, None].to(tl.int64) * K + (k0 + o_k)[None, :]
        packed0 = tl.load(p_w, mask=m_r[:, None], other=0, eviction_policy="evict_first")
        packed1 = tl.load(p_w + BK // 2, mask=m_r[:, None], other=0, eviction_policy="evict_first")
        zeros0 = tl.zeros((BM, R), tl.float32)
        zeros1 = tl.zeros((BM, R), tl.float32)
        for i in tl.static_range(FIELDS):
            o_n = i * band_rows.to(tl.int64) + o_r
            p_g = g_ptr + o_m[:, None].to(tl.int64) * stride_gm + o_n[None, :]
            g = tl.load(p_g, mask=m_m[:, None] & m_r[None, :], other=0.0).to(tl.float32)
            s, z = tl.load(p_s + o_n * words, mask=m_r, other=0), tl.load(p_z + o_n * words, mask=m_r, other=0)
            if GROUP != 64:
                s, z = s >> shift, z >> shift
            acc0, zeros0 = scaled_product(
                acc0, zeros0, g, s, z, packed0, 0, i, BITS, SCALE, RESUM, PTX, PRECISION
            )  # fmt: skip
            acc1, zeros1 = scaled_product(
                acc1, zeros1, g, s, z, packed1, SECOND, i, BITS, SCALE, RESUM, PTX, PRECISION
            )  # fmt: skip
        # in every step, so that the sums do not grow with the bias
        acc0 -= tl.sum(zeros0, 1)[:, None]
        acc1 -= tl.sum(zeros1, 1)[:, None]
    acc = tl.permute(tl.join(original_columns(acc0), original_columns(acc1)), (0, 2, 1))
    acc = tl.reshape(acc, (BM, BK))
    o_out = o_m[:, None].to(tl.int64) * K + (k0 + tl.arange(0, BK))[None, :]
    m_out = m_m[:, None] & tl.full((1, BK), True, tl.int1)
    if SPLITS > 1:
        i_tile = i_m * tl.num_programs(1) + i_k
        size = M.to(tl.int64) * K
        acc, m_out = sum_splits(acc, part_ptr, count_ptr, i_tile, i_split, o_out, m_out, size, SPLITS)
    tl.store(out_ptr + o_out, narrow(acc, out_ptr.dtype.element_ty), mask=m_out)


# --- Launchers -------------------------------------------------------------------------------------------------------


def plan_fused_input_gradient(grad: Tensor, weight: QuantizedWeight) -> Product:
    """Of `dy * W` in one launch."""
    M = grad.shape[0]
    packing = Packing.of(weight)
    K, sizes = packing.K, packing.sizes()
    bands = multiplies_levels(grad, weight)
    tile = _tiles.choose(grad, "linear_backward" if bands else "linear_backward_general", M)
    constants = packing.constants(tile.bk)
    if bands:
        packed_rows = tile.bn // (2 if packing.fields <= 2 else 4)  # many fields' scales take registers
        bn = packed_rows * packing.fields
    else:
        bn = packing.fit_rows(tile.bn, constants["GROUPS"])
        packed_rows = packing.tile_rows(bn)
    m_tiles, k_tiles = triton.cdiv(M, tile.bm), triton.cdiv(K, tile.bk)
    steps = triton.cdiv(packing.band_rows, packed_rows)
    programs = triton.cdiv(m_tiles * k_tiles * tile.warps, 4)  # a device holds more programs of fewer warps
    splits = splits_for(programs, steps, grad, 32 if bands else 16)
    grid = m_tiles, k_tiles, splits
    shape: dict[str, Any] = {"SPLITS": splits, "BM": tile.bm, "BN": bn, "BK": tile.bk, "num_warps": tile.warps}
    if bands:
        sizes = K, packing.band_rows
        launch = Launch(
            linear_bwd_bands_kernel,
            grid,
            tl.bfloat16,
            BITS=packing.bits,
            GROUP=packing.group,
            STAGES=tile.stages,
            PTX=PTX,
            **shape,
        )
    else:
        launch = Launch(
            linear_bwd_kernel,
            grid,
            operand(grad.dtype),
            **constants,
            EVEN=K % tile.bk == 0,
            ACC=wide(grad.dtype),
            num_stages=tile.stages,
            **shape,
        )

    def fused_input_gradient(grad: Tensor, weight: QuantizedWeight) -> Tensor:
        grad = rows_contiguous(grad)
        g = empty(grad, (M, K))
        part, stamp = split_buffers(grad, splits, (M, K), m_tiles * k_tiles)
        launch(grad, *tensors(weight), g, part, stamp, M, *sizes, grad.stride(0))
        return g

    return fused_input_gradient


def multiplies_levels(grad: Tensor, weight: QuantizedWeight) -> bool:
    """Whether `linear_bwd_bands_kernel` computes this product: it reads 16-bit scales and zeros in pairs of groups."""
    packing = Packing.of(weight)
    pairs = (weight.scale, weight.zero)
    group = packing.group
    return (
        grad.element_size() == 2
        and packing.banded
        and packing.axis == 1
        and packing.K % (2 * group) == 0
        and (group == 64 or group % 128 == 0)
        and all(tensor.element_size() == 2 and tensor.data_ptr() % 4 == 0 for tensor in pairs)
    )


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


def takes_one_launch(grad: Tensor) -> bool:
    """Whether `dy * W` is fused: for fewer rows than in the forward, and never for float32 on a GPU."""
    few = grad.shape[0] < _tiles.regime(grad, "backward_scratch_from_m")
    return few and not (grad.is_cuda and grad.element_size() > 2)


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
