"""Making PEFT use `HqqOFTLinear`: for models to come (`patch_peft`) and for one that exists (`convert`)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft.tuners.oft.model as peft_oft_model
from hqq.core.quantize import HQQLinear
from peft.tuners.oft.layer import Linear as PeftLinear
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.oft.model import OFTModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm import tqdm

from .layer import HqqOFTLinear

_HQQ_MODULE = "peft.tuners.oft.hqq"
# PEFT up to 0.20 has a module of its own for HQQ layers; from 0.21 its Linear takes them.
_peft_hqq_module = importlib.import_module(_HQQ_MODULE) if importlib.util.find_spec(_HQQ_MODULE) else None
_PeftHqqLayer: type[OFTLayer] = PeftLinear if _peft_hqq_module is None else _peft_hqq_module.HqqOFTLinear


def dispatch_hqq(target: nn.Module, adapter_name: str, **kwargs: Any) -> HqqOFTLinear | None:
    """An `HqqOFTLinear` around `target` if it is an `HQQLinear` or a tuner layer over one, else None.

    Args:
        target: the module to wrap.
        adapter_name: name of its first adapter.
        **kwargs: the settings of `HqqOFTLinear`, or a `peft.OFTConfig` as `config` or `oft_config`, which wins.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return HqqOFTLinear(target, adapter_name, **kwargs) if isinstance(base, HQQLinear) else None


# --- What an OFTModel does differently -------------------------------------------------------------------------------
#
# Each function below takes PEFT's own implementation as its first argument and hands over whatever is not ours.


def _create_new_module(
    original: Any, oft_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
) -> nn.Module:
    new_module = dispatch_hqq(target, adapter_name, config=oft_config)
    return original(oft_config, adapter_name, target, **kwargs) if new_module is None else new_module


def _replace_module(
    original: Any, self: OFTModel, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
) -> None:
    if isinstance(new_module, HQQLinear):
        # PEFT would copy `.weight`, which an HQQ layer does not have; the layer comes back whole as it is.
        setattr(parent, child_name, new_module)
        return
    if isinstance(new_module, HqqOFTLinear):
        _adopt(self)  # the model outlives the patch, and must be able to unload then
    original(self, parent, child_name, new_module, child)


def _adopt(tuner: OFTModel) -> None:
    if type(tuner) is OFTModel:
        tuner.__class__ = HqqOFTModel


def _our_layers(model: nn.Module) -> list[HqqOFTLinear]:
    return [module for module in model.modules() if isinstance(module, HqqOFTLinear)]


@contextmanager
def _merged_state_restored_on_error(layers: Sequence[HqqOFTLinear]) -> Iterator[None]:
    before = [layer.merge_state() for layer in layers]
    try:
        yield
    except BaseException:
        for layer, state in zip(layers, before, strict=True):
            layer.restore_merge_state(state)
        raise


def _merge_adapter(original: Any, self: OFTModel, *args: Any, **kwargs: Any) -> None:
    with _merged_state_restored_on_error(_our_layers(self.model)):
        original(self, *args, **kwargs)


def _unload_and_optionally_merge(
    original: Any,
    self: OFTModel,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> nn.Module:
    layers = _our_layers(self.model)
    if not merge or not layers:
        return original(self, merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names)
    # All our layers first, so that a failure leaves every one of them as it was and in its place; PEFT's own pass then
    # finds them merged.
    with _merged_state_restored_on_error(layers):
        for layer in tqdm(layers, disable=not progressbar, desc="Merging OFT into HQQ layers"):
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return original(self, merge=True, progressbar=False, safe_merge=safe_merge, adapter_names=adapter_names)


def _add_adapter_names(module: nn.Module, args: Any, kwargs: Any, *, adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


@contextmanager
def _enable_peft_forward_hooks(original: Any, self: OFTModel, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Hand `adapter_names` of one forward or `generate` to every layer, with the checks of PEFT's LoRA."""
    adapter_names = kwargs.pop("adapter_names", None)
    if adapter_names is None:
        with original(self, *args, **kwargs):
            yield
        return
    if self.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    layers = [module for module in self.modules() if isinstance(module, OFTLayer)]
    foreign = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, HqqOFTLinear)})
    if foreign:
        raise ValueError(
            "`adapter_names` needs every OFT layer to be an HqqOFTLinear, but the model also adapts layers that are "
            f"not HQQ-quantized ({', '.join(foreign)}), where PEFT ignores it. Target HQQ layers alone."
        )
    known = {name for layer in layers for name in layer.oft_R}
    unexpected = set(adapter_names) - known - {"__base__"}
    if unexpected:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected))}")

    # Beam search repeats each sample; an encoder still sees the samples as they were given.
    beams = kwargs.get("num_beams")
    repeated = [name for name in adapter_names for _ in range(beams if isinstance(beams, int) else 1)]
    get_encoder = getattr(self.model, "get_encoder", None)
    is_encoder_decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
    encoder = get_encoder() if get_encoder is not None and is_encoder_decoder else None
    in_encoder = set(encoder.modules()) if isinstance(encoder, nn.Module) else set()
    handles = []
    try:
        for module in self.modules():
            if isinstance(module, (HqqOFTLinear, AuxiliaryTrainingWrapper)):
                names = list(adapter_names) if module in in_encoder else repeated
                hook = functools.partial(_add_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _no_forward_hooks(self: OFTModel, *args: Any, **kwargs: Any) -> Iterator[None]:
    yield


_OVERRIDES: dict[str, Callable[..., Any]] = {
    "_create_new_module": _create_new_module,
    "_replace_module": _replace_module,
    "merge_adapter": _merge_adapter,
    "_unload_and_optionally_merge": _unload_and_optionally_merge,
    "_enable_peft_forward_hooks": _enable_peft_forward_hooks,
}


def _overridden(name: str) -> Any:
    """PEFT's method of that name with ours in front, as a class attribute."""
    original = getattr(OFTModel, name, _no_forward_hooks)
    override = functools.wraps(original)(functools.partial(_OVERRIDES[name], original))
    if name == "_create_new_module":
        return staticmethod(override)

    @functools.wraps(original)
    def method(self: OFTModel, *args: Any, **kwargs: Any) -> Any:
        return override(self, *args, **kwargs)

    return method


# --- For models to come ----------------------------------------------------------------------------------------------


class _Patch:
    """What `patch_peft` changed, to be undone; one per process."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    @property
    def applied(self) -> bool:
        return bool(self._undo)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        if name in vars(owner):
            self._undo.append(functools.partial(setattr, owner, name, vars(owner)[name]))
        else:
            self._undo.append(functools.partial(delattr, owner, name))
        setattr(owner, name, value)

    def apply(self) -> None:
        for name, method in [(name, _overridden(name)) for name in _OVERRIDES]:
            self._set(OFTModel, name, method)
        module = _peft_hqq_module
        if module is None:
            module = types.ModuleType(_HQQ_MODULE, "HQQ layers of PEFT's OFT, served by hqq_oft.")
            sys.modules[_HQQ_MODULE] = module
            self._undo.append(functools.partial(sys.modules.pop, _HQQ_MODULE, None))
            self._set(sys.modules["peft.tuners.oft"], "hqq", module)
        self._set(module, "HqqOFTLinear", HqqOFTLinear)
        self._set(module, "dispatch_hqq", dispatch_hqq)
        if hasattr(peft_oft_model, "dispatch_hqq"):
            self._set(peft_oft_model, "dispatch_hqq", dispatch_hqq)

    def revert(self) -> None:
        while self._undo:
            self._undo.pop()()


_patch = _Patch()


class PatchHandle:
    """Returned by `patch_peft`: as a context manager it takes the patch back at the end of the block.

    A block inside another patch leaves that one in force.
    """

    def __init__(self, owns: bool) -> None:
        self._owns = owns

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._owns:
            unpatch_peft()


def patch_peft() -> PatchHandle:
    """Have PEFT use `HqqOFTLinear` for every HQQ-quantized target of an `OFTConfig`.

    From then on `get_peft_model`, `add_adapter`, `load_adapter` and `PeftModel.from_pretrained` build our layer;
    `merge_adapter` changes all layers or none; `merge_and_unload` and `unload` give back HQQ layers; `adapter_names`
    reaches the layers; and `HqqOFTLinear` and `dispatch_hqq` can be imported from `peft.tuners.oft.hqq` in every PEFT
    version. Calling it again changes nothing.

    Returns:
        A handle that can be used in a `with` statement.
    """
    owns = not _patch.applied
    if owns:
        _patch.apply()
    return PatchHandle(owns)


def unpatch_peft() -> None:
    """Take `patch_peft` back. Models that exist keep their layers. Calling it again changes nothing."""
    _patch.revert()


# --- For a model that exists -----------------------------------------------------------------------------------------


class HqqOFTModel(OFTModel):
    """The tuner of a model with our layers: an `OFTModel` that can unload HQQ layers and mix adapters in a batch."""


for _name in _OVERRIDES:
    setattr(HqqOFTModel, _name, _overridden(_name))


@dataclass
class ConversionReport:
    """What `convert` or `revert` did.

    Attributes:
        replaced: names of the modules that were replaced.
        kept: name of each OFT module that was not -> the reason.
    """

    replaced: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} layer(s) replaced, {len(self.kept)} kept"]
        lines += [f"  kept {name}: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


def _transplant(old: OFTLayer, new_class: type[OFTLayer]) -> OFTLayer:
    """A `new_class` layer with the adapters, base layer and state of `old`; parameters are shared, not copied."""
    new: Any = object.__new__(new_class)
    nn.Module.__init__(new)
    if isinstance(new, HqqOFTLinear):
        new._init_around(old.base_layer, old._active_adapter, **old.kwargs)
    else:
        OFTLayer.__init__(new, old.base_layer, **old.kwargs)
        new._active_adapter = old._active_adapter
        new.fan_in_fan_out = False
        new.is_target_conv_1d_layer = False
    for name in ("oft_R", "oft_dropout", "oft_block_size", "r", "_disable_adapters", "cast_input_dtype_enabled"):
        setattr(new, name, getattr(old, name))
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(new, name).update(getattr(old, name))
    for name in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
        getattr(new, name).update(getattr(old, name))
    new.training = old.training
    return new


def _swap(
    peft_model: nn.Module, new_class: type[OFTLayer], why_keep: Callable[[OFTLayer], str | None]
) -> ConversionReport:
    report = ConversionReport()
    places: list[tuple[nn.Module, str, OFTLayer]] = []
    replacements: dict[int, OFTLayer] = {}  # a module that stands in several places is replaced by one in all
    for parent_name, parent in peft_model.named_modules():
        for child_name, child in parent.named_children():
            if not isinstance(child, OFTLayer):
                continue
            name = f"{parent_name}.{child_name}" if parent_name else child_name
            reason = why_keep(child)
            if reason is not None:
                report.kept[name] = reason
                continue
            if id(child) not in replacements:
                replacements[id(child)] = _transplant(child, new_class)
            places.append((parent, child_name, replacements[id(child)]))
            report.replaced.append(name)
    for parent, child_name, layer in places:
        setattr(parent, child_name, layer)
    return report


def _tuner(peft_model: nn.Module) -> OFTModel:
    tuner = peft_model if isinstance(peft_model, OFTModel) else getattr(peft_model, "base_model", None)
    if not isinstance(tuner, OFTModel):
        raise TypeError(
            f"expected a PEFT model with OFT adapters, got {type(peft_model).__name__}; make one with "
            "get_peft_model(model, OFTConfig(...))."
        )
    return tuner


def _why_not_convert(layer: OFTLayer) -> str | None:
    if isinstance(layer, HqqOFTLinear):
        return "it is an HqqOFTLinear already"
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
    """Swap the OFT layers that PEFT put on HQQ layers for `HqqOFTLinear`, in place.

    Parameters are shared, so an optimizer that holds them stays valid; training mode, active adapters and hooks are
    kept. The tuner learns to unload HQQ layers and to mix adapters in a batch, without `patch_peft`.

    Args:
        peft_model: a PEFT model with an `OFTConfig`.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        TypeError: the model has no OFT adapters.
    """
    tuner = _tuner(peft_model)
    report = _swap(peft_model, HqqOFTLinear, _why_not_convert)
    _adopt(tuner)
    return report


def revert(peft_model: nn.Module) -> ConversionReport:
    """Undo `convert`: put PEFT's own layers back, sharing the parameters.

    Args:
        peft_model: a PEFT model with `HqqOFTLinear` layers, from `convert` or built under `patch_peft`.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        TypeError: the model has no OFT adapters.
    """
    tuner = _tuner(peft_model)
    report = _swap(peft_model, _PeftHqqLayer, _why_not_revert)
    if type(tuner) is HqqOFTModel and not _our_layers(tuner):
        tuner.__class__ = OFTModel
    return report
