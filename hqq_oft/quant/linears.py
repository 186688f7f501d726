"""The weights of a model that are those of linear layers, whatever module holds them.

Besides `nn.Linear` these are transformers' `Conv1D`, which stores its weight transposed, and the experts of a mixture.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hqq.core.quantize import HQQLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .experts import Experts, fused_experts, is_fused, linear_of, why_not_split

SAME_FUNCTION = frozenset({"FalconLinear"})
"""Subclasses of `nn.Linear` that compute the same function."""


@dataclass(frozen=True)
class LinearLayer:
    """A weight that can be quantized.

    Attributes:
        name: name of the layer; that of an expert's layer does not exist in the model yet.
        linear: the layer: a module of the model, or one with a view of the weight.
        module: the module of the model that holds the weight.
        parameter: its weight.
        experts: what replaces `module` if it is a mixture of experts.
        why_not: why the layer can't be quantized, or None.
    """

    name: str
    linear: nn.Linear
    module: nn.Module
    parameter: Tensor
    experts: Experts | None = None
    why_not: str | None = None


def linear_layers(model: nn.Module) -> Iterator[LinearLayer]:
    """Every linear layer of a model, by each of its names; the model is not changed."""
    split: dict[nn.Module, Experts] = {}
    converted: dict[nn.Module, nn.Linear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            yield LinearLayer(name, module, module, module.weight, why_not=why_never(model, name))
        elif type(module) is Conv1D:
            linear = converted.setdefault(module, _from_conv1d(module))
            yield LinearLayer(name, linear, module, module.weight, why_not=why_never(model, name))
        elif is_fused(module) and why_not_split(module) is None:
            experts = split.get(module) or split.setdefault(module, Experts(module))
            for part, layer in experts.named_modules():
                if isinstance(layer, nn.Linear) and part.partition(".")[0].isdecimal():
                    parameter = module._parameters[part.rpartition(".")[2]]
                    assert parameter is not None
                    yield LinearLayer(f"{name}.{part}", layer, module, parameter, experts)


def why_never(model: nn.Module, name: str) -> str | None:
    """Why a linear layer of a model must stay dense, whatever the settings; None if it need not."""
    module = model.get_submodule(name)
    kind = type(module)
    if kind not in (nn.Linear, Conv1D) and kind.__name__ not in SAME_FUNCTION:
        return f"it is a {kind.__name__}, which may compute a different function"
    if reads_weight(model, name):
        return f"{type(model.get_submodule(name.rpartition('.')[0])).__name__} reads its weight"
    return None


def reads_weight(model: nn.Module, name: str) -> bool:
    """Whether the module around a layer computes with the layer's weight, as Mamba's mixers do, without calling it."""
    parent, _, child = name.rpartition(".")
    parent_class: Any = type(model.get_submodule(parent))
    return bool(child) and child in _weights_read_by(parent_class)


# Not dtypes, devices and shapes. Bloom reads slices of weights, but only if `slow_but_exact` is set.
_READ = re.compile(r"(?<!isinstance\()self\.(\w+)\.weight\b(?!\[|\.(?:dtype|device|shape)\b)")


@functools.cache
def _weights_read_by(module_class: Any) -> frozenset[str]:
    """Names of the children of a module whose weights its methods read in any of their branches."""
    names: set[str] = set()
    for owner in module_class.__mro__[: module_class.__mro__.index(nn.Module)]:
        for method_name, method in vars(owner).items():
            if inspect.isfunction(method) and not re.search("init|reset", method_name):
                try:
                    source = inspect.getsource(method)
                except (OSError, TypeError):  # defined in an interactive session
                    continue
                names.update(re.findall(_READ, source))
    return frozenset(names)


def _from_conv1d(module: Conv1D) -> nn.Linear:
    linear = linear_of(module.weight.data.T, module.bias.data, module.weight.requires_grad).train(module.training)
    linear.from_conv1d = True  # type: ignore[assignment]
    return linear


def mark_origin(source: nn.Module, layer: nn.Module) -> None:
    """Have `layer`, which replaces `source`, remember whether it replaces a `Conv1D`."""
    if getattr(source, "from_conv1d", False):
        layer.from_conv1d = True  # type: ignore[assignment]


def as_in_the_model(layer: HQQLinear, linear: nn.Linear) -> nn.Module:
    """What replaces the HQQ layer of a model if it becomes dense: `linear`, or a `Conv1D` with the same function."""
    if not getattr(layer, "from_conv1d", False):
        return linear
    conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.data.T.contiguous(), linear.weight.requires_grad)
    if linear.bias is not None:
        conv.bias = linear.bias
    return conv.train(linear.training)


def expose(model: nn.Module, is_quantized: Callable[[str], bool]) -> None:
    """Replace each `Conv1D` and each mixture of experts by linear layers where one of them is quantized, in place."""
    replacements: dict[str, nn.Module] = {}
    for layer in linear_layers(model):
        if layer.module is not layer.linear and is_quantized(layer.name):
            if layer.experts is None:
                replacements[layer.name] = layer.linear
            # transformers 4.57 stored experts with a `gate_proj`, and also a `down_proj`.
            elif not is_quantized(f"{layer.name.rpartition('.')[0]}.gate_proj"):
                replacements.update(dict.fromkeys(names_of(model, layer.module), layer.experts))
    for name, module in replacements.items():
        replace(model, name, module)


def fuse_dense(model: nn.Module) -> None:
    """Restore the original module of each mixture of experts none of whose layers is quantized, in place.

    If one of them can't be restored, for lack of memory for instance, none is.
    """
    dense = [
        (name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Experts) and not any(isinstance(layer, HQQLinear) for layer in module.modules())
    ]
    fused = {experts: experts.fuse() for experts in dict.fromkeys(experts for _, experts in dense)}
    for name, experts in dense:
        replace(model, name, fused[experts])


def names_of(model: nn.Module, module: nn.Module) -> list[str]:
    """All names of a module in a model."""
    return [name for name, other in model.named_modules(remove_duplicate=False) if other is module]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set the module at `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def unsplit_experts(model: nn.Module) -> dict[str, str]:
    """The reason for each mixture of experts, by name, that can't be quantized."""
    reasons = {name: why_not_split(module) for name, module in fused_experts(model)}
    return {name: reason for name, reason in reasons.items() if reason}
