"""Cayley map and Cayley-Neumann series: packed skew parameters `v` to `D = R - I`, and `dL/dD` to `dL/dv`.

Series, with c_k the coefficient of Q^k: `D = c_1 Q + Q (c_2 Q + Q (... + Q c_n Q))`; each step is a product of Q with
a panel of columns. Its gradient, with A = Q^T, is `dQ = sum_ij c_(i+j+1) A^i G A^j`. The gradient of `v` is dQ - dQ^T;
since A^T = -A, it is the same sum over `G - G^T` for even i + j and over `G + G^T` for odd i + j. Both factors of each
term are computed by Horner's rule, also in panels of columns. See `hqq_oft.ops.reference.cayley` for the definitions.

Blocks up to 128 take one launch, which builds Q from `v` in registers. Larger blocks and the exact map use dense Q with
PyTorch's batched products and batched solve. The linear term, which dominates D, is exact.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft.ops.backends import Planner
from hqq_oft.ops.reference import series_coefficients

from ._launch import Launch, check_device, empty, float32_precision, optional, wide
from ._pieces import dot, narrow

_LARGEST_BLOCK = 128  # in one launch


@triton.jit
def skew_tile(p_v, o_i, o_j, factor, B: tl.constexpr, ACC: tl.constexpr, BOUNDED: tl.constexpr):
    """`factor * Q[o_i, o_j]` of the skew block whose strict upper triangle, row by row, is at `p_v`; 0 outside."""
    i, j = o_i[:, None], o_j[None, :]
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    v = tl.load(p_v + (low * (2 * B - low - 1)) // 2 + high - low - 1, mask=(low < high) & (high < B), other=0.0)
    v = v.to(ACC)
    if BOUNDED:
        v = (v.to(tl.float64) * factor).to(ACC)
    return tl.where(i < j, v, -v)


@triton.jit
def bound_factor(p_v, norm_bits, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    """Factor that scales SIZE skew parameters to the bound on a block's norm, 1 if within, as in `project`.

    Computed in float64, of which `norm_bits` is the bound's bit pattern: Triton passes Python's floats as float32. The
    norm may exceed the bound by the rounding error of DTYPE, so that the projection is idempotent.
    """
    EPSILON: tl.constexpr = (
        2.220446049250313e-16 if tl.float64 == DTYPE
        else 0.0078125 if tl.bfloat16 == DTYPE
        else 0.0009765625 if tl.float16 == DTYPE
        else 1.1920928955078125e-07
    )  # fmt: skip
    total = tl.zeros((256,), tl.float64)
    for start in range(0, SIZE, 256):
        o_v = start + tl.arange(0, 256)
        v = tl.load(p_v + o_v, mask=o_v < SIZE, other=0.0).to(tl.float32 if tl.float64 != DTYPE else DTYPE)
        total += v.to(tl.float64) * v.to(tl.float64)
    norm = tl.sqrt(2.0 * tl.sum(total))
    bound = norm_bits.to(tl.float64, bitcast=True)
    within = norm <= bound * (1.0 + EPSILON)
    return tl.where(within, 1.0, bound / tl.where(within, 1.0, norm))


@triton.jit(do_not_specialize=["norm_bits"])
def project_kernel(v_ptr, norm_bits, SIZE: tl.constexpr):
    """Scales one row of `v` [stored blocks, SIZE] to the bound, in place. Grid: (stored blocks,)."""
    p_v = v_ptr + tl.program_id(0).to(tl.int64) * SIZE
    DTYPE: tl.constexpr = v_ptr.dtype.element_ty
    factor = bound_factor(p_v, norm_bits, DTYPE, SIZE)
    if factor != 1.0:
        for start in range(0, SIZE, 256):
            o_v = start + tl.arange(0, 256)
            v = tl.load(p_v + o_v, mask=o_v < SIZE, other=0.0).to(tl.float32 if tl.float64 != DTYPE else DTYPE)
            v = (v.to(tl.float64) * factor).to(v.dtype)
            tl.store(p_v + o_v, narrow(v, DTYPE), mask=o_v < SIZE)


@triton.jit
def skew_times(
    p_v, factor, y, p_scratch, o_i, o_s, SIGN: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    ACC: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`SIGN * Q * y` for a panel `y` of columns, [BP, columns]; Q is taken in panels of BC columns.

    If BC < BP, a panel's rows of `y` are reloaded from `p_scratch`, because register tiles cannot be sliced.
    """
    acc = tl.zeros_like(y)
    if BC == BP:
        q = skew_tile(p_v, o_i, o_i, factor, B, ACC, BOUNDED)
        acc = dot(q, y, acc, PRECISION)
    else:
        WIDTH: tl.constexpr = y.shape[1]
        tl.store(p_scratch + o_i[:, None] * WIDTH + o_s[None, :], y)
        tl.debug_barrier()
        for start in range(0, BP, BC):
            o_c = start + tl.arange(0, BC)
            q = skew_tile(p_v, o_i, o_c, factor, B, ACC, BOUNDED)
            y_c = tl.load(p_scratch + o_c[:, None] * WIDTH + o_s[None, :])
            acc = dot(q, y_c, acc, PRECISION)
        tl.debug_barrier()  # before the next store to the same address
    return acc * SIGN


@triton.jit(do_not_specialize=["norm_bits"])
def cayley_fwd_kernel(
    v_ptr, d_ptr, keep_ptr, norm_bits, scratch_ptr,
    B: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, TERMS: tl.constexpr, LAST: tl.constexpr,
    ONE_STORED: tl.constexpr, DROPPED: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`D` of one block, BN columns of it: `D = sum_k c_k Q^k`, c_k = 2 except for the last of the TERMS, which is LAST.

    Grid: (blocks, panels of BN columns).
    """
    SIZE: tl.constexpr = B * (B - 1) // 2
    i_b, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_i, o_s = tl.arange(0, BP), tl.arange(0, BN)
    o_j = i_c * BN + o_s
    p_v = v_ptr if ONE_STORED else v_ptr + i_b * SIZE
    p_scratch = scratch_ptr + (i_b * tl.num_programs(1) + i_c) * (BP * BN)
    factor = bound_factor(p_v, norm_bits, ACC, B * (B - 1) // 2) if BOUNDED else 1.0
    q = skew_tile(p_v, o_i, o_j, factor, B, ACC, BOUNDED)
    d = q * LAST
    for _ in range(TERMS - 1):
        d = 2 * q + skew_times(p_v, factor, d, p_scratch, o_i, o_s, 1, B, BP, BC, ACC, BOUNDED, PRECISION)
    if DROPPED:
        kept = tl.load(keep_ptr + i_b).to(tl.int1)
        d = tl.where(kept, d, 0.0)  # not a product: dropped blocks may hold NaN
    p_d = d_ptr + i_b * (B * B) + o_i[:, None] * B + o_j[None, :]
    tl.store(p_d, narrow(d, d_ptr.dtype.element_ty), mask=(o_i < B)[:, None] & (o_j < B)[None, :])


@triton.jit
def gradient_tile(p_g, o_i, o_j, SIGN: tl.constexpr, B: tl.constexpr, ACC: tl.constexpr):
    """`(G + SIGN * G^T)[o_i, o_j]`, 0 outside."""
    m = (o_i < B)[:, None] & (o_j < B)[None, :]
    g = tl.load(p_g + o_i[:, None] * B + o_j[None, :], mask=m, other=0.0).to(ACC)
    g_t = tl.load(p_g + o_i[:, None] + o_j[None, :] * B, mask=m, other=0.0).to(ACC)
    return g + SIGN * g_t


@triton.jit
def gradient_times(
    p_g, y, p_scratch, o_i, o_s, acc, SIGN: tl.constexpr, B: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`acc + (G + SIGN * G^T) * y`, as `skew_times`."""
    if BC == BP:
        return dot(gradient_tile(p_g, o_i, o_i, SIGN, B, ACC), y, acc, PRECISION)
    else:
        WIDTH: tl.constexpr = y.shape[1]
        tl.store(p_scratch + o_i[:, None] * WIDTH + o_s[None, :], y)
        tl.debug_barrier()
        for start in range(0, BP, BC):
            o_c = start + tl.arange(0, BC)
            g = gradient_tile(p_g, o_i, o_c, SIGN, B, ACC)
            y_c = tl.load(p_scratch + o_c[:, None] * WIDTH + o_s[None, :])
            acc = dot(g, y_c, acc, PRECISION)
        tl.debug_barrier()
        return acc


@triton.jit(do_not_specialize=["norm_bits"])
def cayley_bwd_kernel(
    g_ptr, v_ptr, dv_ptr, keep_ptr, norm_bits, scratch_ptr,
    B: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, TERMS: tl.constexpr, LAST: tl.constexpr,
    DROPPED: tl.constexpr, BOUNDED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`dv` of one stored block, from BN columns of `dQ - dQ^T`; see the formula at the top of the file.

    `even` and `odd` hold the part of `sum_j c_(i+j+1) A^j` with i + j even and odd; i is descending.

    Grid: (stored blocks, panels of BN columns).
    """
    SIZE: tl.constexpr = B * (B - 1) // 2
    i_b, i_c = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_i, o_s = tl.arange(0, BP), tl.arange(0, BN)
    o_j = i_c * BN + o_s
    p_v, p_g = v_ptr + i_b * SIZE, g_ptr + i_b * (B * B)
    p_scratch = scratch_ptr + (i_b * tl.num_programs(1) + i_c) * (BP * BN)
    factor = bound_factor(p_v, norm_bits, ACC, B * (B - 1) // 2) if BOUNDED else 1.0
    # For i = TERMS - 1 one of the two is LAST * I and the other is 0, so no matrix product is needed.
    ODD_LAST: tl.constexpr = (TERMS - 1) % 2
    identity = (o_i[:, None] == o_j[None, :]).to(ACC)
    even, odd = identity * (LAST * (1 - ODD_LAST)), identity * (LAST * ODD_LAST)
    dq = gradient_tile(p_g, o_i, o_j, 2 * ODD_LAST - 1, B, ACC) * LAST
    for step in range(1, TERMS):
        is_even = 1 - (TERMS - 1 - step) % 2
        even = skew_times(p_v, factor, even, p_scratch, o_i, o_s, -1, B, BP, BC, ACC, BOUNDED, PRECISION)
        even += identity * (2 * is_even)
        odd = skew_times(p_v, factor, odd, p_scratch, o_i, o_s, -1, B, BP, BC, ACC, BOUNDED, PRECISION)
        odd += identity * (2 - 2 * is_even)
        dq = skew_times(p_v, factor, dq, p_scratch, o_i, o_s, -1, B, BP, BC, ACC, BOUNDED, PRECISION)
        dq = gradient_times(p_g, even, p_scratch, o_i, o_s, dq, -1, B, BP, BC, ACC, PRECISION)
        dq = gradient_times(p_g, odd, p_scratch, o_i, o_s, dq, 1, B, BP, BC, ACC, PRECISION)
    if DROPPED:
        kept = tl.load(keep_ptr + i_b).to(tl.int1)
        dq = tl.where(kept, dq, 0.0)
    low, high = o_i[:, None], o_j[None, :]
    p_dv = dv_ptr + i_b * SIZE + (low * (2 * B - low - 1)) // 2 + high - low - 1
    tl.store(p_dv, narrow(dq, dv_ptr.dtype.element_ty), mask=(low < high) & (high < B))


@triton.jit(do_not_specialize=["norm_bits"])
def skew_kernel(
    v_ptr, q_ptr, norm_bits, B: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr, BOUNDED: tl.constexpr
):  # fmt: skip
    """Dense `Q` [stored blocks, B, B] from `v`. Grid: (stored blocks, tiles of rows, tiles of columns)."""
    i_b = tl.program_id(0).to(tl.int64)
    o_i, o_j = tl.program_id(1) * BT + tl.arange(0, BT), tl.program_id(2) * BT + tl.arange(0, BT)
    p_v = v_ptr + i_b * (B * (B - 1) // 2)
    factor = bound_factor(p_v, norm_bits, ACC, B * (B - 1) // 2) if BOUNDED else 1.0
    q = skew_tile(p_v, o_i, o_j, factor, B, ACC, BOUNDED)
    tl.store(q_ptr + i_b * B * B + o_i[:, None] * B + o_j[None, :], q, mask=(o_i < B)[:, None] & (o_j < B)[None, :])


@triton.jit
def unskew_kernel(dq_ptr, dv_ptr, B: tl.constexpr, BT: tl.constexpr, ACC: tl.constexpr):
    """`dv_jk = dQ_jk - dQ_kj` from dense `dQ`. Grid as for `skew_kernel`."""
    i_b = tl.program_id(0).to(tl.int64)
    low = tl.program_id(1) * BT + tl.arange(0, BT)
    high = tl.program_id(2) * BT + tl.arange(0, BT)
    dv = gradient_tile(dq_ptr + i_b * B * B, low, high, -1, B, ACC)
    low, high = low[:, None], high[None, :]
    p_dv = dv_ptr + i_b * (B * (B - 1) // 2) + (low * (2 * B - low - 1)) // 2 + high - low - 1
    tl.store(p_dv, narrow(dv, dv_ptr.dtype.element_ty), mask=(low < high) & (high < B))


# --- Launchers -------------------------------------------------------------------------------------------------------


def _panels(block_size: int) -> dict[str, int]:
    """Tile sizes and warps for a block size: the largest that never spill and fit 99 KiB of shared memory."""
    padded = max(16, triton.next_power_of_2(block_size))
    chunk = padded if padded <= 32 else 16
    return {"BP": padded, "BN": min(padded, 32), "BC": chunk, "num_warps": max(4, padded // 16), "num_stages": 1}


def _precision(v: Tensor) -> str:
    return "ieee" if v.dtype == torch.float64 else float32_precision()


def _norm_bits(max_norm: float | None) -> int:
    """The bit pattern of the bound as float64; 0 for none."""
    return 0 if max_norm is None else int(struct.unpack("<q", struct.pack("<d", max_norm))[0])


def _scratch(v: Tensor, blocks: int, panels: dict[str, int]) -> Tensor:
    """One panel per program if Q is processed in chunks."""
    if panels["BC"] == panels["BP"]:
        return v
    dtype = torch.promote_types(v.dtype, torch.float32)
    return v.new_empty(blocks * panels["BP"] * panels["BP"], dtype=dtype)


def _coefficients(terms: int) -> tuple[int, int]:
    """Number of powers of Q in the series, and the coefficient of the last; the others are 2."""
    coefficients = series_coefficients(terms)
    return len(coefficients), coefficients[-1] if coefficients else 0


def plan_cayley(
    by_name: bool,
    v: Tensor,
    block_size: int,
    terms: int | None,
    keep: Tensor | None,
    max_norm: float | None,
    dtype: torch.dtype,
) -> Callable[..., Tensor]:
    """Of `hqq_oft.ops.reference.cayley`; one launch for blocks up to 128 and a series, see the top of the file."""
    check_device(v, by_name)
    blocks = v.shape[0] if keep is None else keep.shape[0]
    shape = (blocks, block_size, block_size)
    powers, last = _coefficients(terms) if terms is not None else (1, 1)
    if block_size == 1 or powers == 0 or blocks == 0:
        return lambda v, *_: empty(v, shape, dtype).zero_()
    if terms is None or block_size > _LARGEST_BLOCK:
        return _dense_cayley
    panels = _panels(block_size)
    launch = Launch(
        cayley_fwd_kernel,
        (blocks, triton.cdiv(block_size, panels["BN"])),
        B=block_size,
        TERMS=powers,
        LAST=last,
        ONE_STORED=v.shape[0] == 1,
        DROPPED=keep is not None,
        BOUNDED=max_norm is not None,
        ACC=wide(v.dtype),
        PRECISION=_precision(v),
        **panels,
    )

    def cayley(
        v: Tensor, block_size: int, terms: int, keep: Tensor | None, max_norm: float | None, dtype: Any
    ) -> Tensor:
        d, v = empty(v, shape, dtype), v.contiguous()
        launch(v, d, optional(keep, v), _norm_bits(max_norm), _scratch(v, blocks, panels))
        return d

    return cayley


def plan_cayley_backward(
    by_name: bool,
    grad: Tensor,
    v: Tensor,
    block_size: int,
    terms: int | None,
    keep: Tensor | None,
    max_norm: float | None,
) -> Callable[..., Tensor]:
    """Of `hqq_oft.ops.reference.cayley_backward`; one launch for blocks up to 128 and a series."""
    check_device(v, by_name)
    stored = v.shape[0]
    powers, last = _coefficients(terms) if terms is not None else (1, 1)
    if block_size == 1 or powers == 0 or stored == 0:
        return lambda grad, v, *_: empty(v, tuple(v.shape)).zero_()
    if grad.shape[0] != stored:
        plan = plan_cayley_backward(by_name, _sum_positions(grad, keep), v, block_size, terms, None, max_norm)
        return lambda grad, v, block_size, terms, keep, max_norm: plan(
            _sum_positions(grad, keep), v, block_size, terms, None, max_norm
        )
    if terms is None or block_size > _LARGEST_BLOCK:
        return _dense_cayley_backward
    panels = _panels(block_size)
    launch = Launch(
        cayley_bwd_kernel,
        (stored, triton.cdiv(block_size, panels["BN"])),
        B=block_size,
        TERMS=powers,
        LAST=last,
        DROPPED=keep is not None,
        BOUNDED=max_norm is not None,
        ACC=wide(v.dtype),
        PRECISION=_precision(v),
        **panels,
    )

    def cayley_backward(
        grad: Tensor, v: Tensor, block_size: int, terms: int, keep: Tensor | None, max_norm: float | None
    ) -> Tensor:
        dv, v = empty(v, tuple(v.shape)), v.contiguous()
        launch(grad.contiguous(), v, dv, optional(keep, v), _norm_bits(max_norm), _scratch(v, stored, panels))
        return dv

    return cayley_backward


def _sum_positions(grad: Tensor, keep: Tensor | None) -> Tensor:
    """The gradient of one shared block, expanded to all positions by `keep`."""
    if keep is not None:
        grad = torch.where(keep[:, None, None], grad, torch.zeros_like(grad))
    return grad.sum(dim=0, keepdim=True, dtype=torch.promote_types(grad.dtype, torch.float32))


def _dense_skew(v: Tensor, block_size: int, max_norm: float | None) -> Tensor:
    q = empty(v, (v.shape[0], block_size, block_size), torch.promote_types(v.dtype, torch.float32))
    tile = min(64, max(16, triton.next_power_of_2(block_size)))
    tiles = triton.cdiv(block_size, tile)
    launch = Launch(
        skew_kernel, (v.shape[0], tiles, tiles), B=block_size, BT=tile, ACC=wide(v.dtype), BOUNDED=max_norm is not None
    )
    launch(v.contiguous(), q, _norm_bits(max_norm))
    return q


def _exact(q: Tensor) -> Tensor:
    """`D = -2 Q (I + Q)^-1`; I + Q is never singular, so the check, which synchronizes, is skipped."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve_ex(identity + q, -2 * q, left=False, check_errors=False).result


def _dense_cayley(
    v: Tensor, block_size: int, terms: int | None, keep: Tensor | None, max_norm: float | None, dtype: torch.dtype
) -> Tensor:
    q = _dense_skew(v, block_size, max_norm)
    if terms is None:
        d = _exact(q)
    else:
        powers, last = _coefficients(terms)
        d = last * q
        for _ in range(powers - 1):
            d = torch.baddbmm(q, q, d, beta=2)
    if keep is not None:
        d = torch.where(keep[:, None, None], d, torch.zeros_like(d))
    return empty(v, tuple(d.shape), dtype).copy_(d)


def _dense_cayley_backward(
    grad: Tensor, v: Tensor, block_size: int, terms: int | None, keep: Tensor | None, max_norm: float | None
) -> Tensor:
    dv = empty(v, tuple(v.shape))
    q = _dense_skew(v, block_size, max_norm)
    grad = grad.to(q.dtype)
    if keep is not None:
        grad = torch.where(keep[:, None, None], grad, torch.zeros_like(grad))
    if terms is None:
        # dQ = -1/2 (R + I)^T G (R + I)^T
        outer = (_exact(q) + 2 * torch.eye(block_size, dtype=q.dtype, device=q.device)).transpose(1, 2)
        dq = -0.5 * (outer @ grad @ outer)
    else:
        dq = _series_gradient(grad, q, *_coefficients(terms))
    tile = min(64, max(16, triton.next_power_of_2(block_size)))
    tiles = triton.cdiv(block_size, tile)
    launch = Launch(unskew_kernel, (v.shape[0], tiles, tiles), B=block_size, BT=tile, ACC=wide(v.dtype))
    launch(dq.contiguous(), dv)
    return dv


def _series_gradient(grad: Tensor, q: Tensor, powers: int, last: int) -> Tensor:
    """`sum_ij c_(i+j+1) A^i G A^j` with A = Q^T = -Q, for descending i: both factors by Horner's rule."""
    h = torch.zeros_like(q)
    dq = torch.zeros_like(q)
    for step in range(powers):
        h = torch.baddbmm(h, q, h, beta=0, alpha=-1) if step else h
        h.diagonal(0, 1, 2).add_(last if step == 0 else 2)
        dq = torch.baddbmm(grad @ h, q, dq, alpha=-1)
    return dq


def plan_project_(by_name: bool, v: Tensor, max_norm: float) -> Callable[[Tensor, float], None]:
    """Of `hqq_oft.ops.reference.project_`."""
    check_device(v, by_name)
    if v.numel() == 0:
        return lambda v, max_norm: None
    launch, norm_bits = Launch(project_kernel, (v.shape[0],), SIZE=v.shape[1]), _norm_bits(max_norm)

    def project_(v: Tensor, max_norm: float) -> None:
        dense = v.contiguous()
        launch(dense, norm_bits)
        if dense is not v:
            v.copy_(dense)

    return project_


OPERATIONS: dict[str, Planner] = {
    "cayley": plan_cayley,
    "cayley_backward": plan_cayley_backward,
    "project_": plan_project_,
}
