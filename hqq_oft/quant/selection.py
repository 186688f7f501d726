"""Which layers of a model are quantized, with which settings, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from hqq.core.quantize import HQQLinear
from torch import nn

from .defaults import kept_by_default
from .experts import Experts
from .linears import linear_layers, unsplit_experts
from .report import QuantizationReport, dense_bytes
from .settings import Overrides, QuantizationSettings, overridden


def matches(name: str, pattern: str) -> bool:
    """Whether a module's full name equals `pattern`, ends with `.pattern`, or matches it as a shell pattern."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


@dataclass
class Selection:
    """What to quantize.

    Attributes:
        layers: the layers, each with all its names.
        sources: the module of the model that holds the weight of each layer.
        experts: modules to put into the model, by name, before the layers below that name.
    """

    layers: dict[nn.Linear, list[str]] = field(default_factory=dict)
    sources: dict[nn.Linear, nn.Module] = field(default_factory=dict)
    experts: dict[str, Experts] = field(default_factory=dict)


def select(
    model: nn.Module,
    default: QuantizationSettings,
    skip_modules: Sequence[str],
    overrides: Overrides,
    report: QuantizationReport,
    known_skips: Iterable[str] = (),
) -> Selection:
    """The layers to quantize. Adds every linear layer and dense weight to the report.

    Args:
        model: the model, which may be on the meta device; it is not changed.
        default: settings of layers without an override.
        skip_modules: names of modules to leave dense; each must match a module.
        overrides: as for `quantize_model`.
        report: the report to fill.
        known_skips: further names to leave dense, which need not match.

    Raises:
        ValueError: as `quantize_model`.
    """
    if isinstance(skip_modules, str):
        raise ValueError(f"skip_modules must be a list of names, got the string {skip_modules!r}.")
    modules = dict(model.named_modules(remove_duplicate=False))
    candidates = list(linear_layers(model))
    names = {*modules, *(part for layer in candidates for part in _containing(layer.name))}
    if unmatched := [pattern for pattern in skip_modules if not any(matches(name, pattern) for name in names)]:
        raise ValueError(f"skip_modules match no module of the model: {unmatched}.")
    skips = [*skip_modules, *known_skips]
    settings_of = {pattern: overridden(default, pattern, values) for pattern, values in overrides.items()}
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    kept_unless_named = kept_by_default(model, {layer.name: layer.module for layer in candidates})
    already = {name: "it is already an HQQ layer" for name, module in modules.items() if isinstance(module, HQQLinear)}
    report.kept |= already | unsplit_experts(model)
    selection, sizes = Selection(), Counter[int]()
    unused, unpackable = set(overrides), {}
    for layer in candidates:
        name, linear = layer.name, layer.linear
        if not name:
            raise ValueError("the model is a single linear layer; use hqq.core.quantize.HQQLinear for one layer.")
        fitting = [pattern for pattern in overrides if matches(name, pattern)]
        unused.difference_update(fitting)
        settings = settings_of[fitting[-1]] if fitting else default
        # A shell pattern such as "model.layers.0.*" does not name the router among the layers that it matches.
        named = settings is not None and any(not set("*?[") & set(pattern) for pattern in fitting)
        if layer.why_not is not None:
            report.kept[name] = layer.why_not
        elif any(matches(part, pattern) for pattern in skips for part in _containing(name)):
            report.kept[name] = "it matches skip_modules"
        elif uses[id(layer.parameter)] > 1:
            report.kept[name] = "its weight is tied to another module's"
        elif settings is None:
            report.kept[name] = f"overrides[{fitting[-1]!r}] leaves it dense"
        elif name in kept_unless_named and not named:
            report.kept[name] = kept_unless_named[name]
        elif why := settings.why_not(linear):
            if named:
                raise ValueError(f"{name}: {why}; {_ANOTHER_GROUP.format(name)}")
            report.kept[name] = unpackable[name] = why
        else:
            if linear not in selection.layers:
                selection.sources[linear] = layer.module
                sizes[id(layer.parameter)] += linear.weight.nbytes
            report.quantized[name] = settings
            selection.layers.setdefault(linear, []).append(name)
            if layer.experts is not None:
                selection.experts[".".join(name.split(".")[:-2])] = layer.experts
    if unused:
        raise ValueError(f"overrides match no linear layer of the model: {sorted(unused)}.")
    if unpackable and not selection.layers and not already:
        name, why = next(iter(unpackable.items()))
        raise ValueError(f"no layer can be packed with these settings. {name}: {why}; {_ANOTHER_GROUP.format(name)}")
    report.dense = dense_bytes(model, sizes)
    return selection


_ANOTHER_GROUP = "choose another group_size for it with overrides={{{!r}: {{'group_size': ...}}}}, or skip it."


def _containing(name: str) -> list[str]:
    """The name of a module and those of the modules that contain it."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def check_layer(name: str, module: nn.Module, linear: nn.Linear) -> None:
    """Raise ValueError if a layer, whose weight `module` holds, can't be quantized whatever the settings."""
    if linear.weight.is_meta:
        raise ValueError(f"{name} is on the meta device: load the model's weights first, without offloading.")
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise ValueError(
            f"{name} has hooks, which would be lost: load the model without device_map, or remove them "
            "(accelerate.hooks.remove_hook_from_module), and choose the device with device=."
        )
    if not torch.isfinite(linear.weight).all():
        raise ValueError(f"{name}: its weight contains NaN or infinity.")
