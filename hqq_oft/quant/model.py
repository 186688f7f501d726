"""`quantize_model` replaces the linear layers of a model by HQQ layers, in place, one at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate.utils import compute_module_sizes
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm
from transformers import PretrainedConfig

from ..ops.packing import LEVELS_PER_ELEMENT, PACKING_BITS
from . import hqq_layer, marks, quantizer
from .solver import Solver, check_solver

logger = logging.getLogger("hqq_oft")

Overrides = Mapping[str, Mapping[str, Any] | None]

_SKIPPED = ("lm_head",)


@dataclass(frozen=True)
class QuantizationSettings:
    """Quantization settings of one layer.

    Attributes:
        nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        group_size: weights per scale and zero: a multiple of 8, or None for a whole row (axis 1) or column (axis 0).
        axis: axis of the groups: 1 along a row, 0 down a column.

    Raises:
        ValueError: a value is out of range.
        TypeError: `from_hqq` got another kind of configuration.
    """

    nbits: float = 4
    group_size: int | None = 64
    axis: int = 1

    def __post_init__(self) -> None:
        if self.nbits not in Quantizer.SUPPORTED_BITS:
            raise ValueError(f"nbits must be one of {Quantizer.SUPPORTED_BITS}, got {self.nbits!r}.")
        size = self.group_size
        if size is not None and (not isinstance(size, int) or size <= 0 or size % 8):
            raise ValueError(f"group_size must be a positive multiple of 8, or None for a whole row; got {size!r}.")
        if self.axis not in (0, 1):
            raise ValueError(f"axis must be 0 or 1, got {self.axis!r}.")

    def check(self, name: str, linear: nn.Linear) -> None:
        """Raise ValueError if a layer can't be quantized with these settings."""
        rows, columns = linear.weight.shape
        group = self.group_size or (columns if self.axis == 1 else rows)
        if rows * columns % group:
            raise ValueError(
                f"{name}: group_size={group} does not divide the {rows}x{columns} weights; choose another for it with "
                f"overrides={{{name!r}: {{'group_size': ...}}}}, or skip it."
            )
        levels = rows * columns // group if self.axis == 1 else group
        fields = LEVELS_PER_ELEMENT[PACKING_BITS[Quantizer.bit_to_packing[self.nbits]]]
        if self.nbits != 3 and levels % fields:
            raise ValueError(
                f"{name}: its {levels} rows of levels can't be packed {fields} per byte at {self.nbits} bits; choose "
                f"another group_size for it with overrides={{{name!r}: {{'group_size': ...}}}}, or skip it."
            )

    @classmethod
    def from_hqq(cls, config: Any) -> QuantizationSettings:
        """The settings in HQQ's `BaseQuantizeConfig` or transformers' `HqqConfig`.

        Other options than number of bits, group size and axis must have the values that `BaseQuantizeConfig` gives
        them: quantized or offloaded scales and zeros, in particular, are refused.
        """
        config = getattr(config, "quant_config", config)
        accepted = "accepted are BaseQuantizeConfig(nbits=..., group_size=..., axis=...) and HqqConfig of the same"
        if not isinstance(config, Mapping):
            raise TypeError(f"quant_config is a {type(config).__name__}; {accepted}.")
        weight = config.get("weight_quant_params")
        if not isinstance(weight, Mapping):
            raise ValueError(f"quant_config has no weight_quant_params; {accepted}; use overrides= for dynamic_config.")
        settings = cls(**{name: weight[name] for name in ("nbits", "group_size", "axis") if name in weight})
        usual = settings.for_hqq()
        found = {**weight, **{key: value for key, value in config.items() if key != "weight_quant_params"}}
        expected = {**usual.pop("weight_quant_params"), **usual}
        if odd := [f"{key}={value!r}" for key, value in found.items() if value != expected.get(key)]:
            raise ValueError(f"quant_config: {', '.join(odd)} is not supported; {accepted}.")
        return settings

    def for_hqq(self) -> dict[str, Any]:
        """The settings as HQQ's `quant_config`."""
        return BaseQuantizeConfig(nbits=self.nbits, group_size=self.group_size, axis=self.axis)


@dataclass
class QuantizationReport:
    """Result of `quantize_model`.

    Attributes:
        quantized: settings of each quantized layer, by name.
        errors: relative error of each quantized layer's weight, |W_q - W| / |W|, by name.
        kept: reason for each linear layer that was not quantized, by name.
        bytes_before: size of the model's parameters and buffers before.
        bytes_after: the same afterwards, including scales and zeros.
    """

    quantized: dict[str, QuantizationSettings] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        lines = [
            f"{len(self.quantized)} layer(s) quantized, {len(self.kept)} kept; "
            f"{tqdm.format_sizeof(self.bytes_before, 'B')} before, {tqdm.format_sizeof(self.bytes_after, 'B')} after"
        ]
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            lines += [f"  largest relative error of a weight: {self.errors[worst]:.2%} at {worst}"]
        lines += [f"  kept {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def quantize_model(
    model: nn.Module,
    *,
    nbits: float = 4,
    group_size: int | None = 64,
    axis: int = 1,
    quant_config: Any = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    skip_modules: Sequence[str] = _SKIPPED,
    overrides: Overrides | None = None,
    solver: Solver = "hqq",
    progress: bool = True,
) -> QuantizationReport:
    """Quantize the `nn.Linear` layers of a model with HQQ, in place.

    Each dense weight is freed before the next layer is quantized, so at most one layer's scratch memory is needed in
    addition to the result. All arguments and layers are validated before the first layer is changed. If a layer fails
    after that (out of memory, an interrupt), it and all later layers are unchanged, the model remains usable with the
    earlier layers quantized, and calling again continues with the failed layer.

    Layers of other classes, tied weights (an `lm_head` tied to the embedding) and HQQ layers are not changed.

    Names in `skip_modules` and `overrides` are a module's full name, a suffix of it (`"down_proj"`, `"mlp.down_proj"`),
    or a pattern with `*`, `?` and `[...]` for the full name (`"model.layers.0.*"`).

    Args:
        model: any module whose weights are in memory; usually a transformers model.
        nbits: bits per weight: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        group_size: weights per scale and zero: a multiple of 8, or None for a whole row or column.
        axis: 1 for groups along a row, 0 down a column.
        quant_config: HQQ's `BaseQuantizeConfig` or transformers' `HqqConfig`; if given, it overrides `nbits`,
            `group_size` and `axis`, and its `skip_modules` are the default of `skip_modules`.
        compute_dtype: floating dtype of the layers; the model's other parameters are cast to it too. By default each
            layer keeps its dtype and nothing is cast.
        device: device to move the whole model to, layer by layer; by default nothing is moved.
        skip_modules: names of layers to leave dense.
        overrides: settings that differ (`nbits`, `group_size`, `axis`) by name, or None to leave a layer dense. The
            last match wins.
        solver: `"hqq"`, or `"search"` for smaller errors of the weights in the same format, which takes longer.
        progress: show a progress bar on a terminal.

    Returns:
        A report of the quantized layers, the kept layers with reasons, and the model sizes.

    Raises:
        TypeError: `compute_dtype` is not a floating dtype, or `quant_config` not a configuration.
        ValueError: a setting is out of range, invalid for a layer or matches no layer; `quant_config` has an option
            that is not supported; the model has adapters; a weight is on the meta device or not finite, or float64 with
            `solver="search"`; a layer has hooks. The model is unchanged.
        RuntimeError: quantizing a layer failed; the message names it and gives the state of the model.
    """
    check_compute_dtype(compute_dtype)
    check_solver(solver)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("the model has adapters; quantize the base model, then add the adapters.")
    torch.empty(0, device=device)  # raises if the device is unknown or unavailable
    if quant_config is None:
        default = QuantizationSettings(nbits, group_size, axis)
    else:
        default = QuantizationSettings.from_hqq(quant_config)
        skip_modules = getattr(quant_config, "skip_modules", _SKIPPED) if skip_modules is _SKIPPED else skip_modules
    report = QuantizationReport(bytes_before=stored_bytes(model))
    places = _plan(model, default, skip_modules, overrides or {}, report)
    if solver == "search":
        for linear, (name, *_) in places.items():
            quantizer.check_searchable(report.quantized[name].for_hqq(), linear.weight.dtype)
    bar = tqdm(places.items(), disable=None if progress else True, desc="Quantizing", unit="layer")
    for done, (linear, names) in enumerate(bar):
        try:
            error = _quantize_layer(model, linear, names, report.quantized[names[0]], compute_dtype, device, solver)
            report.errors.update(dict.fromkeys(names, error))
            bar.set_postfix(error=f"{error:.1e}", worst=f"{max(report.errors.values()):.1e}")
        except BaseException as error:
            said = (
                f"quantizing {names[0]} failed: {done} of {len(places)} layers are quantized, it and the rest are "
                "unchanged. The model remains usable; call quantize_model again to continue"
            )
            if isinstance(error, Exception):
                raise RuntimeError(f"{said}. The cause: {error}") from error
            logger.warning("%s.", said)
            raise
    _place_rest(model, compute_dtype, device)
    marks.mark_quantized(model)
    report.bytes_after = stored_bytes(model)
    return report


def matches(name: str, pattern: str) -> bool:
    """Whether a module's full name equals `pattern`, ends with `.pattern`, or matches it as a shell pattern."""
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def _plan(
    model: nn.Module,
    default: QuantizationSettings,
    skip_modules: Sequence[str],
    overrides: Overrides,
    report: QuantizationReport,
) -> dict[nn.Linear, list[str]]:
    """The layers to quantize, each with all its names. Adds every linear layer to the report."""
    if isinstance(skip_modules, str):
        raise ValueError(f"skip_modules must be a list of names, got the string {skip_modules!r}.")
    settings_of = {pattern: _overridden(default, pattern, values) for pattern, values in overrides.items()}
    uses = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    places: dict[nn.Linear, list[str]] = {}
    unmatched = set(overrides)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, HQQLinear):
            report.kept[name] = "it is already an HQQ layer"
        if not isinstance(module, nn.Linear):
            continue
        fitting = [pattern for pattern in overrides if matches(name, pattern)]
        unmatched.difference_update(fitting)
        settings = settings_of[fitting[-1]] if fitting else default
        if not name:
            raise ValueError("the model is a single linear layer; use hqq.core.quantize.HQQLinear for one layer.")
        if type(module) is not nn.Linear:
            report.kept[name] = f"it is a {type(module).__name__}, which may compute a different function"
        elif any(matches(name, pattern) for pattern in skip_modules):
            report.kept[name] = "it matches skip_modules"
        elif marks.reads_weight(model, name):
            report.kept[name] = "the model reads its weight without calling the layer"
        elif uses[id(module.weight)] > 1:
            report.kept[name] = "its weight is tied to another module's"
        elif settings is None:
            report.kept[name] = f"overrides[{fitting[-1]!r}] leaves it dense"
        else:
            if module not in places:
                _check_layer(name, module)
                settings.check(name, module)
            report.quantized[name] = settings
            places.setdefault(module, []).append(name)
    if unmatched:
        raise ValueError(f"overrides match no linear layer of the model: {sorted(unmatched)}.")
    return places


def _overridden(
    default: QuantizationSettings, pattern: str, values: Mapping[str, Any] | None
) -> QuantizationSettings | None:
    if values is None:
        return None
    if unknown := set(values) - set(vars(default)):
        raise ValueError(f"overrides[{pattern!r}]: {sorted(unknown)} are not among {sorted(vars(default))}.")
    try:
        return QuantizationSettings(**{**vars(default), **values})
    except ValueError as error:
        raise ValueError(f"overrides[{pattern!r}]: {error}") from None


def _check_layer(name: str, linear: nn.Linear) -> None:
    if linear.weight.is_meta:
        raise ValueError(f"{name} is on the meta device: load the model's weights first, without offloading.")
    if linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear):
        raise ValueError(
            f"{name} has hooks, which would be lost: load the model without device_map, or remove them "
            "(accelerate.hooks.remove_hook_from_module), and choose the device with device=."
        )
    if not torch.isfinite(linear.weight).all():
        raise ValueError(f"{name}: its weight contains NaN or infinity.")


def _quantize_layer(
    model: nn.Module,
    linear: nn.Linear,
    names: list[str],
    settings: QuantizationSettings,
    compute_dtype: torch.dtype | None,
    device: torch.device | str | None,
    solver: Solver,
) -> float:
    dtype, device = compute_dtype or linear.weight.dtype, device or linear.weight.device
    config = settings.for_hqq()
    del config["offload_meta"]
    config["weight_quant_params"]["group_size"] = settings.group_size or linear.weight.shape[settings.axis]
    state, error = quantizer.quantize(linear.weight, config, dtype, device, solver)
    bias = None if linear.bias is None else linear.bias.detach().to(device, dtype, copy=True)
    layer = hqq_layer.make_layer(state, bias, config).train(linear.training)
    linear.weight = linear.bias = None  # type: ignore[assignment]  # freed, wherever else `linear` is referenced
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return error


def _place_rest(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Move the whole model, and cast all tensors outside HQQ layers.

    Non-persistent buffers, such as the frequencies of rotary embeddings, keep their dtype.
    """
    if dtype is not None and isinstance(config := getattr(model, "config", None), PretrainedConfig):
        config.dtype = dtype
    for module in model.modules():
        if isinstance(module, HQQLinear):
            if device is not None:
                hqq_layer.move_layer(module, device)
            continue
        for parameter in module._parameters.values():
            if parameter is not None:
                parameter.data = parameter.data.to(device, dtype if parameter.is_floating_point() else None)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                cast = buffer.is_floating_point() and name not in module._non_persistent_buffers_set
                module._buffers[name] = buffer.to(device, dtype if cast else None)


def stored_bytes(model: nn.Module) -> int:
    """Size in bytes of a model's parameters and buffers, including the metadata tensors of HQQ layers."""
    parameters = {id(parameter) for parameter in model.parameters()}
    layers = [module for module in model.modules() if isinstance(module, HQQLinear)]
    extra = [v for layer in layers for v in (*layer.meta.values(), layer.bias) if isinstance(v, torch.Tensor)]
    return int(compute_module_sizes(model)[""]) + sum(value.nbytes for value in extra if id(value) not in parameters)


def check_compute_dtype(dtype: torch.dtype | None) -> None:
    """Raise TypeError unless `dtype` is a floating dtype or None."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"compute_dtype must be a floating dtype, got {dtype}.")
