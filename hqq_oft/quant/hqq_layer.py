"""An `HQQLinear` as a whole: reading its state, moving it, making one, quantizing a weight with its settings."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from hqq.core.optimize import optimize_weights_proximal_legacy
from hqq.core.quantize import HQQLinear, Quantizer
from torch import Tensor, nn

from ..ops import backends
from ..ops import table as ops
from ..ops.packing import PACKING_BITS
from ..ops.weight import QuantizedWeight
from . import bands
from .bands import Bands
from .search import search
from .solver import Solver, check_solver


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
    settings = _own_settings(base)
    if nbits is not None:
        settings["weight_quant_params"].update(nbits=nbits, round_zero=nbits == 4)  # as in HQQ
    return settings


def _own_settings(base: HQQLinear) -> dict[str, Any]:
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


def quantize(
    dense: Tensor | Bands,
    settings: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device | str,
    solver: Solver = "hqq",
    old: tuple[Tensor, Tensor] | None = None,
) -> tuple[PackedState, float]:
    """Quantize `dense` `[N, K]`, by default as HQQ does; on x86 CPUs to the same bytes.

    Computed by the operation `quantize`. Settings that it does not know (quantized scale and zero, one scale for the
    whole weight, another solver), float64 and non-finite weights are left to HQQ's own quantizer; so is everything if a
    backend without that operation is selected by name. `Bands` give the same result as their dense weight, which is
    computed where they cannot be quantized one by one: in those cases, on other devices than the CPU, where bands would
    not be whole rows (groups that do not divide N, with `axis=0`), and for other groups than those of the bands.

    Args:
        dense: the weight.
        settings: as HQQ's `quant_config`, without `offload_meta`.
        dtype: compute dtype, that of the stored scale and zero.
        device: of the result.
        solver: how scales and zeros are found.
        old: for `"search"`, scale and zero that `dense` had before, if it is quantized again.

    Returns:
        The state of an HQQ layer, and the relative error of its weight, |W_q - W| / |W|; NaN if `dense` is not finite.

    Raises:
        ValueError: `solver` is unknown, or `"search"` does not serve such settings.
    """
    check_solver(solver)
    weight = _DEFAULTS | settings["weight_quant_params"]
    if solver == "search":
        check_searchable(settings, torch.float32 if isinstance(dense, Bands) else dense.dtype)
    with torch.no_grad(), torch.inference_mode(False):  # the result outlives an enclosing inference mode
        if isinstance(dense, Bands) and not (solver == "hqq" and _bands_serve(settings, dense)):
            dense = dense.dense()
        if isinstance(dense, Tensor):
            dense = dense.detach().to(device)
            dense = dense.clone() if dense.is_inference() else dense
            if not _operation_serves("quantize", settings, dense.dtype):
                return _quantize_by_hqq(dense, settings, dtype, device)
        nbits, axis, group_size = weight["nbits"], weight["axis"], weight["group_size"]
        packing = Quantizer.bit_to_packing[nbits]
        levels, bits = round(2**nbits - 1) + 1, PACKING_BITS[packing]
        rest = (bool(weight["round_zero"]), _HQQ_ITERATIONS if weight["optimize"] else 0, dtype)
        if isinstance(dense, Bands):
            packed, scale, zero, squares = bands.quantize(dense, levels, bits, *rest)
        else:
            solve = functools.partial(search, old=old) if solver == "search" else ops.quantize
            packed, scale, zero, squares = solve(dense, levels, bits, group_size or dense.shape[axis], axis, *rest)
        distance, size = squares.tolist()
        if not math.isfinite(distance) and solver == "hqq":
            return _quantize_by_hqq(dense, settings, dtype, device)
        if weight["view_as_float"]:
            packed = packed.view(dtype)
        meta = {
            "nbits": nbits,
            "group_size": group_size,
            "shape": dense.shape,
            "scale": scale,
            "zero": zero,
            "axis": axis,
            "packing": packing,
            "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
            "view_as_float": weight["view_as_float"],
            "quant_scale": False,
            "quant_zero": False,
            "compute_dtype": dtype,
        }
        error = math.sqrt(distance / max(size, torch.finfo(torch.float32).tiny))
        return PackedState(nn.Parameter(packed, requires_grad=False), meta), error


_HQQ_ITERATIONS = 20  # at most, of its default solver
_DEFAULTS = {"channel_wise": True, "optimize": True, "round_zero": False, "axis": 0, "view_as_float": False}


def _bands_serve(settings: dict[str, Any], dense: Bands) -> bool:
    """Whether a weight is quantized band by band."""
    weight, quantized = _DEFAULTS | settings["weight_quant_params"], dense.weight
    group_size = weight["group_size"] or quantized.shape[weight["axis"]]
    return (
        quantized.device.type == "cpu"  # elsewhere no kernel has the operation `quantize_band`
        and (weight["axis"], group_size) == (quantized.axis, quantized.group_size)
        and len(dense.spans()) > 1
        and _operation_serves("quantize_band", settings, torch.float32)
    )


def check_searchable(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Raise ValueError unless `solver="search"` can quantize a weight of this dtype with HQQ's `quant_config`."""
    if not _operation_serves("quantize", settings, dtype) or not settings["weight_quant_params"].get("optimize", True):
        raise ValueError(
            f"solver='search' does not serve a weight in {dtype} with {settings}; it accepts float32, float16 and "
            "bfloat16, BaseQuantizeConfig(nbits=..., group_size=..., axis=...) with scales and zeros that are not "
            "themselves quantized, HQQ's default solver, and a backend with `quantize`. Use solver='hqq'."
        )


def _operation_serves(operation: str, settings: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether an operation does what HQQ would do with a weight of this dtype."""
    weight = _DEFAULTS | settings["weight_quant_params"]
    selected = backends.selected_backend()
    return (
        (selected == "auto" or backends.registry()[selected].why_not(operation) is None)
        and dtype != torch.float64
        and set(weight) <= {*_DEFAULTS, "nbits", "group_size"}
        and weight["channel_wise"]
        and settings.get("scale_quant_params") is None
        and settings.get("zero_quant_params") is None
        and (not weight["optimize"] or Quantizer.optimize_weights is optimize_weights_proximal_legacy)
    )


def _quantize_by_hqq(
    dense: Tensor | Bands, settings: dict[str, Any], dtype: torch.dtype, device: torch.device | str
) -> tuple[PackedState, float]:
    dense = dense.dense() if isinstance(dense, Bands) else dense
    scratch = HQQLinear(None, None, compute_dtype=dtype, device=str(device))
    scratch.quantize(dense, **settings)
    packed = scratch.W_q
    if packed.is_inference():
        packed = nn.Parameter(packed.clone(), requires_grad=False)
    state = PackedState(packed, without_inference_tensors(scratch.meta))
    wide = dense.to(torch.promote_types(dense.dtype, torch.float32))
    distance = (ops.dequantize(state.weight(), wide.dtype) - wide).norm()
    return state, float(distance / wide.norm().clamp_min(torch.finfo(wide.dtype).tiny))


def requantize(
    base: HQQLinear,
    dense: Tensor | Bands,
    nbits: float | None = None,
    solver: Solver = "hqq",
    pristine: PackedState | None = None,
) -> tuple[PackedState, float]:
    """Quantize `dense` `[N, K]` with the settings of `base`, which is unchanged.

    Args:
        base: the layer.
        dense: the weight.
        nbits: number of bits, by default that of `base`.
        solver: as for `quantize`.
        pristine: the state that `dense` was computed from, by default that of `base`; `"search"` tries its scale and
            zero too, unless the number of bits changes.

    Returns:
        As `quantize`.

    Raises:
        ValueError: as `quantize`.
    """
    settings, old = quantization_settings(base, nbits), None
    if solver == "search" and nbits in (None, _own_settings(base)["weight_quant_params"]["nbits"]):
        view = (pristine or PackedState.of(base)).weight()
        old = (view.scale.to(base.W_q.device), view.zero.to(base.W_q.device))
    state, error = quantize(dense, settings, base.compute_dtype, base.W_q.device, solver, old)
    if "zero_scale" in base.meta:
        # HQQ stacks scale and zero only if it can pin memory; here they are always stacked, as in `base`.
        stacked, meta = base.meta["zero_scale"], state.meta
        names = ("zero_q", "scale_q") if stacked.dtype == torch.uint8 else ("zero", "scale")
        host = torch.stack([meta.pop(name) for name in names]).to(stacked.dtype).to(stacked.device)
        meta["zero_scale"] = host.pin_memory() if stacked.is_pinned() else host
    return state, error
