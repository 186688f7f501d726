"""`y = x * blockdiag(R) * W^T + bias` for few rows of x, as products of unscaled levels.

Small products are bound by the instructions for each word of levels, not by its bytes. This kernel needs about a third
of those of `linear_fwd_kernel`, for the weights that `serves` names:

- The levels of a band become exact 16-bit floats by bit operations (`_levels`). They are the first operand of the
  product, `y^T = W x^T`, so that 8 rows of x fill the matrix unit.
- Scale and zero are applied to the sums of a group: `s * (sum q x - (z + bias) * sum x)`. For larger tiles these sums
  outnumber the weights; SCALED tiles are scaled, rounded to the dtype of x and multiplied.
- Scales and zeros are loaded as pairs of two groups, 32 bits, so that they are asynchronous copies like the levels.
- The rotation multiplies blocks, without the zeros between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft.ops.weight import QuantizedWeight

from . import _tiles
from ._launch import PTX, Launch, empty, has_wgmma, optional, rows_contiguous, split_buffers, splits_for
from ._levels import digit, digits, float32_bias, half_of, level_bias, level_float32
from ._pieces import add_parts, arrive_last, dot, narrow, rotation_tile
from .dequantize import Packing, tensors

Linear = Callable[[Tensor, QuantizedWeight, Tensor | None, Tensor | None, Tensor | None], Tensor]


@triton.jit
def _permuted(w, R: tl.constexpr, WIDTH: tl.constexpr):
    """Column `c WIDTH / 4 + 4 t + 2 h + j` at `16 t + 8 h + 2 c + j`.

    The operand of wgmma in registers: thread c of four holds columns `2 c + j` and `8 + 2 c + j` of each 16. Permuted,
    these are the bytes that follow each other in memory.
    """
    return tl.reshape(tl.permute(tl.reshape(w, (R, 4, WIDTH // 16, 2, 2)), (0, 2, 3, 1, 4)), (R, WIDTH))


@triton.jit
def _product(w, x, acc, W_FIRST: tl.constexpr):
    """`acc + W x^T` of w [R, k] and x [BM, k]; without W_FIRST transposed."""
    if W_FIRST:
        return dot(w, tl.trans(x), acc, "ieee")
    else:
        return dot(x, tl.trans(w), acc, "ieee")


@triton.jit
def _of_rows(v, W_FIRST: tl.constexpr):
    """A value for each packed row, [R], to broadcast over a tile of sums."""
    if W_FIRST:
        return v[:, None]
    else:
        return v[None, :]


@triton.jit
def _of_tokens(v, W_FIRST: tl.constexpr):
    """A value for each token, [BM], to broadcast over a tile of sums."""
    if W_FIRST:
        return v[None, :]
    else:
        return v[:, None]


@triton.jit
def _zeros(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """COUNT tiles of sums."""
    out = ()
    for _i in tl.static_range(COUNT):
        out = out + (tl.zeros(SHAPE, tl.float32),)
    return out


@triton.jit(do_not_specialize=["M"])
def linear_groups_fwd_kernel(
    x_ptr, d_ptr, w_ptr, s_ptr, z_ptr, bias_ptr, y_ptr, part_ptr, stamp, M, N, K, band_rows, stride_xm,
    BITS: tl.constexpr, GROUP: tl.constexpr, ROTATED: tl.constexpr, SHARED: tl.constexpr, B: tl.constexpr,
    BIASED: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    WIDTH: tl.constexpr, W_FIRST: tl.constexpr, SCALED: tl.constexpr, PERMUTED: tl.constexpr, STAGES: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """R packed rows, `8 / BITS` times as many outputs, for BM rows of x over one of SPLITS parts of K.

    Grid: (tiles of rows, tiles of packed rows, SPLITS).
    """
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    FIELDS: tl.constexpr = 8 // BITS
    R: tl.constexpr = BN // FIELDS
    DIGITS: tl.constexpr = digits(BITS, DTYPE)
    SHAPE: tl.constexpr = (R, BM) if W_FIRST else (BM, R)
    SPAN: tl.constexpr = GROUP if GROUP < BK else BK  # columns of a step with one scale
    WORDS: tl.constexpr = BK // (2 * GROUP) if 2 * GROUP <= BK else 1  # pairs of scales of a row in a step
    i_m, i_r, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_m = i_m * BM + tl.arange(0, BM)
    m_m = o_m < M
    o_r = i_r * R + tl.arange(0, R)
    m_r = o_r < band_rows
    o_k = tl.arange(0, WIDTH)
    if PERMUTED:
        o_x = o_k // 2 % 4 * (WIDTH // 4) + o_k // 16 * 4 + o_k // 8 % 2 * 2 + o_k % 2
    else:
        o_x = o_k
    p_x = x_ptr + o_m[:, None].to(tl.int64) * stride_xm + o_x[None, :]
    p_w = w_ptr + o_r[:, None].to(tl.int64) * K + o_k[None, :]
    words = K // (2 * GROUP)
    band_words = band_rows.to(tl.int64) * words
    p_s = s_ptr.to(tl.pointer_type(tl.uint32)) + o_r.to(tl.int64) * words
    p_z = z_ptr.to(tl.pointer_type(tl.uint32)) + o_r.to(tl.int64) * words
    steps = K // BK
    steps_per_split = tl.cdiv(steps, SPLITS)
    first = i_split * steps_per_split
    acc = _zeros(FIELDS, SHAPE)
    for i_k in tl.range(first, tl.minimum(first + steps_per_split, steps), num_stages=STAGES):
        s_words, z_words = (), ()
        for i_word in tl.static_range(WORDS):
            if 2 * GROUP <= BK:
                o_word = i_k * WORDS + i_word
            else:
                o_word = i_k * BK // (2 * GROUP)
            for field in tl.static_range(FIELDS):
                s_words = s_words + (tl.load(p_s + (field * band_words + o_word), mask=m_r, other=0),)
                z_words = z_words + (tl.load(p_z + (field * band_words + o_word), mask=m_r, other=0),)
        for i_span in tl.static_range(BK // SPAN):
            scale, shift = (), ()  # of each field: [R]
            for field in tl.static_range(FIELDS):
                s_word, z_word = s_words[i_span // 2 * FIELDS + field], z_words[i_span // 2 * FIELDS + field]
                if GROUP < BK:
                    s, z = half_of(s_word, i_span % 2, DTYPE), half_of(z_word, i_span % 2, DTYPE)
                else:
                    odd = i_k * BK // GROUP % 2 * 16
                    s, z = half_of(s_word >> odd, 0, DTYPE), half_of(z_word >> odd, 0, DTYPE)
                if SCALED:
                    z = -(z + float32_bias(BITS)) * s
                else:
                    z = -z - level_bias(field, BITS, DTYPE)
                scale, shift = scale + (s,), shift + (z,)
            y = acc if SCALED else _zeros(FIELDS, SHAPE)
            total = tl.zeros((BM,), tl.float32)
            for i_piece in tl.static_range(SPAN // WIDTH):
                k0 = i_k * BK + i_span * SPAN + i_piece * WIDTH
                x = tl.load(p_x + k0, mask=m_m[:, None], other=0.0)
                packed = tl.load(p_w + k0, mask=m_r[:, None], other=0, eviction_policy="evict_first")
                if ROTATED:
                    if B == WIDTH:
                        i_block = 0 if SHARED else k0 // B
                        d = tl.load(d_ptr + i_block * (B * B) + o_k[:, None] * B + o_k[None, :])
                    else:
                        d = rotation_tile(d_ptr, k0 // WIDTH, o_k, o_k, K, B, WIDTH, SHARED, False)
                    x = narrow(dot(x, d, x.to(tl.float32), "ieee"), DTYPE)
                if not SCALED:
                    total += tl.sum(x.to(tl.float32), 1)
                new = ()
                for field in tl.static_range(FIELDS):
                    y_field = y[field]
                    if SCALED:
                        w = level_float32(packed, field, BITS, PTX) * scale[field][:, None] + shift[field][:, None]
                        w = narrow(w, DTYPE)
                        if PERMUTED:
                            w = _permuted(w, R, WIDTH)
                        y_field = _product(w, x, y_field, W_FIRST)
                    else:
                        for i_digit in tl.static_range(DIGITS):
                            q = digit(packed, field, i_digit, BITS, DTYPE, PTX)
                            if PERMUTED:
                                q = _permuted(q, R, WIDTH)
                            y_field = _product(q, x, y_field, W_FIRST)
                    new = new + (y_field,)
                y = new
            if SCALED:
                acc = y
            else:
                new = ()
                for field in tl.static_range(FIELDS):
                    y_field = y[field] + _of_rows(shift[field], W_FIRST) * _of_tokens(total, W_FIRST)
                    new = new + (acc[field] + y_field * _of_rows(scale[field], W_FIRST),)
                acc = new
    o_rows, m_rows = _of_rows(o_r, W_FIRST), _of_rows(m_r, W_FIRST)
    o_out = _of_tokens(o_m.to(tl.int64) * N, W_FIRST) + o_rows
    m_out = _of_tokens(m_m, W_FIRST) & m_rows
    if SPLITS > 1:
        size = M.to(tl.int64) * N
        for field in tl.static_range(FIELDS):
            tl.store(part_ptr + i_split.to(tl.int64) * size + (o_out + field * band_rows), acc[field], mask=m_out)
        last = arrive_last(part_ptr + SPLITS * size, stamp, i_m * tl.num_programs(1) + i_r, SPLITS)
        m_out = tl.where(last, m_out, False)
        if last:
            new = ()
            for field in tl.static_range(FIELDS):
                new = new + (add_parts(part_ptr + field * band_rows, size, o_out, m_out, SPLITS),)
            acc = new
    for field in tl.static_range(FIELDS):
        out = acc[field]
        if BIASED:
            out += tl.load(bias_ptr + field * band_rows + o_rows, mask=m_rows, other=0.0).to(tl.float32)
        tl.store(y_ptr + (o_out + field * band_rows), narrow(out, DTYPE), mask=m_out)


# --- Launchers -------------------------------------------------------------------------------------------------------

_COLUMNS = 128  # of a step of the loop; K is a multiple
_NARROWEST = 32  # columns of one product: of fewer, the bytes of a row are no asynchronous copy
_LARGEST_M = {1: 16, 2: 32}  # by bits: for more rows the sums of 8 or 4 bands do not fit in registers


def serves(x: Tensor, weight: QuantizedWeight) -> bool:
    """Whether the kernel takes this weight: 16 bits, bands of whole rows, groups of columns in aligned pairs."""
    packing, (_, K) = Packing.of(weight), weight.shape
    aligned = all(t.dtype == x.dtype and t.data_ptr() % 4 == 0 for t in (weight.scale, weight.zero))
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and x.shape[0] <= _LARGEST_M.get(weight.bits, x.shape[0])
        and packing.banded
        and weight.axis == 1
        and (weight.group_size in (32, 64) or weight.group_size % _COLUMNS == 0)
        and K % _COLUMNS == 0
        and K % (2 * weight.group_size) == 0
        and aligned
    )


def rotates(x: Tensor, weight: QuantizedWeight, d: Tensor) -> bool:
    """Whether the kernel also rotates: few rows, blocks that fill a product's columns, registers for more than sums."""
    width = max(d.shape[-1], _NARROWEST)
    fits = width <= 64 and width % d.shape[-1] == 0 and weight.group_size % width == 0
    return fits and d.dtype == x.dtype and weight.bits > 1 and x.shape[0] <= _tiles.largest(x, "linear_rotated")


def plan_groups_linear(x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None) -> Linear:
    """Of the product in one launch, where the kernel `serves` the weight and `rotates` by `d`."""
    M, K = x.shape
    packing = Packing.of(weight)
    tile = _tiles.choose(x, "linear" if d is None else "linear_rotated", M if packing.fields < 8 else min(M, 8))
    few = tile.bm < 16
    # The table is for one or two bands; of more, the sums of as many packed rows would not fit in registers.
    rows = tile.bn // {1: 2, 2: 2, 4: 2 if few and d is None else 4, 8: 8}[packing.fields]
    m_tiles, n_tiles = triton.cdiv(M, tile.bm), triton.cdiv(packing.band_rows, rows)
    splits = splits_for(m_tiles * n_tiles, K // _COLUMNS, x)
    scaled = tile.bm >= 32
    w_first = d is None or few
    if d is not None:
        width = max(d.shape[-1], _NARROWEST)
    else:
        width = _NARROWEST if scaled else min(weight.group_size, 64)
    launch = Launch(
        linear_groups_fwd_kernel,
        (m_tiles, n_tiles, splits),
        BITS=packing.bits,
        GROUP=packing.group,
        ROTATED=d is not None,
        SHARED=d is not None and d.shape[-3] == 1,
        B=1 if d is None else d.shape[-1],
        BIASED=bias is not None,
        SPLITS=splits,
        BM=tile.bm,
        BN=rows * packing.fields,
        BK=_COLUMNS,
        WIDTH=width,
        W_FIRST=w_first,
        SCALED=scaled,
        PERMUTED=w_first and has_wgmma(x) and tile.warps % 4 == 0 and rows % 64 == 0,
        STAGES=tile.stages,
        PTX=PTX,
        num_warps=1 if packing.fields == 8 else tile.warps,  # a warp multiplies 16 rows
        num_stages=tile.stages,
    )

    def groups_linear(
        x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, adapter_index: Tensor | None
    ) -> Tensor:
        x = rows_contiguous(x)
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
            packing.N,
            K,
            packing.band_rows,
            x.stride(0),
        )
        return y

    return groups_linear
