"""Quantizing a weight that is computed a band at a time, so that it is never dense as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import checks
from ..ops import table as ops
from ..ops.packing import LEVELS_PER_ELEMENT, set_rows
from ..ops.quantizer import iterations_taken
from ..ops.weight import QuantizedWeight

# Of a band, at least. On a CPU a float32 band of this size stays in a core's cache; elsewhere it pays for launches.
CPU_ELEMENTS, ELEMENTS = 1 << 20, 1 << 24


@dataclass(frozen=True)
class Bands:
    """A dense weight `[N, K]` as a function of a quantized one, row by row.

    Attributes:
        weight: the quantized weight.
        transform: the dense weight of a band of `weight`, or of all of it, in float32.
    """

    weight: QuantizedWeight
    transform: Callable[[QuantizedWeight], Tensor]

    @property
    def shape(self) -> torch.Size:
        """`[N, K]`."""
        return torch.Size(self.weight.shape)

    def dense(self) -> Tensor:
        """The weight as a whole."""
        return self.transform(self.weight)

    def spans(self) -> list[tuple[int, int]]:
        """First and last group of each band; one band if the weight is small, or cannot be divided into bands."""
        weight = self.weight
        unit = weight.groups_of_a_band
        least = CPU_ELEMENTS if weight.device.type == "cpu" else ELEMENTS
        step = -(-least // (unit * weight.group_size)) * unit
        return [(first, min(first + step, weight.groups)) for first in range(0, weight.groups, step)]


def quantize(
    bands: Bands, levels: int, bits: int, round_zero: bool, iterations: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operation `quantize` of `bands.dense()` in groups as those of `bands.weight`, to the same bytes.

    The solver's last iteration is decided by the whole weight's errors, known after the last band; a band that would
    stop at another iteration is computed again. Most run to the limit of iterations.

    Args:
        bands: the weight.
        levels, bits, round_zero, iterations, dtype: as for the operation.

    Returns:
        As the operation.
    """
    weight, spans = bands.weight, bands.spans()
    rows, columns = weight.level_shape
    checks.packable(rows, bits)
    packed = weight.packed.new_zeros(
        (-(-rows // LEVELS_PER_ELEMENT[bits]), columns), dtype=torch.int32 if bits == 3 else torch.uint8
    )
    scale, zero = (weight.scale.new_empty(weight.groups, dtype=dtype) for _ in range(2))
    squares = packed.new_empty(len(spans), 2, dtype=torch.float64)
    errors = packed.new_empty(len(spans), iterations, dtype=torch.float64)

    def solve(i: int, mean_errors: Tensor | None) -> None:
        first, last = spans[i]
        part, scale_part, zero_part, squares[i], errors[i] = ops.quantize(
            bands.transform(weight.band(first, last)),
            levels,
            8 if weight.axis == 1 else bits,
            weight.group_size,
            weight.axis,
            round_zero,
            iterations,
            dtype,
            mean_errors,
        )
        scale[first:last], zero[first:last] = scale_part.flatten(), zero_part.flatten()
        if weight.axis == 1:
            set_rows(packed, bits, first, part)
        else:
            packed[:, first:last] = part

    for i in range(len(spans)):
        solve(i, None)
    mean_errors = errors.sum(dim=0) / (rows * columns)
    sizes = errors.new_tensor([(last - first) * weight.group_size for first, last in spans])
    taken, *of_bands = map(iterations_taken, torch.cat([mean_errors[None], errors / sizes[:, None]]).cpu())
    for i, of_band in enumerate(of_bands):
        if of_band != taken:
            solve(i, mean_errors)
    shape = (-1, 1) if weight.axis == 1 else (1, -1)
    return packed, scale.reshape(shape), zero.reshape(shape), squares.sum(dim=0)
