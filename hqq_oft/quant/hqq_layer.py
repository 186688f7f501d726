"""An `HQQLinear` as a whole: reading its state and its settings, moving it, making one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from torch import Tensor, nn

from ..ops.weight import QuantizedWeight


@dataclass
class PackedState:
    """The packed weight and meta data of an `HQQLinear`; neither is ever modified in place."""

    packed: Tensor
    meta: dict[str, Any]

    @classmethod
    def of(cls, base: HQQLinear) -> PackedState:
        """The state of `base`, sharing its tensors."""
        return cls(base.W_q, dict(base.meta))

    def install(self, base: HQQLinear) -> None:
        """Set this state on `base`; all its other attributes are kept."""
        packed = self.packed if isinstance(self.packed, nn.Parameter) else nn.Parameter(self.packed, False)
        base.W_q, base.meta = packed, dict(self.meta)

    def to(self, device: torch.device | str) -> PackedState:
        """The same bytes on `device`; returns `self` if they are already on it."""
        if self.packed.device == torch.device(device):
            return self
        return PackedState(_bytes_to(self.packed, device), move_meta(self.meta, device))

    def weight(self) -> QuantizedWeight:
        """The state as a `QuantizedWeight`."""
        return QuantizedWeight.from_parts(self.packed, self.meta)


def _bytes_to(packed: Tensor, device: torch.device | str) -> Tensor:
    moved = packed.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(packed, nn.Parameter) else moved


def move_meta(meta: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A copy of HQQ's meta data with its tensors on `device`, their dtypes unchanged, nested meta data included.

    Stacked scale and zero (`offload_meta`) are not moved: HQQ keeps them in host memory.
    """

    def move(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return move_meta(value, device)
        return value.to(device) if isinstance(value, Tensor) and key != "zero_scale" else value

    return {key: move(key, value) for key, value in meta.items()}


def move_layer(base: HQQLinear, device: torch.device | str) -> None:
    """Move an HQQ layer to `device` without casting; HQQ's own `to` does not move anything."""
    PackedState.of(base).to(device).install(base)
    if base.bias is not None:
        moved = base.bias.detach().to(device)
        base.bias = nn.Parameter(moved, base.bias.requires_grad) if isinstance(base.bias, nn.Parameter) else moved
    base.device = str(device)


def detach_tensors(base: HQQLinear) -> None:
    """Make the tensors of an HQQ layer usable with autograd, `deepcopy` and `torch.compile`: detached, not inference.

    HQQ clones the bias of a trainable layer without detaching it, which keeps that layer's graph alive and makes
    `deepcopy` fail. It also leaves scale and zero as inference tensors, which autograd cannot save for backward, as
    `torch.compile` requires.
    """
    if base.bias is not None and not base.bias.is_leaf:
        base.bias = base.bias.detach()
    base.meta = without_inference_tensors(base.meta)


def without_inference_tensors(meta: dict[str, Any]) -> dict[str, Any]:
    """A copy of HQQ's meta data, nested meta data included, with inference tensors cloned to normal tensors."""

    def normal(value: Any) -> Any:
        if isinstance(value, dict):
            return without_inference_tensors(value)
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    with torch.inference_mode(False):
        return {key: normal(value) for key, value in meta.items()}


def forget_quantization(model: nn.Module) -> None:
    """If the model has no HQQ layer left, remove the attributes that mark it as quantized."""
    if any(isinstance(module, HQQLinear) for module in model.modules()):
        return
    # `hqq_quantized` is set by this package and PEFT, the others by transformers 4.57.
    marks = ["hqq_quantized", "is_hqq_quantized", "is_hqq_serializable", "is_quantized", "quantization_method"]
    config_marks = ["quantization_config", "_pre_quantization_dtype"]
    for owner, names in ((model, [*marks, "hf_quantizer"]), (getattr(model, "config", None), config_marks)):
        for name in names:
            if name in getattr(owner, "__dict__", {}):
                delattr(owner, name)


def quantization_settings(base: HQQLinear, nbits: float | None = None) -> dict[str, Any]:
    """The settings `base` was quantized with, optionally with a different number of bits."""
    settings = own_settings(base)
    if nbits is not None:
        settings["weight_quant_params"].update(nbits=nbits, round_zero=nbits == 4)  # as in HQQ
    return settings


def own_settings(base: HQQLinear) -> dict[str, Any]:
    """The layer's `quant_config`; reconstructed from its meta data if the layer has none."""
    if getattr(base, "quant_config", None):
        names = ("weight_quant_params", "scale_quant_params", "zero_quant_params")
        settings = {name: copy.deepcopy(base.quant_config.get(name)) for name in names}
        settings["weight_quant_params"]["nbits"] = _bits(settings["weight_quant_params"]["nbits"], base.meta)
        return settings
    meta = base.meta
    weight_settings = _settings_of(meta)
    # HQQ's own defaults
    weight_settings.update(optimize=True, round_zero=meta["nbits"] == 4, view_as_float=bool(meta.get("view_as_float")))
    return {
        "weight_quant_params": weight_settings,
        "scale_quant_params": _settings_of(meta["meta_scale"]) if meta.get("quant_scale") else None,
        "zero_quant_params": _settings_of(meta["meta_zero"]) if meta.get("quant_zero") else None,
    }


def _bits(nbits: float, meta: dict[str, Any]) -> float:
    """The requested number of bits: HQQ truncates nbits in its state dicts, so that 1.58 is loaded as 1.

    The packing distinguishes the two.
    """
    return 1.58 if nbits == 1 and meta["packing"] == "2bit_u8" else nbits


def _settings_of(meta: dict[str, Any]) -> dict[str, Any]:
    """Arguments of HQQ's quantizer that produce meta data like these."""
    scale = meta.get("scale")
    return {
        "nbits": _bits(meta["nbits"], meta),
        "channel_wise": scale is None or scale.dim() > 0,
        "group_size": meta["group_size"],
        "optimize": False,
        "axis": meta["axis"],
    }


def make_layer(state: PackedState, bias: Tensor | None, settings: dict[str, Any]) -> HQQLinear:
    """An HQQ layer with this state, in the compute dtype of its meta data.

    Args:
        state: packed weight and meta data, all on one device.
        bias: `[N]` or None; it becomes a frozen parameter.
        settings: as HQQ's `quant_config`.
    """
    layer = HQQLinear(None, None, compute_dtype=state.meta["compute_dtype"], device=str(state.packed.device))
    state.install(layer)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    layer.quant_config, layer.offload_meta = copy.deepcopy(settings), False
    layer.out_features, layer.in_features = state.meta["shape"]
    layer.ready = layer.in_gpu = True
    return layer
