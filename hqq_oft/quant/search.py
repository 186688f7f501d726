"""A search for the scale and zero of each group: lower errors than HQQ's solver in the same format."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import table as ops
from ..ops.packing import pack

_STEPS = 10  # of least squares, at most
_RATIOS = 5  # of each end of the range
_CLIPPED = 1.0  # of a step between levels that cover a group's range: what may be clipped of a weight
# Elements of a chunk. On a CPU its few buffers stay in the cache; elsewhere it pays for the launches of kernels.
_CPU_CHUNK, _CHUNK = 2**17, 2**22
# Of the sum of a group's squares: smaller improvements are rounding errors.
_ROUNDING = 1e-12

Grid = tuple[Tensor, Tensor]
"""Scale and zero of each group, `[groups]` in float32."""


@torch.no_grad()
def search(
    w: Tensor,
    levels: int,
    bits: int,
    group_size: int,
    axis: int,
    round_zero: bool,
    iterations: int,
    dtype: torch.dtype,
    old: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize as the operation `quantize`, each group with the best scale and zero of several candidates.

    The candidates of a group, of which the one with the smallest squared error is used, the first if errors are equal:

    1. `old`, so that a weight that is on these grids already is reproduced bit for bit;
    2. what HQQ's solver finds, so that no group is worse than with HQQ;
    3. what the search finds: the ranges of 5 x 5 grids, whose lower and upper ends are fractions of the group's own,
       then alternating least squares (levels, then scale and zero for these) from the best of them, then the gain.

    Scale and zero are rounded to `dtype` before they are compared, and levels and errors are those of the rounded
    values: in bfloat16 and 8 bits that rounding costs more than the levels.

    **The gain.** Least squares returns the projection of the weights on the levels, which is shorter than they are: the
    coefficient of W_q on W, <W_q, W> / <W, W> of a group without its mean, is R^2 < 1, .9 at 2 bits. An error of that
    kind has one sign in all layers, so it accumulates: the whole model gets worse although each layer's error is
    smaller. The scale is therefore divided by R^2, which makes the coefficient 1, and the zero keeps the mean. That
    costs a factor 1 / R^2 of squared error, before levels are rounded again. Where this makes a group worse than HQQ,
    candidate 2 is used; a candidate without gain would have a smaller error, but short weights.

    **The limit of clipping.** The smallest squared error clips the largest weights of groups with outliers. But single
    large weights can decide what a language model computes, and a squared error counts them as any other. No weight is
    clipped by more than one step between levels that cover the whole group; with normal weights that hardly changes the
    result.

    **The integer zero.** With `round_zero`, which HQQ has at 4 bits, the zero is an integer here too, so that small
    weights are stored as 0. With a free zero the squared error is smaller, but a whole model with groups of 192 was
    worse than with HQQ.

    Args:
        w, levels, bits, group_size, axis, round_zero, iterations, dtype: as for `quantize`; `iterations` are
            those of candidate 2.
        old: scale and zero of each group, of any shape, if a weight that had them is quantized again.

    Returns:
        As `quantize`. Groups are independent of each other but for candidate 2, for which HQQ's solver stops at the
        same iteration in all groups of `w`.
    """
    _, *by_hqq, _, _ = ops.quantize(w, levels, bits, group_size, axis, round_zero, iterations, dtype, None)
    candidates = [by_hqq] if old is None else [old, by_hqq]
    matrix = w.reshape((-1, group_size) if axis == 1 else (group_size, -1))
    stored = torch.empty(matrix.shape, dtype=torch.uint8, device=w.device)
    scale, zero = (torch.empty_like(x) for x in by_hqq)
    squares = w.new_zeros(2, dtype=torch.float64)
    columns, columns_stored = (x.t() if axis == 1 else x for x in (matrix, stored))  # [group_size, groups]
    count = max(1, (_CPU_CHUNK if w.device.type == "cpu" else _CHUNK) // group_size)
    for start in range(0, columns.shape[1], count):
        part = slice(start, start + count)
        chunk = columns[:, part].float().contiguous()
        given = [tuple(x.reshape(-1)[part].to(dtype).float() for x in pair) for pair in candidates]
        (best_scale, best_zero), errors = _best(
            chunk, levels - 1, [*given, _searched(chunk, levels - 1, round_zero, dtype)]
        )
        columns_stored[:, part] = _nearest(chunk, (best_scale, best_zero), levels - 1)
        scale.view(-1)[part], zero.view(-1)[part] = best_scale, best_zero
        squares += torch.stack([errors.sum(dtype=torch.float64), chunk.square().sum(dtype=torch.float64)])
    return pack(stored, bits), scale, zero, squares


def _nearest(w: Tensor, grid: Grid, top: int) -> Tensor:
    scale, zero = grid
    return (w / scale).add_(zero).round_().clamp_(0, top)


def _best(w: Tensor, top: int, candidates: list[Grid]) -> tuple[Grid, Tensor]:
    """The candidate with the smallest squared error in each column of `w` `[group_size, groups]`, and that error.

    Where no candidate has a finite error, the first is returned, with an infinite error.
    """
    rounding = w.square().sum(0) * _ROUNDING
    best, least = candidates[0], torch.full_like(rounding, torch.inf)
    for scale, zero in candidates:
        error = (_nearest(w, (scale, zero), top) - zero).mul_(scale).sub_(w).square_().sum(0)
        better = error < least - rounding
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
        least = torch.where(better, error, least)
    return best, least


def _searched(w: Tensor, top: int, round_zero: bool, dtype: torch.dtype) -> Grid:
    """The third candidate for each column of `w` `[group_size, groups]`, rounded to `dtype`.

    A grid is an inverse scale and a level: that of the column's mean, from which weights and levels are measured, or
    with `round_zero` an integer for the weight 0. What a fit is worth is the sum of squares that it explains,
    <q, w>^2 / <q, q>, or nothing if it clips too much. NaN where every fit does.
    """
    mean = w.new_zeros(w.shape[1]) if round_zero else w.mean(0)
    centred = w - mean
    low, high, scratch = centred.amin(0), centred.amax(0), torch.empty_like(w)
    limit = (high - low) * (_CLIPPED / top)

    def fit(inverse: Tensor, level: Tensor) -> Tensor:
        """Levels of grids `[count, groups]` and the grids that fit these best.

        Returns, stacked: what the levels explain, the inverse scale of least squares, the level, <q, w>.
        """
        level, covariance, square = torch.stack([level] * 3)
        for row, of_row in enumerate(inverse):
            q = torch.addcmul(level[row], centred, of_row, out=scratch).round_().clamp_(0, top)
            if not round_zero:
                torch.mean(q, 0, out=level[row])
            q.sub_(level[row])
            torch.linalg.vecdot(q, centred, dim=0, out=covariance[row])
            torch.linalg.vecdot(q, q, dim=0, out=square[row])
        # the sum of squares of integers about their mean is at least 1/2, if they are not all equal
        inverse = square.clamp_min_(0.5).div_(covariance)
        clipped = torch.maximum(-level / inverse - low, high - (top - level) / inverse)
        explained = torch.where(clipped <= limit, covariance / inverse, 0.0)
        return torch.stack([explained, inverse, level, covariance])

    # the fewer levels, the more it pays to clip outliers; the best ratio for normal weights is .4 at 2 bits
    ratios = torch.linspace(1 - 1.2 / math.sqrt(top + 1), 1, _RATIOS, device=w.device)[:, None]
    lower, upper = ratios.repeat_interleave(_RATIOS, 0), ratios.repeat(_RATIOS, 1)
    inverse = top / (high * upper - low * lower)
    level = inverse * lower * -low
    found = fit(inverse, level.round_() if round_zero else level)
    found = found.gather(1, found[:1].argmax(1, keepdim=True).expand(4, 1, -1))
    for _ in range(_STEPS):
        other = fit(found[1], found[2])
        better = other[:1] > found[:1] * (1 + 1e-6)
        if not better.any():
            break
        found = torch.where(better, other, found)
    explained, _, level, covariance = found[:, 0]
    scale = torch.where(explained > 0, centred.square().sum(0) / covariance, torch.nan).to(dtype).float()
    return scale, (level - mean / scale).to(dtype).float()
