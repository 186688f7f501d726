"""Packed bytes to `W`, or to `W * R^T`, in one pass: each byte is read once and each weight written once.

Bytes: bits / 8 + 2 * (bytes of scale and zero) / group per weight in, the output's dtype out. Operations with a
rotation: 2 b per weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft.ops.backends import Planner
from hqq_oft.ops.packing import LEVELS_PER_ELEMENT
from hqq_oft.ops.weight import QuantizedWeight

from . import _tiles
from ._launch import PTX, Launch, check_device, empty, operand, optional, wide
from ._levels import digit, digits, float32_bias, level_bias, level_float32
from ._pieces import dot, narrow, rotation_tile, tile_rows, weight_tile
from .rotate import holds_slices, rotate, slice_width

_TILES = 4  # tiles of rows per tile of D, of weights in an arbitrary layout


@triton.jit(do_not_specialize=["first_row", "rows"])
def dequantize_kernel(
    w_ptr, s_ptr, z_ptr, d_ptr, out_ptr, N, K, band_rows, band_elements, groups, first_row, rows, first_column, columns,
    BITS: tl.constexpr, FIELDS: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, BANDED: tl.constexpr,
    ALIGNED: tl.constexpr, GROUPS: tl.constexpr, ROTATED: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr,
    SHARED: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`W`, or `W + W * blockdiag(D)^T`, for a range of rows and columns into `out`, WIDTH columns per program.

    A program loads one tile of D for TILES tiles of BN rows; otherwise D would be reloaded for every tile of W.

    In the banded layout the range counts packed rows, and `out` holds the rows of one band after another:
    [FIELDS * rows, columns]; otherwise it is [rows, columns].

    Grid: one program for each slice of columns of TILES row tiles, the slices of the same rows one after another.
    """
    slices = tl.cdiv(columns, WIDTH)
    i_group, i_slice = tl.program_id(0) // slices, tl.program_id(0) % slices
    TILE_ROWS: tl.constexpr = BN // FIELDS if BANDED else BN
    limit = first_row + rows
    o_s = tl.arange(0, BK)
    k0 = first_column + i_slice * WIDTH
    o_k = k0 + o_s
    m_k = (o_s < WIDTH) & (o_k < first_column + columns)
    if ROTATED:
        d = rotation_tile(d_ptr, i_slice, o_s, o_s, K, B, WIDTH, SHARED, True).to(OPERAND)
    for i_tile in range(TILES):
        start = first_row + (i_group * TILES + i_tile) * TILE_ROWS
        o_n, m_n = tile_rows(start, limit, band_rows, FIELDS, BANDED, BN)
        w = weight_tile(
            w_ptr, s_ptr, z_ptr, start, limit, o_n, m_n, o_k, m_k, k0, N, K, band_rows, band_elements, groups,
            BITS, FIELDS, GROUP, AXIS, BANDED, ALIGNED, GROUPS, BN, BK, ACC,
        )  # fmt: skip
        if ROTATED:
            # padding columns may decode to NaN; zero them before the dot, where 0 * NaN would be NaN
            w = dot(narrow(tl.where(m_k[None, :], w, 0.0), OPERAND), d, w, PRECISION)
        o_c = tl.arange(0, BN)
        o_out = (o_c // TILE_ROWS).to(tl.int64) * rows + (start - first_row + o_c % TILE_ROWS)
        p_out = out_ptr + o_out[:, None] * columns + (i_slice * WIDTH + o_s)[None, :]
        tl.store(p_out, narrow(w, out_ptr.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])


@triton.jit
def row_groups(ptr, o_n, m_n, k0, K, GROUP: tl.constexpr, GROUPS: tl.constexpr, BK: tl.constexpr):
    """Scale or zero of rows `o_n` (int64) and columns k0 to k0 + BK, axis 1, float32: [rows, 1] or [rows, BK]."""
    o_g = o_n * (K // GROUP) + k0 // GROUP
    if GROUPS == 1:
        return tl.load(ptr + o_g, mask=m_n, other=0.0).to(tl.float32)[:, None]
    else:
        o_c = tl.arange(0, GROUPS)
        m_g = m_n[:, None] & (k0 // GROUP + o_c < K // GROUP)[None, :]
        value = tl.load(ptr + o_g[:, None] + o_c[None, :], mask=m_g, other=0.0).to(tl.float32)
        value = tl.broadcast_to(value[:, :, None], (value.shape[0], GROUPS, BK // GROUPS))
        return tl.reshape(value, (value.shape[0], BK))


@triton.jit(do_not_specialize=["first_row", "rows"])
def dequantize_bands_kernel(
    w_ptr, s_ptr, z_ptr, d_ptr, out_ptr, N, K, band_rows, first_row, rows, first_column, columns,
    BITS: tl.constexpr, GROUP: tl.constexpr, AXIS: tl.constexpr, GROUPS: tl.constexpr, ROTATED: tl.constexpr,
    EXACT: tl.constexpr, B: tl.constexpr, SHARED: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PTX: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `dequantize_kernel`, for bands of whole rows: one tile [BN / FIELDS, BK] of bytes, then field by field.

    EXACT: the scale is constant within a block, so the product takes the levels themselves, exact in 16 bits, and scale
    and zero are applied to its result: with q a row of levels plus their bias,
    `W R^T = s * (q * I + q * D^T - (z + bias) * (1 + sum of the columns of D^T))`. The products add up in float32; the
    product with I brings the levels into the accumulator's layout without a second decoding.

    Grid: one program for each slice of BK columns of TILES row tiles, the slices of the same rows one after another.
    """
    FIELDS: tl.constexpr = 8 // BITS
    R: tl.constexpr = BN // FIELDS
    slices = tl.cdiv(columns, BK)
    i_group, i_slice = tl.program_id(0) // slices, tl.program_id(0) % slices
    o_s = tl.arange(0, BK)
    k0 = first_column + i_slice * BK
    o_k = k0 + o_s
    m_k = o_k < first_column + columns
    if ROTATED:
        d = rotation_tile(d_ptr, i_slice, o_s, o_s, K, B, BK, SHARED, True).to(OPERAND)
    if EXACT:
        total = 1.0 + tl.sum(d.to(tl.float32), 0)
        identity = (o_s[:, None] == o_s[None, :]).to(tl.float32).to(OPERAND)
    for i_tile in range(TILES):
        o_r = first_row + (i_group * TILES + i_tile) * R + tl.arange(0, R)
        m_r = o_r < first_row + rows
        m = m_r[:, None] & m_k[None, :]
        p_w = w_ptr + o_r[:, None].to(tl.int64) * K + o_k[None, :]
        packed = tl.load(p_w, mask=m, other=0, eviction_policy="evict_first")
        p_out = out_ptr + (o_r - first_row)[:, None].to(tl.int64) * columns + (i_slice * BK + o_s)[None, :]
        if AXIS == 0:  # FIELDS divides GROUP, so the bands share scales and zeros
            o_g = (o_r % (N // GROUP))[:, None].to(tl.int64) * K + o_k[None, :]
            scale = tl.load(s_ptr + o_g, mask=m, other=0.0).to(tl.float32)
            zero = tl.load(z_ptr + o_g, mask=m, other=0.0).to(tl.float32)
        for i in tl.static_range(FIELDS):
            if AXIS == 1:
                o_n = i * band_rows.to(tl.int64) + o_r
                scale = row_groups(s_ptr, o_n, m_r, k0, K, GROUP, GROUPS, BK)
                zero = row_groups(z_ptr, o_n, m_r, k0, K, GROUP, GROUPS, BK)
            if EXACT:
                w = tl.zeros((R, BK), tl.float32)
                for j in tl.static_range(digits(BITS, OPERAND)):
                    q = digit(packed, i, j, BITS, OPERAND, PTX)
                    w = dot(q, d, dot(q, identity, w, PRECISION), PRECISION)
                w = (w - (zero + level_bias(i, BITS, OPERAND)) * total[None, :]) * scale
            else:
                w = (level_float32(packed, i, BITS, PTX) - float32_bias(BITS) - zero) * scale
                if ROTATED:
                    w = dot(narrow(w, OPERAND), d, w, PRECISION)
            tl.store(p_out + i * rows.to(tl.int64) * columns, narrow(w, out_ptr.dtype.element_ty), mask=m)


@dataclass(frozen=True)
class Packing:
    """How the levels of a quantized weight lie in its packed elements; the fields are those of `QuantizedWeight`."""

    N: int
    K: int
    bits: int
    group: int
    axis: int
    elements: int

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Packing:
        """The packing of a weight."""
        return cls(*weight.shape, weight.bits, weight.group_size, weight.axis, weight.packed.numel())

    @property
    def fields(self) -> int:
        """Levels in one packed element."""
        return LEVELS_PER_ELEMENT[self.bits]

    @property
    def banded(self) -> bool:
        """Whether each band of levels consists of whole rows."""
        return self.bits != 3 and self.N % self.fields == 0

    @property
    def band_rows(self) -> int:
        """Packed rows if banded, else N."""
        return self.N // self.fields if self.banded else self.N

    def fit_rows(self, bn: int, groups: int) -> int:
        """`bn`, reduced where dequantization needs more registers than for 4 bits with whole `groups` in a row.

        Scales or packed elements that are loaded per level take as many registers as the levels.
        """
        if groups == 0:
            bn //= 4
        if self.fields in (1, 8):
            bn //= 2
        if not self.banded:
            bn //= 4
        return max(bn, 2 * self.fields if self.banded else 16)

    def tile_rows(self, bn: int) -> int:
        """Packed rows (rows if not banded) in a tile of `bn` rows of the weight."""
        return bn // self.fields if self.banded else bn

    def whole_groups(self, groups: int) -> bool:
        """Whether a tile can be decoded field by field, with `groups` of its columns (`constants`) sharing scales."""
        if not self.banded:
            return False
        if self.axis == 1:
            return groups > 0
        return self.N % self.group == 0 and self.group % self.fields == 0

    def scales_blocks(self, b: int) -> bool:
        """Whether all columns of a block of b share a scale, in every row."""
        return self.axis == 1 and self.K % self.group == 0 and self.group % b == 0

    def sizes(self) -> tuple[int, int, int, int, int]:
        """The kernels' N, K, band_rows, band_elements, groups."""
        return self.N, self.K, self.band_rows, self.elements, self.N * self.K // self.group

    def constants(self, bk: int) -> dict[str, Any]:
        """The kernels' constexpr arguments for tiles of `bk` columns."""
        aligned = (self.K if self.axis == 1 else self.N) % self.group == 0
        return {
            "BITS": self.bits,
            "FIELDS": self.fields,
            "GROUP": self.group,
            "AXIS": self.axis,
            "BANDED": self.banded,
            "ALIGNED": aligned,
            "GROUPS": _groups_per_row(self.group, bk) if aligned and self.axis == 1 else 0,
        }


def _groups_per_row(group: int, bk: int) -> int:
    """Groups in `bk` columns: 1 if they lie within a group, 0 if neither divides the other."""
    if group % bk == 0:
        return 1
    return bk // group if bk % group == 0 else 0


def tensors(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Packed levels, scale and zero, contiguous."""
    return weight.packed.contiguous(), weight.scale.contiguous(), weight.zero.contiguous()


def dequantize_into(
    out: Tensor,
    weight: QuantizedWeight,
    d: Tensor | None = None,
    *,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
) -> Tensor:
    """Write `W`, or `W * R^T`, of a range of rows and columns into `out`, contiguous, in its dtype.

    Args:
        out: `[rows, columns]`; for a banded weight `[fields * rows, columns]`.
        weight: the weight.
        d: `[B or 1, b, b]` whose slices fit in a tile (`holds_slices`), or None; with it the range has all columns.
        rows: first and past the last row, of the packed rows if the weight is banded; by default all.
        columns: first and past the last column, the first a multiple of 128; by default all.

    Returns:
        `out`.
    """
    packing = Packing.of(weight)
    first_row, end_row = rows or (0, packing.band_rows)
    first_column, end_column = columns or (0, packing.K)
    halves = d is not None and d.dtype == out.dtype and out.element_size() == 2
    accumulator = wide(out.dtype, weight.scale.dtype)
    tile = _tiles.choose(out, "dequantize" if d is None else "dequantize_rotate", packing.N)
    width = tile.bk if d is None else _columns_per_program(d.shape[-1], packing.K, tile.bk)
    bk = max(16, triton.next_power_of_2(width))
    constants = packing.constants(bk)
    if width != bk:
        constants["GROUPS"] = 0  # a padded slice may start anywhere within a group
    rotation = {
        "ROTATED": d is not None,
        "B": 1 if d is None else d.shape[-1],
        "SHARED": d is not None and d.shape[0] == 1,
        "BK": bk,
        "OPERAND": operand(out.dtype) if halves else accumulator,
    }
    sizes = first_row, end_row - first_row, first_column, end_column - first_column
    slices = triton.cdiv(end_column - first_column, width)
    if width == bk <= 64 and accumulator == tl.float32 and packing.whole_groups(constants["GROUPS"]):
        packed_rows = tile.bn // 2
        if d is not None and (not halves or (bk > 32 and packing.fields > 2)):
            packed_rows //= 2  # for registers: products in float32, a wide D beside the scales of many fields
        n_tiles = triton.cdiv(end_row - first_row, packed_rows)
        tiles = 1 if d is None else min(packing.bits, triton.next_power_of_2(n_tiles))
        launch = Launch(
            dequantize_bands_kernel,
            (triton.cdiv(n_tiles, tiles) * slices,),
            rotation["OPERAND"],
            BITS=packing.bits,
            GROUP=packing.group,
            AXIS=packing.axis,
            GROUPS=constants["GROUPS"],
            **rotation,
            EXACT=halves and packing.scales_blocks(d.shape[-1]) and packing.bits >= _fewest_exact_bits(out.dtype),
            TILES=tiles,
            BN=packed_rows * packing.fields,
            PTX=PTX,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        launch(*tensors(weight), optional(d, out), out, packing.N, packing.K, packing.band_rows, *sizes)
        return out
    tile = _tiles.choose(out, "dequantize", packing.N)
    bn = packing.fit_rows(tile.bn if d is None or halves else tile.bn // 2, constants["GROUPS"])
    n_tiles = triton.cdiv(end_row - first_row, packing.tile_rows(bn))
    tiles = 1 if d is None else min(_TILES, triton.next_power_of_2(n_tiles))
    launch = Launch(
        dequantize_kernel,
        (triton.cdiv(n_tiles, tiles) * slices,),
        rotation["OPERAND"],
        **constants,
        **rotation,
        WIDTH=width,
        TILES=tiles,
        BN=bn,
        ACC=accumulator,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    launch(*tensors(weight), optional(d, out), out, *packing.sizes(), *sizes)
    return out


def _columns_per_program(b: int, K: int, bk: int) -> int:
    """Columns of whole blocks: `bk` if that many hold whole slices (`slice_width`), else one slice."""
    width = slice_width(b, K)
    return bk if width < bk <= K and bk % width == 0 else width


def _fewest_exact_bits(dtype: torch.dtype) -> int:
    """Least bits whose levels enter a product with their bias: float16's, up to 1024, costs small levels accuracy."""
    return 4 if dtype == torch.float16 else 1


def plan_dequantize(by_name: bool, weight: QuantizedWeight, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Of `hqq_oft.ops.reference.dequantize`."""
    check_device(weight.packed, by_name)
    return lambda weight, dtype: dequantize_into(empty(weight.packed, weight.shape, dtype), weight)


def plan_dequantize_rotate(
    by_name: bool, weight: QuantizedWeight, d: Tensor, dtype: torch.dtype
) -> Callable[..., Tensor]:
    """Of `hqq_oft.ops.reference.dequantize_rotate`; blocks too large for a tile are rotated in a second pass."""
    check_device(weight.packed, by_name)
    if holds_slices(dtype, d, weight.in_features):
        return lambda weight, d, dtype: dequantize_into(empty(weight.packed, weight.shape, dtype), weight, d)
    wide_out = torch.promote_types(dtype, torch.promote_types(weight.scale.dtype, torch.float32))

    def in_two_passes(weight: QuantizedWeight, d: Tensor, dtype: torch.dtype) -> Tensor:
        dense = dequantize_into(empty(weight.packed, weight.shape, wide_out), weight)
        return rotate(dense, d, None, True).to(dtype)

    return in_two_passes


OPERATIONS: dict[str, Planner] = {"dequantize": plan_dequantize, "dequantize_rotate": plan_dequantize_rotate}
