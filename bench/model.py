"""Bytes and operations that each operation needs, and the least time they take: what measurements are compared with.

A pass over memory takes as long as the slower of its two limits; passes follow one another. In each, every operand
counts once, whatever the caches hold. Launches cost nothing. A multiplication and an addition are two operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hqq_oft.ops.reference import series_coefficients

STORED_BITS = {8: 8, 6: 8, 5: 8, 4: 4, 3: 3.2, 2: 2, 1.58: 2, 1: 1}  # ten 3-bit levels take 4 bytes


@dataclass(frozen=True)
class Cost:
    """Bytes that one pass reads from memory and writes to it, and its operations, at the rate of the matrix units."""

    bytes: float
    operations: float

    def __add__(self, other: Cost) -> Cost:
        """The cost of both in one pass."""
        return Cost(self.bytes + other.bytes, self.operations + other.operations)


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer; None is: `block`, no rotation; `group`, one scale per row; `terms`, the exact map."""

    N: int
    K: int
    block: int | None = 32
    bits: float = 4
    group: int | None = 64
    element: int = 2  # bytes e of inputs, outputs, rotations, scales and zeros
    terms: int | None = 5

    @property
    def weight_bytes(self) -> float:
        """`N K (stored bits / 8 + 2 e / group)`."""
        return self.N * self.K * (STORED_BITS[self.bits] / 8 + 2 * self.element / (self.group or self.K))

    @property
    def rotation_bytes(self) -> int:
        """`K b e` for D, 0 without a rotation."""
        return self.K * (self.block or 0) * self.element


def predicted_seconds(passes: Cost | Iterable[Cost], bandwidth: float, rate: float) -> float:
    """Sum over the passes of `max(bytes / bandwidth, operations / rate)`, in bytes and operations per second."""
    passes = (passes,) if isinstance(passes, Cost) else passes
    return sum(max(cost.bytes / bandwidth, cost.operations / rate) for cost in passes)


def cayley(layer: Layer, terms: int | None = 5) -> Cost:
    """`v`, `K (b - 1) / 2` float32, to D; p - 1 products of `2 b^3` per block by Horner's rule, or LU and b solves."""
    b = layer.block or 1
    products = 4 / 3 if terms is None else max(0, len(series_coefficients(terms)) - 1)
    return Cost(layer.K * (b - 1) / 2 * 4 + layer.rotation_bytes, layer.K * 2 * b**2 * products)


def cayley_backward(layer: Layer, terms: int | None = 5) -> Cost:
    """`dD` in float32 and `v` to `dv`; Horner's rule for both factors and one with `dD`, or the LU and two products."""
    b = layer.block or 1
    products = 4 / 3 + 2 if terms is None else 3 * max(0, len(series_coefficients(terms)) - 1)
    return Cost(layer.K * b * 4 + layer.K * (b - 1) * 4, layer.K * 2 * b**2 * products)


def rotate(layer: Layer, tokens: int) -> Cost:
    """`x + x D`."""
    b = layer.block or 0
    return Cost(2 * tokens * layer.K * layer.element + layer.rotation_bytes, 2 * tokens * layer.K * b)


def rotate_backward(layer: Layer, tokens: int) -> Cost:
    """`dx = g + g D^T` and `dD = x^T g` per block, in float32, in one pass."""
    b = layer.block or 0
    moved = 3 * tokens * layer.K * layer.element + layer.rotation_bytes + 4 * layer.K * b
    return Cost(moved, 4 * tokens * layer.K * b)


def copy(layer: Layer) -> Cost:
    """The dense weight read and written."""
    return Cost(2 * layer.N * layer.K * layer.element, 0)


def dequantize(layer: Layer) -> Cost:
    """`(level - zero) scale`."""
    return Cost(layer.weight_bytes + layer.N * layer.K * layer.element, 2 * layer.N * layer.K)


def dequantize_rotate(layer: Layer) -> Cost:
    """`W + W D^T` from the packed weight."""
    return dequantize(layer) + Cost(layer.rotation_bytes, 2 * layer.N * layer.K * (layer.block or 0))


def gemm(layer: Layer, tokens: int, packed: bool = False) -> Cost:
    """A product, `x W^T` or `dy W`, with the dense or the packed weight."""
    weight = layer.weight_bytes if packed else layer.N * layer.K * layer.element
    return Cost(tokens * (layer.K + layer.N) * layer.element + weight, 2 * tokens * layer.N * layer.K)


def linear(layer: Layer, tokens: int, *, scratch: bool) -> tuple[Cost, ...]:
    """`x R W^T`: fused in one pass that rotates x, or `dequantize_rotate` into a scratch and a dense product."""
    if scratch:
        return dequantize_rotate(layer), gemm(layer, tokens)
    rotation = Cost(layer.rotation_bytes, 2 * tokens * layer.K * (layer.block or 0))
    return (gemm(layer, tokens, packed=True) + rotation,)


def linear_backward(layer: Layer, tokens: int, *, scratch: bool) -> tuple[Cost, ...]:
    """`g = dy W`, fused or by a scratch, then `rotate_backward` if there is a rotation."""
    product = (dequantize(layer), gemm(layer, tokens)) if scratch else (gemm(layer, tokens, packed=True),)
    return product if layer.block is None else (*product, rotate_backward(layer, tokens))
