"""`convert` and `revert`: replace PEFT's OFT layers with this package's in an existing model, and the reverse."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hqq.core.quantize import HQQLinear
from peft.tuners.oft.layer import Linear as PeftLinear
from peft.tuners.oft.layer import OFTLayer
from torch import nn

from .adapters import AdaptedLayer
from .layer import HqqOFTLinear
from .linear import OFTLinear
from .model import match_tuners

HQQ_MODULE = "peft.tuners.oft.hqq"
# PEFT up to 0.20 has a separate module for HQQ layers; from 0.21 its Linear supports them.
peft_hqq_module = importlib.import_module(HQQ_MODULE) if importlib.util.find_spec(HQQ_MODULE) else None
_PeftHqqLayer: type[OFTLayer] = PeftLinear if peft_hqq_module is None else peft_hqq_module.HqqOFTLinear


@dataclass
class ConversionReport:
    """The result of `convert` or `revert`.

    Attributes:
        replaced: names of the modules that were replaced.
        kept: name of each OFT module that was not replaced -> the reason.
    """

    replaced: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layer(s) replaced, {len(self.kept)} kept"]
        lines += [f"  kept {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def our_class(layer: OFTLayer) -> type[AdaptedLayer] | None:
    """The class of this package that does what this layer of PEFT does; None for convolutions and embeddings."""
    if isinstance(layer.get_base_layer(), HQQLinear):
        return HqqOFTLinear
    # A subclass from elsewhere may do something else.
    own = type(layer).__module__.startswith("peft.tuners.oft.")
    return OFTLinear if own and not isinstance(layer.get_base_layer(), (nn.Conv2d, nn.Embedding)) else None


def _peft_class(layer: OFTLayer) -> type[OFTLayer]:
    default = _PeftHqqLayer if isinstance(layer, HqqOFTLinear) else PeftLinear
    return vars(layer).get("_peft_class", default)


def become(layer: OFTLayer, new_class: type[OFTLayer]) -> None:
    """Change the class of a layer in place, from PEFT's to this package's or back."""
    old_class = type(layer)
    if isinstance(layer, AdaptedLayer):
        layer._release_base_layer()
    layer.__class__ = new_class
    if isinstance(layer, AdaptedLayer):
        layer._take_base_layer()
        if not issubclass(old_class, AdaptedLayer):
            layer.__dict__["_peft_class"] = old_class  # for `revert`
    else:
        layer.fan_in_fan_out = layer.is_target_conv_1d_layer = False
        layer.merged_adapters = []
        layer.__dict__.pop("_peft_class", None)


def _turn(
    peft_model: nn.Module, new_class: Callable[[OFTLayer], Any], why_keep: Callable[[OFTLayer], str | None]
) -> ConversionReport:
    """Change every OFT layer for which `why_keep` returns None to its `new_class`.

    Only the class of a layer changes, not its identity: hooks and their handles, references from other modules and its
    compiled call stay valid.
    """
    report = ConversionReport()
    classes: dict[OFTLayer, type[OFTLayer]] = {}  # by layer: one may be registered in several places
    for parent_name, parent in peft_model.named_modules():
        for child_name, child in parent._modules.items():
            if not isinstance(child, OFTLayer):
                continue
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            reason = why_keep(child)
            if reason is None and "forward" in vars(child):
                reason = "its forward was replaced (accelerate does that): remove the hook first"
            if reason is not None:
                report.kept[name] = reason
                continue
            classes[child] = type(child)
            report.replaced.append(name)
    if not report.replaced and not report.kept:
        raise ValueError(
            f"expected a model with OFT adapters, got {type(peft_model).__name__} without any; make one with "
            "get_peft_model(model, OFTConfig(...))."
        )
    try:
        for layer in classes:
            become(layer, new_class(layer))
    except BaseException:
        for layer, old_class in classes.items():
            become(layer, old_class)
        raise
    return report


def _why_not_convert(layer: OFTLayer) -> str | None:
    if isinstance(layer, AdaptedLayer):
        return f"it is already an {type(layer).__name__}"
    if our_class(layer) is None:
        return f"this package has no layer for what {type(layer).__name__} wraps, a {_base_name(layer)}"
    if layer.merged:
        return f"{layer.merged_adapters} are merged into it, and its pristine weight is lost: unmerge first"
    return None


def _base_name(layer: OFTLayer) -> str:
    return type(layer.get_base_layer()).__name__


def _why_not_revert(layer: OFTLayer) -> str | None:
    if not isinstance(layer, AdaptedLayer):
        return f"it is PEFT's own {type(layer).__name__}"
    if layer.merged:
        return f"{layer.merged_adapters} are merged into it: unmerge first"
    return None


def convert(peft_model: nn.Module) -> ConversionReport:
    """Turn the OFT layers that PEFT put on linear layers into `HqqOFTLinear` and `OFTLinear`, in place.

    Parameters are kept, so an existing optimizer stays valid; so are training mode, active adapters and hooks. The
    tuner class is replaced so that unloading HQQ layers and mixed-adapter batches work without `patch_peft`.

    Args:
        peft_model: a `PeftModel` or `PeftMixedModel` with an `OFTConfig`, its tuner, or any module that contains OFT
            layers.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        ValueError: the model has no OFT adapters.
    """
    report = _turn(peft_model, our_class, _why_not_convert)
    match_tuners(peft_model)
    return report


def revert(peft_model: nn.Module) -> ConversionReport:
    """Turn each `HqqOFTLinear` and `OFTLinear` into PEFT's own layer, in place.

    Args:
        peft_model: a model with such layers, from `convert` or built under `patch_peft`.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        ValueError: the model has no OFT adapters.
    """
    report = _turn(peft_model, _peft_class, _why_not_revert)
    match_tuners(peft_model)
    return report
