"""An `HQQLinear` as a whole: reading its state and its settings, moving and casting it, making one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hqq.core import quantize
from torch import Tensor, nn

from ..ops.autocast import autocast_dtype, without_autocast
from ..ops.autograd import Linear, apply
from ..ops.weight import QuantizedWeight


class HQQLinear(quantize.HQQLinear):
    """HQQ's layer that follows autocast, `.to()`, `.half()` and the like as `nn.Linear` does.

    HQQ's own ignores casts and fails in backward under autocast. The class has the name of HQQ's because PEFT
    recognizes HQQ layers by it.
    """

    W_q: Any
    bias: Any
    compute_dtype: torch.dtype

    to, type, cpu = nn.Module.to, nn.Module.type, nn.Module.cpu
    half, bfloat16, float, double = nn.Module.half, nn.Module.bfloat16, nn.Module.float, nn.Module.double

    @property
    def weight(self) -> Tensor:
        """An empty tensor of the compute dtype: T5, Mamba and others read dtype and device of `weight` in forward.

        transformers 4.57 gives HQQ's class the same.
        """
        weight = torch.empty(0, dtype=self.compute_dtype, device=self.device)
        weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers 5 would initialize it by its shape
        return weight

    @classmethod
    def set_backend(cls, backend: quantize.HQQBackend) -> None:
        """Set HQQ's backend, which replaces the forward of HQQ's class, not of this one."""
        quantize.HQQLinear.set_backend(backend)

    def cuda(self, device: Any = "cuda") -> HQQLinear:
        """Move to any device, as HQQ does; or cast, since transformers passes the first argument of `to` here."""
        return self.to(device) if isinstance(device, torch.dtype) else super().cuda(device)

    def forward(self, x: Tensor) -> Tensor:
        """`x * W^T + bias`, `[..., N]`.

        Under autocast computed and returned in its dtype; otherwise computed in the compute dtype and returned in that
        of `x`, `[..., K]`.
        """
        autocast = autocast_dtype(x.device)
        dtype = autocast or x.dtype
        with without_autocast(x.device):
            if autocast is None or autocast is self.compute_dtype:
                y = super().forward(x.to(self.compute_dtype))
            else:
                y = self._product(x.to(autocast))
        return y.to(dtype)

    def _product(self, x: Tensor) -> Tensor:
        weight, bias = QuantizedWeight.from_hqq(self), self.bias
        y = apply(Linear, x.reshape(-1, x.shape[-1]), weight, None, None if bias is None else bias.to(x.dtype), None)
        return y.view(*x.shape[:-1], weight.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HQQLinear:
        """As in `nn.Module`, including scale, zero and the compute dtype; the packed weight keeps its bytes."""
        if self.W_q is None:
            return super()._apply(fn, recurse)

        def moved_or_cast(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            # `nn.Module.type` casts integers too.
            return result if tensor.is_floating_point() or result.dtype == tensor.dtype else tensor.to(result.device)

        dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.W_q.device)).dtype
        dtype = dtype if dtype.is_floating_point else self.compute_dtype
        if self.meta.get("view_as_float"):
            self.W_q = nn.Parameter(_integers(self.W_q, self.meta), requires_grad=False)
        super()._apply(moved_or_cast, recurse)
        if self.bias is not None and not isinstance(self.bias, nn.Parameter):
            self.bias = fn(self.bias)
        meta = _map_meta(self.meta, moved_or_cast, dtype)
        PackedState(*_viewed_as_float(self.W_q, meta)).install(self)
        if self.quant_config and not self.meta.get("view_as_float"):
            self.quant_config["weight_quant_params"]["view_as_float"] = False  # as a merge quantizes it again
        self.compute_dtype, self.device = dtype, str(self.W_q.device)
        return self


@dataclass
class PackedState:
    """The packed weight and meta data of an `HQQLinear`; neither is ever modified in place."""

    packed: Tensor
    meta: dict[str, Any]

    @classmethod
    def of(cls, base: quantize.HQQLinear) -> PackedState:
        """The state of `base`, sharing its tensors."""
        return cls(base.W_q, dict(base.meta))

    def install(self, base: quantize.HQQLinear) -> None:
        """Set this state on `base`; all its other attributes are kept."""
        packed = self.packed if isinstance(self.packed, nn.Parameter) else nn.Parameter(self.packed, False)
        base.W_q, base.meta = packed, dict(self.meta)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PackedState:
        """The same bytes on `device`, with scale and zero in `dtype`; returns `self` if nothing changes."""
        dtype = dtype or self.meta["compute_dtype"]
        if self.packed.device == torch.device(device) and dtype is self.meta["compute_dtype"]:
            return self
        if dtype is self.meta["compute_dtype"]:
            return PackedState(_bytes_to(self.packed, device), move_meta(self.meta, device))

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        packed = _bytes_to(_integers(self.packed, self.meta), device)
        return PackedState(*_viewed_as_float(packed, _map_meta(self.meta, cast, dtype)))

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
    return _map_meta(meta, lambda tensor: tensor.to(device))


def _map_meta(meta: dict[str, Any], fn: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """A copy of HQQ's meta data with `fn` of its tensors and, if given, another compute dtype; nested ones included.

    Stacked scale and zero are only cast.
    """

    def mapped(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _map_meta(value, fn, dtype)
        if key == "compute_dtype":
            return dtype or value
        if key == "zero_scale":
            return value.to(dtype) if dtype and value.is_floating_point() else value
        return fn(value) if isinstance(value, Tensor) else value

    return {key: mapped(key, value) for key, value in meta.items()}


def _integers(packed: Tensor, meta: dict[str, Any]) -> Tensor:
    """The packed weight as the integers that it consists of, also if HQQ views it as floats."""
    return packed.detach().view(meta["unpack_view_dtype"]) if meta.get("view_as_float") else packed


def _viewed_as_float(packed: Tensor, meta: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The packed integers as the meta data say: viewed as the compute dtype if its size divides that of a row."""
    if meta.get("view_as_float"):
        if packed.shape[-1] * packed.element_size() % meta["compute_dtype"].itemsize:
            return packed, {**meta, "view_as_float": False}
        packed = packed.detach().view(meta["compute_dtype"])
    return packed, meta


def move_layer(base: quantize.HQQLinear, device: torch.device | str) -> None:
    """Move an HQQ layer to `device` without casting; HQQ's own `to` does not move anything."""
    PackedState.of(base).to(device).install(base)
    if base.bias is not None:
        moved = base.bias.detach().to(device)
        base.bias = nn.Parameter(moved, base.bias.requires_grad) if isinstance(base.bias, nn.Parameter) else moved
    base.device = str(device)


def take_over(base: quantize.HQQLinear) -> None:
    """Make a layer that HQQ made follow autocast and casts, and usable with autograd, `deepcopy` and `torch.compile`.

    It gets the class `HQQLinear` of this module; a subclass of HQQ's keeps its own. HQQ clones the bias of a trainable
    layer without detaching it, which keeps that layer's graph alive and makes `deepcopy` fail. It also leaves scale and
    zero as inference tensors, which autograd cannot save for backward, as `torch.compile` requires.
    """
    if type(base) is quantize.HQQLinear:
        base.__class__ = HQQLinear
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
    if any(isinstance(module, quantize.HQQLinear) for module in model.modules()):
        return
    # `hqq_quantized` is set by this package and PEFT, the others by transformers 4.57.
    marks = ["hqq_quantized", "is_hqq_quantized", "is_hqq_serializable", "is_quantized", "quantization_method"]
    config_marks = ["quantization_config", "_pre_quantization_dtype"]
    for owner, names in ((model, [*marks, "hf_quantizer"]), (getattr(model, "config", None), config_marks)):
        for name in names:
            if name in getattr(owner, "__dict__", {}):
                delattr(owner, name)


def quantization_settings(base: quantize.HQQLinear, nbits: float | None = None) -> dict[str, Any]:
    """The settings `base` was quantized with, optionally with a different number of bits."""
    settings = own_settings(base)
    if nbits is not None:
        settings["weight_quant_params"].update(nbits=nbits, round_zero=nbits == 4)  # as in HQQ
    return settings


def own_settings(base: quantize.HQQLinear) -> dict[str, Any]:
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
