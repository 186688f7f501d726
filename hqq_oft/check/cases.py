"""What is checked: formats, sizes and random arguments of the operations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..ops import reference
from ..ops.packing import LEVELS_PER_ELEMENT
from ..ops.weight import QuantizedWeight

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = (1, 8, 16, 64, 512)
LARGE: dict[str, Any] = {"n": 4096, "k": 4096}
_FEWER_TOKENS = (1, 64, 512)
_FORMATS = [*product((4, 8, 3, 2, 1), (64, 128), (1,)), (4, 64, 0), (4, 128, 0)]  # bits, group, axis
_BLOCKS = (32, 16, 64)


@dataclass(frozen=True)
class Case:
    """One call: an operation, and of a layer `[n, k]` what the operation depends on.

    Attributes:
        operation: its name.
        dtype: of activations, scale, zero and D.
        block: OFT block size; None for a product without rotation.
        terms: of the Cayley-Neumann series; None for the exact map.
        m: tokens.
        adapters: how many are mixed, row by row; 0 for one adapter and no index.
    """

    operation: str
    dtype: str = "bf16"
    block: int | None = 32
    terms: int | None = 5
    m: int = 1
    adapters: int = 0
    bits: int = 4
    group: int = 64
    axis: int = 1
    n: int = 384
    k: int = 1024

    @property
    def label(self) -> str:
        """What the call depends on, in one line."""
        words = [self.operation, self.dtype, "no rotation" if self.block is None else f"b={self.block}"]
        if self.operation.startswith("cayley"):
            return " ".join([*words, f"terms={self.terms}"])
        if not self.operation.startswith("rotate"):
            words[1:1] = [f"{self.n}x{self.k}", f"{self.bits} bits", f"group {self.group}", f"axis {self.axis}"]
        if not self.operation.startswith("dequantize"):
            words += [f"M={self.m}"] + [f"of {self.adapters} adapters"] * bool(self.adapters)
        return " ".join(words)


def all_cases() -> list[Case]:
    """Each pair of a format, a dtype and a block size; bfloat16 with every M, the other dtypes with fewer.

    And of the default format a large layer, products without rotation, and batches that mix adapters.
    """
    cases = []
    for block, terms in product(_BLOCKS, (5, None)):
        cases += [Case("cayley", dtype, block, terms) for dtype in DTYPES]
        cases += [Case("cayley_backward", "fp32", block, terms)]
    cases += [Case("project_", "fp32", block) for block in _BLOCKS]
    for dtype, block in product(DTYPES, _BLOCKS):
        for name, m in product(("rotate", "rotate_backward"), _tokens(dtype)):
            cases += [Case(name, dtype, block, m=m)]
    layers = [Case("linear", **LARGE)]
    for (i, (bits, group, axis)), (j, dtype) in product(enumerate(_FORMATS), enumerate(DTYPES)):
        block = _BLOCKS[(i + j) % len(_BLOCKS)]
        layers += [Case("linear", dtype, block, bits=bits, group=group, axis=axis)]
    for name, layer in product(("dequantize", "dequantize_rotate", "quantize"), layers):
        cases += [replace(layer, operation=name)]
    for layer in [*layers, Case("linear", block=None), Case("linear", adapters=2)]:
        for name, m in product(("linear", "linear_backward"), _tokens(layer.dtype)):
            cases += [replace(layer, operation=name, m=m)]
    return cases


def _tokens(dtype: str) -> tuple[int, ...]:
    return TOKENS if dtype == "bf16" else _FEWER_TOKENS


def quantized_weight(
    n: int, k: int, device: Any, *, bits: int = 4, group: int = 64, axis: int = 1, dtype: torch.dtype = torch.bfloat16
) -> QuantizedWeight:
    """Random packed levels, scale and zero; rows of about unit norm."""
    groups, levels, fields = n * k // group, 2**bits, LEVELS_PER_ELEMENT[bits]
    rows, columns = (groups, group) if axis == 1 else (group, groups)
    largest, storage = (2**30, torch.int32) if bits == 3 else (256, torch.uint8)
    packed = torch.randint(0, largest, (-(-rows // fields), columns), dtype=storage, device=device)
    deviation = math.sqrt((levels**2 - 1) / 12)
    scale = (0.5 + torch.rand(groups, device=device)) / (deviation * math.sqrt(k))
    zero = (levels - 1) * (0.4 + 0.2 * torch.rand(groups, device=device))
    return QuantizedWeight(packed, scale.to(dtype), zero.to(dtype), n, k, bits, group, axis)


def skew_parameters(blocks: int, b: int, device: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks of the same spectral norm, about 0.4, for any b."""
    return (torch.randn(blocks, b * (b - 1) // 2, device=device) * (0.2 / math.sqrt(b))).to(dtype)


def arguments(case: Case, device: torch.device) -> tuple[Any, ...]:
    """Random arguments of the case's call."""
    dtype, b = DTYPES[case.dtype], case.block

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    d = index = None
    if b is not None:
        v = skew_parameters(case.k // b, b, device)
        if case.operation == "cayley":
            return v, b, case.terms, None, None, dtype
        if case.operation == "cayley_backward":
            return torch.randn(case.k // b, b, b, device=device), v, b, case.terms, None, None
        if case.operation == "project_":
            return v, 0.5 * float(v.norm(dim=1).mean())
        d = reference.cayley(v, b, case.terms, None, None, dtype)
    if d is not None and case.adapters:
        d = torch.stack([d * (adapter + 1) / case.adapters for adapter in range(case.adapters)])
        index = torch.randint(-1, case.adapters, (case.m,), device=device)
    if case.operation == "quantize":
        settings = 2**case.bits, case.bits, case.group, case.axis, case.bits == 4, 20, dtype, None
        return 0.02 * normal(case.n, case.k), *settings
    x = normal(case.m, case.k)
    if case.operation == "rotate":
        return x, d, index, False
    if case.operation == "rotate_backward":
        return normal(case.m, case.k), x, d, index, False, True, True
    weight = quantized_weight(case.n, case.k, device, bits=case.bits, group=case.group, axis=case.axis, dtype=dtype)
    if case.operation == "dequantize":
        return weight, dtype
    if case.operation == "dequantize_rotate":
        return weight, d, dtype
    if case.operation == "linear":
        return x, weight, d, normal(case.n), index
    return normal(case.m, case.n), x, weight, d, index, True, d is not None
