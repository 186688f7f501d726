"""A layer to measure: its shape and settings, random packed levels, which are what a kernel sees, a random rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor, nn

from hqq_oft import QuantizedWeight
from hqq_oft.check.cases import DTYPES, quantized_weight, skew_parameters
from hqq_oft.ops import reference

from . import model


@dataclass(frozen=True)
class Setting:
    """How a layer is quantized and rotated; `exact`: by the Cayley map instead of the series of five terms."""

    bits: int = 4
    group: int = 64
    axis: int = 1
    block: int = 32
    dtype: str = "bf16"
    share: bool = False
    exact: bool = False

    @property
    def label(self) -> str:
        """Short text, unique among settings."""
        extra = (" shared" if self.share else "") + (" exact" if self.exact else "")
        return f"{self.bits}-bit g{self.group} axis {self.axis} b={self.block} {self.dtype}{extra}"

    @property
    def terms(self) -> int | None:
        """Of the series; None for the exact map."""
        return None if self.exact else 5

    def layer(self, n: int, k: int) -> model.Layer:
        """The layer in the cost model."""
        return model.Layer(n, k, self.block, self.bits, self.group, DTYPES[self.dtype].itemsize, self.terms)


def buffer_sets(layer: model.Layer, device: torch.device) -> int:
    """How many sets of buffers of a layer no GPU's cache holds."""
    return max(1, min(64, math.ceil((160 << 20) / layer.weight_bytes))) if device.type == "cuda" else 1


def hqq_layer(weight: QuantizedWeight, dtype: torch.dtype) -> HQQLinear:
    """An `HQQLinear` that holds the weight's tensors."""
    settings = BaseQuantizeConfig(nbits=weight.bits, group_size=weight.group_size, axis=weight.axis)
    # HQQ fills in the rest of its meta data when it quantizes something.
    small = nn.Linear(weight.group_size, 40, bias=False).requires_grad_(False)
    layer = HQQLinear(small, settings, compute_dtype=dtype, device="cpu")
    layer.in_features, layer.out_features = weight.in_features, weight.out_features
    layer.W_q = nn.Parameter(weight.packed, requires_grad=False)
    layer.device, layer.bias = str(weight.packed.device), None
    scale, zero = (t.view((-1, 1) if weight.axis == 1 else (1, -1)) for t in (weight.scale, weight.zero))
    layer.meta.update(scale=scale, zero=zero, shape=torch.Size((weight.out_features, weight.in_features)))
    return layer


class Problem:
    """One layer `[n, k]` with random contents, created on first use, in `copies` equal sets of buffers."""

    def __init__(self, n: int, k: int, setting: Setting, device: torch.device, copies: int = 1) -> None:
        self.n, self.k, self.setting, self.device, self.copies = n, k, setting, device, copies
        self.dtype, self.layer = DTYPES[setting.dtype], setting.layer(n, k)

    @cached_property
    def weights(self) -> list[QuantizedWeight]:
        """One weight per set of buffers."""
        s = self.setting
        first = quantized_weight(self.n, self.k, self.device, bits=s.bits, group=s.group, axis=s.axis, dtype=self.dtype)
        more = ([t.clone() for t in (first.packed, first.scale, first.zero)] for _ in range(self.copies - 1))
        return [first, *(replace(first, packed=packed, scale=scale, zero=zero) for packed, scale, zero in more)]

    @cached_property
    def v(self) -> Tensor:
        """Skew parameters in float32, as PEFT makes them."""
        stored = 1 if self.setting.share else self.k // self.setting.block
        return skew_parameters(stored, self.setting.block, self.device)

    @cached_property
    def d(self) -> Tensor:
        """`D = R - I` in the problem's dtype."""
        return reference.cayley(self.v.double(), self.setting.block, self.setting.terms, None, None, self.dtype)

    @cached_property
    def dense(self) -> Tensor:
        """The weight, `[N, K]`, in the problem's dtype."""
        return reference.dequantize(self.weights[0], self.dtype)

    def inputs(self, m: int) -> list[Tensor]:
        """Random `[m, K]`, one per set of buffers."""
        return [torch.randn(m, self.k, device=self.device).to(self.dtype) for _ in range(self.copies)]

    def truth(self, x: Tensor, rotated: bool) -> Tensor:
        """The product in float64."""
        x = reference.rotate(x.double(), self.d.double(), None, False) if rotated else x.double()
        return x @ reference.dequantize(self.weights[0], torch.float64).T
