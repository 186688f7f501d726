"""`quantize_model` replaces the linear layers of a model by HQQ layers, in place, one at a time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm
from transformers import PretrainedConfig

from . import hqq_layer, marks, quantizer
from .defaults import kept_in_float32
from .experts import Experts
from .linears import mark_origin, replace
from .report import QuantizationReport, stored_bytes
from .selection import check_layer, select
from .settings import Overrides, QuantizationSettings
from .solver import Solver, check_solver

logger = logging.getLogger("hqq_oft")


def quantize_model(
    model: nn.Module,
    *,
    nbits: float = 4,
    group_size: int | None = 64,
    axis: int = 1,
    quant_config: Any = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    skip_modules: Sequence[str] = (),
    overrides: Overrides | None = None,
    solver: Solver = "hqq",
    progress: bool = True,
) -> QuantizationReport:
    """Quantize the linear layers of a model with HQQ, in place.

    Those are `nn.Linear`, transformers' `Conv1D` (of GPT-2), and the experts that transformers 5 stores as
    three-dimensional parameters: such a module is replaced by one that has the layers `0.gate_up_proj`, `0.down_proj`,
    `1.gate_up_proj` and so on.

    Each dense weight is freed before the next layer is quantized (those of one mixture of experts together), so at most
    one layer's scratch memory is needed in addition to the result. All arguments and layers are validated before the
    first layer is changed. If a layer fails after that (out of memory, an interrupt), it and all later layers are
    unchanged, the model remains usable with the earlier layers quantized, and calling again continues with the failed
    layer.

    Layers of other classes, layers whose weight the module around them reads (in Mamba's mixers), tied weights (an
    `lm_head` tied to the embedding) and HQQ layers are not changed, even if `overrides` names them. Output
    and classification heads, modules that transformers keeps in float32, routers of experts, and layers whose shape
    can't be packed with the settings stay dense too, unless `overrides` names them without a wildcard. The report gives
    the reason for each layer and the share of the bytes that stays dense; if that is more than half, a UserWarning
    says so.

    Names in `skip_modules` and `overrides` are a module's full name, a suffix of it (`"down_proj"`, `"mlp.down_proj"`),
    or a pattern with `*`, `?` and `[...]` for the full name (`"model.layers.0.*"`).

    Args:
        model: any module whose weights are in memory; usually a transformers model.
        nbits: bits per weight: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        group_size: weights per scale and zero: a multiple of 8, or None for a whole row or column.
        axis: 1 for groups along a row, 0 down a column.
        quant_config: HQQ's `BaseQuantizeConfig` or transformers' `HqqConfig`; if given, it overrides `nbits`,
            `group_size` and `axis`, and its `skip_modules` are skipped too.
        compute_dtype: floating dtype of the layers; the model's other parameters are cast to it too, or to float32
            where transformers keeps them in it. By default each layer keeps its dtype and nothing is cast.
        device: device to move the whole model to, layer by layer; by default nothing is moved.
        skip_modules: names of more layers to leave dense, or of modules that contain them.
        overrides: settings that differ (`nbits`, `group_size`, `axis`) by name, or None to leave a layer dense. The
            last match wins; `{}` quantizes a layer that would stay dense with the settings of the others.
        solver: `"hqq"`, or `"search"` for smaller errors of the weights in the same format, which takes longer.
        progress: show a progress bar on a terminal.

    Returns:
        A report of the quantized layers, the kept layers with reasons, and the model sizes.

    Raises:
        TypeError: `compute_dtype` is not a floating dtype, or `quant_config` not a configuration.
        ValueError: a setting is out of range, invalid for every layer or for one that `overrides` names, or matches no
            layer; `quant_config` has an option that is not supported; the model has adapters; a weight is on the meta
            device or not finite, or float64 with `solver="search"`; a layer has hooks. The model is unchanged.
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
    known_skips = getattr(quant_config, "skip_modules", None) or ()
    report = QuantizationReport(bytes_before=stored_bytes(model))
    selection = select(model, default, skip_modules, overrides or {}, report, known_skips)
    for linear, (name, *_) in selection.layers.items():
        check_layer(name, selection.sources[linear], linear)
        if solver == "search":
            quantizer.check_searchable(report.quantized[name].for_hqq(), linear.weight.dtype)
    total = len(selection.layers)
    bar = tqdm(selection.layers.items(), disable=None if progress else True, desc="Quantizing", unit="layer")
    for done, (linear, names) in enumerate(bar):
        try:
            _install_experts(model, names, selection.experts)
            error = _quantize_layer(model, linear, names, report.quantized[names[0]], compute_dtype, device, solver)
            report.errors.update(dict.fromkeys(names, error))
            bar.set_postfix(error=f"{error:.1e}", worst=f"{max(report.errors.values()):.1e}")
        except BaseException as error:
            said = (
                f"quantizing {names[0]} failed: {done} of {total} layers are quantized, it and the rest are "
                "unchanged. The model remains usable; call quantize_model again to continue"
            )
            if isinstance(error, Exception):
                raise RuntimeError(f"{said}. The cause: {error}") from error
            logger.warning("%s.", said)
            raise
    _place_rest(model, compute_dtype, device)
    marks.mark_quantized(model)
    report.bytes_after = stored_bytes(model)
    if mostly_dense := report.mostly_dense():
        warnings.warn(f"{mostly_dense} The report gives the reasons.", UserWarning, stacklevel=2)
    return report


def _install_experts(model: nn.Module, names: list[str], experts: dict[str, Experts]) -> None:
    """Put the module that has the layer `names` into the model if it is not there yet."""
    for name in [".".join(name.split(".")[:-2]) for name in names]:
        if name in experts and model.get_submodule(name) is not experts[name]:
            replace(model, name, experts[name])


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
    state, error = quantizer.quantize(linear.weight.contiguous(), config, dtype, device, solver)
    bias = None if linear.bias is None else linear.bias.detach().to(device, dtype, copy=True)
    layer = hqq_layer.make_layer(state, bias, config).train(linear.training)
    mark_origin(linear, layer)
    linear.weight = linear.bias = None  # type: ignore[assignment]  # freed, wherever else `linear` is referenced
    for name in names:
        replace(model, name, layer)
    return error


def _place_rest(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Move the whole model, and cast all tensors outside HQQ layers.

    Those that transformers keeps in float32 are cast to it. Non-persistent buffers, such as the frequencies of rotary
    embeddings, keep their dtype.
    """
    float32 = kept_in_float32(model, dtype)

    def cast_to(prefix: str, name: str) -> torch.dtype | None:
        return torch.float32 if (f"{prefix}.{name}" if prefix else name) in float32 else dtype

    if dtype is not None and isinstance(config := getattr(model, "config", None), PretrainedConfig):
        config.dtype = dtype
    for prefix, module in model.named_modules():
        if isinstance(module, HQQLinear):
            if device is not None:
                hqq_layer.move_layer(module, device)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                cast = parameter.is_floating_point()
                parameter.data = parameter.data.to(device, cast_to(prefix, name) if cast else None)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                cast = buffer.is_floating_point() and name not in module._non_persistent_buffers_set
                module._buffers[name] = buffer.to(device, cast_to(prefix, name) if cast else None)


def check_compute_dtype(dtype: torch.dtype | None) -> None:
    """Raise TypeError unless `dtype` is a floating dtype or None."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"compute_dtype must be a floating dtype, got {dtype}.")
