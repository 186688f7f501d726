"""HQQ's quantizer in plain PyTorch: `quantize` of `hqq_oft.ops.reference`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from .packing import pack


def shrink(residual: Tensor) -> Tensor:
    """The proximal operator of HQQ's |x|^0.7 with beta = 10, generalized soft thresholding: 0 below about 0.17."""
    size = residual.abs()
    return residual.sign() * (size - 0.1 * size.pow(-0.3)).clamp_min(0)


def quantize(
    w: Tensor,
    levels: int,
    bits: int,
    group_size: int,
    axis: int,
    round_zero: bool,
    iterations: int,
    dtype: torch.dtype,
    errors: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """HQQ's quantizer, in float32: scale from a group's range, zero by half-quadratic optimization.

    Each iteration rounds to levels q, shrinks the residuals e, and sets zero = mean(q - scale * (w - shrink(e))), where
    scale is what weights are multiplied by. The solver stops at the first iteration whose mean |e|, computed in float64
    and rounded to float32, is not less than that of the one before; the zero after it is used. Source:
    `optimize_weights_proximal_legacy` of HQQ, whose means are float32 sums in PyTorch's order.

    Args:
        w: `[N, K]`, finite: a weight, or a band of one that consists of whole groups.
        levels: number of levels, from 0 on.
        bits: width of a stored level.
        group_size: weights per scale and zero.
        axis: of the groups, as in `QuantizedWeight`.
        round_zero: round the first zero to an integer.
        iterations: of the solver, at most; 0 keeps the first zero.
        dtype: of the stored scale and zero.
        errors: float64 `[iterations]`, the mean |e| of each iteration by which the solver stops: those of the weight
            that `w` is a band of; None: those of `w`.

    Returns:
        Packed levels, scale and zero as HQQ stores them (of `[groups, 1]` or `[1, groups]`); float64 `[2]`, the squared
        distance of the quantized weight to `w` and the square of `w`, non-finite if `w` is; and float64 `[iterations]`,
        the sum of |e| over `w` of each iteration, also of those after the solver stops.
    """
    matrix = w.float().reshape((-1, group_size) if axis == 1 else (group_size, -1))
    scale, zero = _first_scale_and_zero(matrix, levels, axis, round_zero)
    solved = list(islice(_iterate(matrix, scale, zero, levels, axis), iterations))
    totals = torch.stack([total for total, _ in solved]) if solved else matrix.new_empty(0, dtype=torch.float64)
    taken = iterations_taken(totals / w.numel() if errors is None else errors)
    zero = solved[taken - 1][1] if taken else zero
    return *_quantized(matrix, scale, zero, levels, bits, dtype), totals


def iterations_taken(errors: Tensor) -> int:
    """After how many iterations of these mean errors the solver of `quantize` stops."""
    best = math.inf
    for i, error in enumerate(errors.float().tolist()):
        if not error < best:
            return i + 1
        best = error
    return len(errors)


def _first_scale_and_zero(matrix: Tensor, levels: int, axis: int, round_zero: bool) -> tuple[Tensor, Tensor]:
    low, high = matrix.amin(axis, keepdim=True), matrix.amax(axis, keepdim=True)
    scale = (levels - 1) / (high - low)
    scale = torch.where((high - low).abs() <= 1e-4, 1.0, scale).clamp(max=2e4)
    zero = -low * scale
    return scale, zero.round() if round_zero else zero


def _nearest_levels(matrix: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    return (matrix * scale + zero).round_().clamp_(0, levels - 1)


def _iterate(matrix: Tensor, scale: Tensor, zero: Tensor, levels: int, axis: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The solver: of each iteration the sum of |e|, in float64, and the zero after it."""
    while True:
        q = _nearest_levels(matrix, scale, zero, levels)
        residual = matrix - (q - zero) / scale
        zero = (q - (matrix - shrink(residual)) * scale).mean(axis, keepdim=True)
        yield residual.abs().sum(dtype=torch.float64), zero


def _quantized(
    matrix: Tensor, scale: Tensor, zero: Tensor, levels: int, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = _nearest_levels(matrix, scale, zero, levels)
    scale, zero = (1 / scale).to(dtype), zero.to(dtype)
    difference = matrix - (q - zero.float()) * scale.float()
    squares = torch.stack([x.square().sum(dtype=torch.float64) for x in (difference, matrix)])
    return pack(q, bits), scale, zero, squares
