"""Result of `quantize_model`: what was quantized, what was not and why, and the sizes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate.utils import compute_module_sizes
from hqq.core.quantize import HQQLinear
from torch import nn
from tqdm import tqdm

from .settings import QuantizationSettings

_SMALLEST_SHARE_SHOWN = 0.01


@dataclass
class QuantizationReport:
    """Result of `quantize_model`.

    Attributes:
        quantized: settings of each quantized layer, by name.
        errors: relative error of each quantized layer's weight, |W_q - W| / |W|, by name.
        kept: reason for each linear layer that was not quantized, by name.
        dense: bytes, before, of each parameter and buffer that was not quantized, by name; tied ones once.
        bytes_before: size of the model's parameters and buffers before.
        bytes_after: the same afterwards, including scales and zeros.
    """

    quantized: dict[str, QuantizationSettings] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    dense: dict[str, int] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def quantized_share(self) -> float:
        """Share of the bytes before that belongs to quantized weights, 0 to 1."""
        return 1 - sum(self.dense.values()) / max(self.bytes_before, 1)

    def dense_shares(self) -> dict[str, float]:
        """Shares of the bytes before that stay dense, largest first; names that differ in numbers only are summed."""
        sums: Counter[str] = Counter()
        for name, size in self.dense.items():
            sums[_without_numbers(name)] += size
        return {name: size / max(self.bytes_before, 1) for name, size in sums.most_common()}

    def mostly_dense(self) -> str | None:
        """A warning that names the largest dense weights if less than half of the bytes were quantized."""
        if self.quantized_share >= 0.5:
            return None
        largest = [f"{name} {share:.0%}" for name, share in self.dense_shares().items() if share >= 0.05]
        return f"only {self.quantized_share:.0%} of the model's bytes were quantized; dense are {', '.join(largest)}."

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} layer(s) quantized, {len(self.kept)} kept; "
            f"{tqdm.format_sizeof(self.bytes_before, 'B')} before, {tqdm.format_sizeof(self.bytes_after, 'B')} after"
        ]
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            lines += [f"  largest relative error of a weight: {self.errors[worst]:.2%} at {worst}"]
        lines += [f"  kept {name}: {reason}" for name, reason in _grouped(self.kept).items()]
        shares = self.dense_shares()
        lines += [f"  dense {name}: {shares[name]:.1%}" for name in shares if shares[name] >= _SMALLEST_SHARE_SHOWN]
        return "\n".join(lines)


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _grouped(reasons: Mapping[str, str]) -> dict[str, str]:
    """Reasons by name, where several names that differ in numbers only have the same reason, by their pattern."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault((_without_numbers(name), reason), []).append(name)
    return {
        names[0] if len(names) == 1 else f"{pattern} ({len(names)} layers)": reason
        for (pattern, reason), names in groups.items()
    }


def stored_bytes(model: nn.Module) -> int:
    """Size in bytes of a model's parameters and buffers, including the metadata tensors of HQQ layers."""
    parameters = {id(parameter) for parameter in model.parameters()}
    layers = [module for module in model.modules() if isinstance(module, HQQLinear)]
    extra = [v for layer in layers for v in (*layer.meta.values(), layer.bias) if isinstance(v, torch.Tensor)]
    return int(compute_module_sizes(model)[""]) + sum(value.nbytes for value in extra if id(value) not in parameters)


def dense_bytes(model: nn.Module, quantized: Mapping[int, int]) -> dict[str, int]:
    """Bytes of each parameter and buffer by name, less those that are quantized.

    Args:
        model: the model.
        quantized: how many bytes of a parameter are to be quantized, by its id; those of HQQ layers are left out.
    """
    seen: set[int] = set()
    sizes: dict[str, int] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, HQQLinear):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                sizes[f"{prefix}.{name}" if prefix else name] = tensor.nbytes - quantized.get(id(tensor), 0)
    return {name: size for name, size in sizes.items() if size}
