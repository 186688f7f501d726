"""`convert` and `revert`: replace PEFT's OFT layers with `HqqOFTLinear` in an existing model, and the reverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hqq.core.quantize import HQQLinear
from peft.tuners.oft.layer import Linear as PeftLinear
from peft.tuners.oft.layer import OFTLayer
from torch import nn

from .layer import HqqOFTLinear
from .model import match_tuners
from .patch import peft_hqq_module

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


def _become(layer: OFTLayer, new_class: type[OFTLayer]) -> None:
    if isinstance(layer, HqqOFTLinear):
        layer._release_base_layer()
    layer.__class__ = new_class
    if isinstance(layer, HqqOFTLinear):
        layer._take_base_layer()
    else:
        layer.fan_in_fan_out = layer.is_target_conv_1d_layer = False
        layer.merged_adapters = []


def _turn(
    peft_model: nn.Module, new_class: type[OFTLayer], why_keep: Callable[[OFTLayer], str | None]
) -> ConversionReport:
    """Change every OFT layer for which `why_keep` returns None to `new_class`.

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
            _become(layer, new_class)
    except BaseException:
        for layer, old_class in classes.items():
            _become(layer, old_class)
        raise
    return report


def _why_not_convert(layer: OFTLayer) -> str | None:
    if isinstance(layer, HqqOFTLinear):
        return "it is already an HqqOFTLinear"
    if not isinstance(layer.get_base_layer(), HQQLinear):
        return f"its base layer is a {type(layer.get_base_layer()).__name__}, not an HQQLinear"
    if layer.merged:
        return f"{layer.merged_adapters} are merged into it, and its pristine weight is lost: unmerge first"
    return None


def _why_not_revert(layer: OFTLayer) -> str | None:
    if not isinstance(layer, HqqOFTLinear):
        return f"it is PEFT's own {type(layer).__name__}"
    if layer.merged:
        return f"{layer.merged_adapters} are merged into it: unmerge first"
    return None


def convert(peft_model: nn.Module) -> ConversionReport:
    """Turn the OFT layers that PEFT put on HQQ layers into `HqqOFTLinear`, in place.

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
    report = _turn(peft_model, HqqOFTLinear, _why_not_convert)
    match_tuners(peft_model)
    return report


def revert(peft_model: nn.Module) -> ConversionReport:
    """Turn each `HqqOFTLinear` into PEFT's own layer, in place.

    Args:
        peft_model: a model with `HqqOFTLinear` layers, from `convert` or built under `patch_peft`.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        ValueError: the model has no OFT adapters.
    """
    report = _turn(peft_model, _PeftHqqLayer, _why_not_revert)
    match_tuners(peft_model)
    return report
