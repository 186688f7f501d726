"""Folding rotations into a weight, and taking them out again.

A merged weight is always computed from the pristine one with the whole product of rotations, and quantized once. The
pristine packed weight is kept, so that unmerging restores it bit for bit.
"""

from __future__ import annotations

from typing import Literal

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor

from ..ops import table as ops
from ..ops.weight import QuantizedWeight

MergeInto = float | Literal["dense"] | None
"""What a merged layer becomes: an HQQ layer with its own settings (None), with that many bits, or a dense layer."""


def check_into(into: MergeInto) -> None:
    """Raise ValueError if `into` is not a valid `MergeInto`."""
    if into is not None and into != "dense" and into not in Quantizer.SUPPORTED_BITS:
        raise ValueError(f"into must be None, 'dense' or one of {Quantizer.SUPPORTED_BITS} bits, got {into!r}.")


Rotations = list[tuple[str, Tensor]]
"""Adapter name and `D = R - I` per adapter, in the order in which they are applied to the input."""


@torch.no_grad()
def rotate_weight(weight: QuantizedWeight, rotations: Rotations, check: bool) -> Tensor:
    """`W * (R_1 * ... * R_n)^T`, `[N, K]` in float32: the weight with the rotations folded in, R_1 applied first.

    Args:
        weight: the pristine weight.
        rotations: at least one.
        check: check for non-finite values after each rotation.

    Raises:
        ValueError: `check` found a non-finite value; the message names the adapter.
    """
    # (R_1 ... R_n)^T = R_n^T ... R_1^T: the last rotation is applied to the weight first
    *others, (name, d) = rotations
    dense = ops.dequantize_rotate(weight, d, torch.float32)
    if check:
        _check_finite(name, dense)
    return rotate_dense(dense, others, check)


@torch.no_grad()
def rotate_dense(weight: Tensor, rotations: Rotations, check: bool) -> Tensor:
    """As `rotate_weight` of a dense weight `[N, K]`, in its dtype."""
    for name, d in reversed(rotations):
        weight = ops.rotate(weight, d.to(weight.dtype), None, True)
        if check:
            _check_finite(name, weight)
    return weight


def _check_finite(name: str, dense: Tensor) -> None:
    if not torch.isfinite(dense).all():
        raise ValueError(
            f"NaN or infinity in the merged weights: the adapter {name!r} seems to be broken. Nothing was merged; "
            "remove or retrain that adapter."
        )


@torch.no_grad()
def inverse(rotations: Rotations) -> Rotations:
    """The rotations `R_n^-1, ..., R_1^-1`, which undo `rotate_weight`.

    A Cayley-Neumann series is only approximately orthogonal, so its transpose is not its inverse: each block is
    inverted, in float64.
    """
    inverted = []
    for name, d in reversed(rotations):
        wide = d.double()
        identity = torch.eye(d.shape[-1], dtype=torch.float64, device=d.device)
        inverted.append((name, torch.linalg.solve(identity + wide, -wide).to(d.dtype)))  # (I + D)^-1 - I
    return inverted


@torch.no_grad()
def relative_distance(stored: Tensor, exact: Tensor) -> float:
    """|stored - exact| / |exact|, in the dtype of `exact`; NaN if either is not finite."""
    return float((stored.to(exact.dtype) - exact).norm() / exact.norm().clamp_min(torch.finfo(exact.dtype).tiny))
