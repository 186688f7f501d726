"""HQQ's quantizer, `hqq_oft.ops.reference.quantize`, with the bytes of the native kernel: sums in the same order.

Programs solve tiles of groups and record the zeros and errors of all iterations (`quantize_solver.py`); the kernel that
packs decides on the device, for the whole weight, which iteration was the last. Both read W once; a zero of four bytes
is written per group and iteration. No product is contracted with a sum (`enable_fp_fusion=False`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft.ops.backends import Planner, Unsupported
from hqq_oft.ops.packing import LEVELS_PER_ELEMENT

from ._launch import INTERPRETED, Launch, check_device, empty
from ._pieces import narrow
from .quantize_solver import NO_FRACTION, quantize_held_kernel, quantize_streamed_kernel, rounded

# Weights of a group that registers hold, by axis; with Triton 3.6 a column of 64 spills.
_LONGEST_HELD = {0: 32 if triton.__version__.startswith("3.6.") else 64, 1: 128}
_LONGEST = 2**19  # weights of a group; sums of more have longer runs
_ROWS, _COLUMNS = 16, 64  # packed elements of a program that packs


@triton.jit
def iterations_taken(errors_ptr, ITERATIONS: tl.constexpr):
    """After how many iterations the solver stops: the first whose error is not less than the one before, in float32."""
    PADDED: tl.constexpr = triton.next_power_of_2(ITERATIONS)
    o_i = tl.arange(0, PADDED)
    error = tl.load(errors_ptr + o_i, mask=o_i < ITERATIONS, other=0.0).to(tl.float32)
    before = tl.load(errors_ptr + o_i - 1, mask=(o_i > 0) & (o_i < ITERATIONS), other=0.0).to(tl.float32)
    goes_on = (o_i < ITERATIONS) & (error < tl.where(o_i == 0, float("inf"), before))
    return tl.minimum(tl.min(tl.where(goes_on, ITERATIONS, o_i), 0) + 1, ITERATIONS)


@triton.jit
def quantize_pack_kernel(
    w_ptr, scale_ptr, zeros_ptr, errors_ptr, packed_ptr, scale_out_ptr, zero_out_ptr, squares_ptr,
    rows, width, packed_rows,
    TOP: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, AXIS: tl.constexpr, ITERATIONS: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Levels of a tile of packed elements, [BR, BC], scale and zero as stored, and the squared error of the weight.

    W is [rows, width], a group per row (axis 1) or column (axis 0). Grid: (tiles along groups, the others).

    Args:
        errors_ptr: float64 [ITERATIONS], mean errors of the whole weight.
        squares_ptr: float64 [2, programs]: sums of the squares of errors and of W.
    """
    taken = 0
    if ITERATIONS > 0:
        taken = iterations_taken(errors_ptr, ITERATIONS)
    # Groups, of which there may be more than a grid's second dimension takes, are along the first.
    o_r = tl.program_id(1 - AXIS) * BR + tl.arange(0, BR)
    o_c = tl.program_id(AXIS) * BC + tl.arange(0, BC)
    m_c = o_c < width
    groups = rows if AXIS == 1 else width
    p_zero = zeros_ptr + taken.to(tl.int64) * groups if ITERATIONS > 0 else zeros_ptr
    word = tl.zeros((BR, BC), tl.int32)
    error, size = tl.zeros((BR, BC), tl.float32), tl.zeros((BR, BC), tl.float32)
    for field in tl.static_range(FIELDS):
        o_n = field * packed_rows + o_r
        m_n = (o_r < packed_rows) & (o_n < rows)  # words of ten levels may have room for more than there are
        if AXIS == 1 or field == 0:
            o_g, m_g = (o_n, m_n) if AXIS == 1 else (o_c, m_c)
            by, z = tl.load(scale_ptr + o_g, mask=m_g, other=1.0), tl.load(p_zero + o_g, mask=m_g, other=0.0)
            stored_by = narrow(tl.div_rn(tl.full(by.shape, 1.0, tl.float32), by), scale_out_ptr.dtype.element_ty)
            stored_z = narrow(z, zero_out_ptr.dtype.element_ty)
            if tl.program_id(1) == 0:
                tl.store(scale_out_ptr + o_g, stored_by, mask=m_g)
                tl.store(zero_out_ptr + o_g, stored_z, mask=m_g)
            by, stored_by = tl.expand_dims(by, AXIS), tl.expand_dims(stored_by.to(tl.float32), AXIS)
            z, stored_z = tl.expand_dims(z, AXIS), tl.expand_dims(stored_z.to(tl.float32), AXIS)
        m = m_n[:, None] & m_c[None, :]
        w = tl.load(w_ptr + o_n.to(tl.int64)[:, None] * width + o_c[None, :], mask=m, other=0.0).to(tl.float32)
        q = rounded(w * by + z, TOP)
        word = (word << BITS) | tl.where(m, q.to(tl.int32, bitcast=True) & 0xFF, 0)
        difference = tl.where(m, w - ((q - NO_FRACTION) - stored_z) * stored_by, 0.0)
        error += difference * difference
        size += w * w
    p_packed = packed_ptr + o_r.to(tl.int64)[:, None] * width + o_c[None, :]
    tl.store(p_packed, word.to(packed_ptr.dtype.element_ty), mask=(o_r < packed_rows)[:, None] & m_c[None, :])
    programs = tl.num_programs(0) * tl.num_programs(1)
    i_out = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(squares_ptr + i_out, tl.sum(tl.sum(error, 1).to(tl.float64), 0))
    tl.store(squares_ptr + programs + i_out, tl.sum(tl.sum(size, 1).to(tl.float64), 0))


def plan_quantize(
    by_name: bool,
    w: Tensor,
    levels: int,
    bits: int,
    group_size: int,
    axis: int,
    round_zero: bool,
    iterations: int,
    dtype: torch.dtype,
    errors: Tensor | None,
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """Of `hqq_oft.ops.reference.quantize`."""
    check_device(w, by_name)
    if group_size > _LONGEST:
        raise Unsupported(f"the Triton quantizer takes groups of at most {_LONGEST} weights, got {group_size}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise Unsupported(f"the Triton quantizer stores float32, float16 or bfloat16 scales, not {dtype}")
    elements, groups, fields = w.numel(), w.numel() // group_size, LEVELS_PER_ELEMENT[bits]
    rows, width = (groups, group_size) if axis == 1 else (group_size, groups)
    # Groups of a program, whose threads have one, or half of one; interpreted programs take the same time for more.
    tile = 128 if INTERPRETED else 16 if group_size > 64 and axis == 1 else 32
    packed_rows, programs = triton.cdiv(rows, fields), triton.cdiv(groups, tile)
    held = group_size <= _LONGEST_HELD[axis]
    constants = {
        "TOP": levels - 1.0,
        "G": group_size,
        "AXIS": axis,
        "ROUND_ZERO": round_zero,
        "ITERATIONS": iterations,
        "LOG_GROUPS": tile.bit_length() - 1,
        "enable_fp_fusion": False,
    }
    in_registers = Launch(quantize_held_kernel, (programs,), **constants, num_warps=1, num_stages=1)
    streamed = Launch(quantize_streamed_kernel, (programs,), **constants, HELD=held, num_warps=8, num_stages=1)
    bc = min(_COLUMNS, triton.next_power_of_2(width))
    grid = triton.cdiv(packed_rows, _ROWS), triton.cdiv(width, bc)
    grid = grid if axis == 1 else grid[::-1]
    pack = Launch(
        quantize_pack_kernel,
        grid,
        TOP=levels - 1.0,
        BITS=bits,
        FIELDS=fields,
        AXIS=axis,
        ITERATIONS=iterations,
        BR=_ROWS,
        BC=bc,
        enable_fp_fusion=False,
        num_warps=4,
        num_stages=1,
    )

    def quantize(w: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        w, mean_errors = w.contiguous(), settings[-1]
        inverse = empty(w, (groups,), torch.float32)
        zeros = empty(w, (iterations + 1, groups), torch.float32)
        errors = empty(w, (iterations, programs), torch.float64)
        streams = empty(w, (programs,), torch.int32)
        if held:
            in_registers(w, inverse, zeros, errors, streams, groups, 1)
        streamed(w, inverse, zeros, errors, streams, groups)
        packed = empty(w, (packed_rows, width), torch.int32 if bits == 3 else torch.uint8)
        per_group = (groups, 1) if axis == 1 else (1, groups)
        scale, zero = empty(w, per_group, dtype), empty(w, per_group, dtype)
        squares = empty(w, (2, grid[0] * grid[1]), torch.float64)
        sums = errors.sum(1)
        means = sums / elements if mean_errors is None else mean_errors.contiguous()
        pack(w, inverse, zeros, means, packed, scale, zero, squares, rows, width, packed_rows)
        return packed, scale, zero, squares.sum(1), sums

    return quantize


OPERATIONS: dict[str, Planner] = {"quantize": plan_quantize}
