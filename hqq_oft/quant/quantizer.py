"""Quantizing a dense weight to the state of an `HQQLinear`, by HQQ's own solver or by another."""

from __future__ import annotations

import math
from typing import Any

import torch
from hqq.core.optimize import optimize_weights_proximal_legacy
from hqq.core.quantize import HQQLinear, Quantizer
from torch import Tensor, nn

from ..ops import backends
from ..ops import table as ops
from ..ops.packing import PACKING_BITS
from . import bands
from .bands import Bands
from .hqq_layer import PackedState, own_settings, quantization_settings, without_inference_tensors
from .search import search
from .solver import Solver, check_solver


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
    computed where they cannot be quantized one by one: in those cases, where bands would not be whole rows (groups that
    do not divide N, with `axis=0`), for other groups than those of the bands, and by `"search"`.

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
            if not _operation_serves(settings, dense.dtype):
                return _quantize_by_hqq(dense, settings, dtype, device)
        nbits, axis, group_size = weight["nbits"], weight["axis"], weight["group_size"]
        group = group_size or dense.shape[axis]
        packing = Quantizer.bit_to_packing[nbits]
        levels, bits = round(2**nbits - 1) + 1, PACKING_BITS[packing]
        rest = (bool(weight["round_zero"]), _HQQ_ITERATIONS if weight["optimize"] else 0, dtype)
        if isinstance(dense, Bands):
            packed, scale, zero, squares = bands.quantize(dense, levels, bits, *rest)
        elif solver == "search":
            packed, scale, zero, squares = search(dense, levels, bits, group, axis, *rest, old)
        else:
            packed, scale, zero, squares, _ = ops.quantize(dense, levels, bits, group, axis, *rest, None)
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
        (weight["axis"], group_size) == (quantized.axis, quantized.group_size)
        and len(dense.spans()) > 1
        and _operation_serves(settings, torch.float32)
    )


def check_searchable(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Raise ValueError unless `solver="search"` can quantize a weight of this dtype with HQQ's `quant_config`."""
    if not _operation_serves(settings, dtype) or not settings["weight_quant_params"].get("optimize", True):
        raise ValueError(
            f"solver='search' does not serve a weight in {dtype} with {settings}; it accepts float32, float16 and "
            "bfloat16, BaseQuantizeConfig(nbits=..., group_size=..., axis=...) with scales and zeros that are not "
            "themselves quantized, HQQ's default solver, and a backend with `quantize`. Use solver='hqq'."
        )


def _operation_serves(settings: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether the operation `quantize` does what HQQ would do with a weight of this dtype."""
    weight = _DEFAULTS | settings["weight_quant_params"]
    selected = backends.selected_backend()
    return (
        (selected == "auto" or backends.registry()[selected].why_not("quantize") is None)
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
    if solver == "search" and nbits in (None, own_settings(base)["weight_quant_params"]["nbits"]):
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
