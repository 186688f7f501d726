"""Making PEFT use `HqqOFTLinear`: for models to come (`patch_peft`) and for one that exists (`convert`)."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import logging
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft.tuners.oft.model as peft_oft_model
from hqq.core.quantize import HQQLinear
from peft.tuners.mixed.model import MixedModel
from peft.tuners.oft.layer import Linear as PeftLinear
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.oft.model import OFTModel
from peft.tuners.tuners_utils import BaseTunerLayer, onload_layer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from tqdm import tqdm

from .layer import HqqOFTLinear
from .merging import MergeInto, check_into, forget_quantization, quantization_settings

logger = logging.getLogger("hqq_oft")

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


# --- What the tuner of a model with our layers does differently -----------------------------------------------------


class HqqOFTModel(OFTModel):
    """An `OFTModel` that can unload HQQ layers, merges all layers or none, and mixes adapters in a batch.

    The tuner of a model becomes one when the first of our layers is put into it.
    """

    _unloaded_errors: Mapping[str, float] = {}  # a tuner that becomes one runs no __init__

    def merge_errors(self) -> dict[str, float]:
        """How far storing has moved the weight of each merged HQQ layer: name -> |W'_q - W'| / |W'|.

        After `merge_and_unload`, which leaves no layers to ask, those of the layers that it merged.
        """
        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, HqqOFTLinear)]
        merged = {name: layer.merge_error for name, layer in layers if layer.merge_error is not None}
        return merged if layers else dict(self._unloaded_errors)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        _replace_module(super()._replace_module, parent, child_name, new_module, child)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As PEFT's, for all layers or none: if one fails, those merged before it are put back."""
        self._merge_all(tqdm_disable=None, safe_merge=safe_merge, adapter_names=adapter_names)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        into: MergeInto = None,
    ) -> nn.Module:
        """As PEFT's, for all layers or none; `hqq_oft.merge_report` measures beforehand what each choice loses.

        Args:
            progressbar: show a bar.
            safe_merge: check for NaN and infinity.
            adapter_names: the adapters to merge, by default the active ones.
            into: what the HQQ layers that adapters are merged into become: HQQ layers with their own settings (None) or
                with that many bits, or `"dense"` linear layers in their compute dtype, which lose nothing but rounding.

        Returns:
            The model without adapters.

        Raises:
            ValueError: `into` is none of these; a layer can't be merged. The model is as it was then.
        """
        check_into(into)
        return self._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names, into=into
        )

    def _merge_all(
        self, tqdm_disable: bool | None, safe_merge: bool, adapter_names: list[str] | None, into: MergeInto = None
    ) -> tuple[dict[str, float], dict[nn.Module, nn.Linear]]:
        """Merge every layer; with `into="dense"` ours stay as they are, and what is to replace them is returned.

        Returns:
            The error of each of our layers by name, and the dense layers.
        """
        errors: dict[str, float] = {}
        dense: dict[nn.Module, nn.Linear] = {}
        self._check_merge_allowed()
        layers = [(name, module) for name, module in self.model.named_modules() if isinstance(module, BaseTunerLayer)]
        with _merge_undone_on_error([layer for _, layer in layers]):
            # disable=None shows the bar on a terminal alone
            progress, worst = tqdm(layers, disable=tqdm_disable, desc="Merging OFT layers", unit="layer"), 0.0
            for name, layer in progress:
                error = None
                with onload_layer(layer):
                    if not isinstance(layer, HqqOFTLinear):
                        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                    elif into != "dense":
                        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names, into=into)
                        error = layer.merge_error
                    elif (merged := layer.merged_linear(safe_merge, adapter_names)) is not None:
                        dense[layer], error = merged
                if error is not None:
                    errors[name] = error
                    logger.info("%s: quantizing the merged weight changed it by %.2e", name, error)
                    worst = max(worst, error, key=lambda error: (math.isnan(error), error))
                    progress.set_postfix(error=f"{error:.1e}", worst=f"{worst:.1e}")
        return errors, dense

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        into: MergeInto = None,
    ) -> nn.Module:
        unload = functools.partial(
            super()._unload_and_optionally_merge, safe_merge=safe_merge, adapter_names=adapter_names
        )
        if not merge:
            return unload(merge=False, progressbar=progressbar)
        # First merge every layer, then let PEFT swap them out; it finds them merged.
        places = [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent._modules.items()
            if isinstance(child, BaseTunerLayer)
        ]
        with _merge_undone_on_error([child for _, _, child in places]):
            try:
                errors, dense = self._merge_all(not progressbar, safe_merge, adapter_names, into)
                for parent, name, child in places:
                    if child in dense:
                        setattr(parent, name, dense[child])
                with warnings.catch_warnings():
                    warnings.filterwarnings(
                        "ignore", message="All adapters are already merged|Already following adapters"
                    )
                    model = super()._unload_and_optionally_merge(safe_merge=safe_merge, adapter_names=adapter_names)
                self._unloaded_errors = errors
                if into is not None and into != "dense":
                    for _, _, child in places:
                        if isinstance(child, HqqOFTLinear) and child.merged:
                            base = child.get_base_layer()
                            base.quant_config = quantization_settings(base, into)
                if dense:
                    forget_quantization(model)
                return model
            except BaseException:
                for parent, name, child in places:
                    setattr(parent, name, child)
                raise

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of one forward or `generate` to every layer, with the checks of PEFT's LoRA.

        As there, beams are counted from the keyword `num_beams`, not from a `generation_config`.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        handles: list[Any] = []
        try:
            for module, names in self._modules_with_adapter_names(adapter_names, kwargs.get("num_beams")):
                hook = functools.partial(_add_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _modules_with_adapter_names(self, adapter_names: Any, beams: Any) -> list[tuple[nn.Module, list[str]]]:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not isinstance(adapter_names, (list, tuple)):
            raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
        layers = [module for module in self.modules() if isinstance(module, OFTLayer)]
        foreign = sorted({type(layer).__name__ for layer in layers if not isinstance(layer, HqqOFTLinear)})
        if foreign:
            raise ValueError(
                "`adapter_names` needs every OFT layer to be an HqqOFTLinear, but the model also adapts layers that "
                f"are not HQQ-quantized ({', '.join(foreign)}), where PEFT ignores it. Target HQQ layers alone."
            )
        unexpected = set(adapter_names) - {name for layer in layers for name in layer.oft_R} - {"__base__"}
        if unexpected:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unexpected))}")
        # Beam search repeats each sample; an encoder still sees the samples as they were given.
        repeated = [name for name in adapter_names for _ in range(beams if isinstance(beams, int) else 1)]
        in_encoder: set[nn.Module] = set()
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            in_encoder = set(self.model.get_encoder().modules())
        return [
            (module, list(adapter_names) if module in in_encoder else repeated)
            for module in self.modules()
            if isinstance(module, (HqqOFTLinear, AuxiliaryTrainingWrapper))
        ]


def _add_adapter_names(module: nn.Module, args: Any, kwargs: Any, *, adapter_names: list[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


@contextmanager
def _merge_undone_on_error(layers: Sequence[BaseTunerLayer]) -> Iterator[None]:
    """If the block raises, put the weights and the lists of merged adapters of all layers back.

    PEFT's own layers merge into their weight in place, so a copy of it is kept meanwhile.
    """
    ours = [(layer, layer.merge_state()) for layer in layers if isinstance(layer, HqqOFTLinear)]
    others = [
        (layer, weight, weight.detach().clone(), list(layer.merged_adapters))
        for layer in layers
        if not isinstance(layer, HqqOFTLinear)
        and isinstance(weight := getattr(layer.get_base_layer(), "weight", None), nn.Parameter)
    ]
    try:
        yield
    except BaseException:
        for layer, state in ours:
            layer.restore_merge_state(state)
        for layer, weight, before, merged in others:
            weight.data = before
            layer.get_base_layer().weight = weight  # PEFT may have put another in its place
            layer.merged_adapters[:] = merged
        raise


class HqqMixedModel(MixedModel):
    """The tuner of a `PeftMixedModel` that can unload HQQ layers."""

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        _replace_module(super()._replace_module, parent, child_name, new_module, child)


_OUR_TUNERS: dict[type[nn.Module], type[nn.Module]] = {OFTModel: HqqOFTModel, MixedModel: HqqMixedModel}
_PEFT_TUNERS = {ours: theirs for theirs, ours in _OUR_TUNERS.items()}


def _adopt(tuner: nn.Module) -> None:
    tuner.__class__ = _OUR_TUNERS.get(type(tuner), type(tuner))


def _match_tuners(model: nn.Module) -> None:
    """Make each tuner in `model` ours or PEFT's, by whether there are layers of ours in it."""
    for tuner in [module for module in model.modules() if type(module) in {*_OUR_TUNERS, *_PEFT_TUNERS}]:
        if any(isinstance(module, HqqOFTLinear) for module in tuner.modules()):
            _adopt(tuner)
        else:
            tuner.__class__ = _PEFT_TUNERS.get(type(tuner), type(tuner))


def _replace_module(
    original: Callable[..., None], parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
) -> None:
    if isinstance(new_module, HQQLinear):
        # PEFT would copy `.weight`, which an HQQ layer does not have; the layer comes back whole as it is.
        setattr(parent, child_name, new_module)
    else:
        original(parent, child_name, new_module, child)


# --- For models to come ----------------------------------------------------------------------------------------------


def _patched_create_new_module(original: Callable[..., nn.Module]) -> Any:
    @functools.wraps(original)
    def create(oft_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        new_module = dispatch_hqq(target, adapter_name, config=oft_config)
        return original(oft_config, adapter_name, target, **kwargs) if new_module is None else new_module

    return staticmethod(create)


def _patched_replace_module(original: Callable[..., None]) -> Any:
    @functools.wraps(original)
    def replace(self: nn.Module, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, HqqOFTLinear):
            _adopt(self)  # the model outlives the patch, and must be able to unload then
        _replace_module(functools.partial(original, self), parent, child_name, new_module, child)

    return replace


class _Patch:
    """What `patch_peft` changed, to be undone; one per process."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self.lasting = False
        self.blocks = 0

    def _set(self, owner: Any, name: str, value: Any) -> None:
        if name in vars(owner):
            self._undo.append(functools.partial(setattr, owner, name, vars(owner)[name]))
        else:
            self._undo.append(functools.partial(delattr, owner, name))
        setattr(owner, name, value)

    def apply(self) -> None:
        if self._undo:
            return
        self._set(OFTModel, "_create_new_module", _patched_create_new_module(OFTModel._create_new_module))
        for tuner_class in (OFTModel, MixedModel):
            self._set(tuner_class, "_replace_module", _patched_replace_module(tuner_class._replace_module))
        module = _peft_hqq_module
        if module is None:
            module = types.ModuleType(_HQQ_MODULE, "HQQ layers of PEFT's OFT, served by hqq_oft.")
            module.__spec__ = importlib.machinery.ModuleSpec(_HQQ_MODULE, None)
            sys.modules[_HQQ_MODULE] = module
            self._undo.append(functools.partial(sys.modules.pop, _HQQ_MODULE, None))
            self._set(sys.modules["peft.tuners.oft"], "hqq", module)
        self._set(module, "HqqOFTLinear", HqqOFTLinear)
        self._set(module, "dispatch_hqq", dispatch_hqq)
        if hasattr(peft_oft_model, "dispatch_hqq"):
            self._set(peft_oft_model, "dispatch_hqq", dispatch_hqq)

    def revert_unless_wanted(self) -> None:
        if not self.lasting and self.blocks == 0:
            while self._undo:
                self._undo.pop()()


_patch = _Patch()


class PatchHandle:
    """Returned by `patch_peft`: as a context manager it takes the patch back at the end of the block.

    A patch from outside the block, or one asked for inside it to last, stays in force.
    """

    def __init__(self, lasting_before: bool) -> None:
        self._lasting_before = lasting_before

    def __enter__(self) -> PatchHandle:
        _patch.lasting = self._lasting_before
        _patch.blocks += 1
        return self

    def __exit__(self, *exc_info: object) -> None:
        _patch.blocks = max(0, _patch.blocks - 1)
        _patch.revert_unless_wanted()


def patch_peft() -> PatchHandle:
    """Have PEFT use `HqqOFTLinear` for every HQQ-quantized target of an `OFTConfig`.

    From then on `get_peft_model`, `add_adapter`, `load_adapter` and `PeftModel.from_pretrained` build our layer;
    `merge_adapter` changes all layers or none; `merge_and_unload` and `unload` give back HQQ layers (merged, after a
    merge, as in PEFT); `adapter_names` reaches the layers; and `HqqOFTLinear` and `dispatch_hqq` can be imported from
    `peft.tuners.oft.hqq` in every PEFT version. Calling it again changes nothing.

    Returns:
        A handle that can be used in a `with` statement.
    """
    handle = PatchHandle(_patch.lasting)
    _patch.apply()
    _patch.lasting = True
    return handle


def unpatch_peft() -> None:
    """Take `patch_peft` back, inside a `with` block too. Models that exist keep their layers and what they can do."""
    _patch.lasting, _patch.blocks = False, 0
    _patch.revert_unless_wanted()


# --- For a model that exists -----------------------------------------------------------------------------------------


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


def _become(layer: OFTLayer, new_class: type[OFTLayer]) -> None:
    layer.__class__ = new_class
    if isinstance(layer, HqqOFTLinear):
        layer._take_base_layer()
    else:
        layer.fan_in_fan_out = layer.is_target_conv_1d_layer = False


def _turn(
    peft_model: nn.Module, new_class: type[OFTLayer], why_keep: Callable[[OFTLayer], str | None]
) -> ConversionReport:
    """Make every OFT layer of the model that `why_keep` has nothing against a `new_class`.

    A layer changes its class and stays the object it is: hooks and their handles, other modules that hold the layer,
    and its compiled call stay valid.
    """
    report = ConversionReport()
    classes: dict[OFTLayer, type[OFTLayer]] = {}  # by layer: one may stand in several places
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
        raise TypeError(
            f"expected a model with OFT adapters, got {type(peft_model).__name__} without any; make one with "
            "get_peft_model(model, OFTConfig(...))."
        )
    try:
        for layer in classes:
            _become(layer, new_class)
    except BaseException:
        for layer, old_class in classes.items():
            layer.__class__ = old_class
        raise
    return report


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
    """Turn the OFT layers that PEFT put on HQQ layers into `HqqOFTLinear`, in place.

    Parameters stay, so an optimizer that holds them stays valid; training mode, active adapters and hooks are kept.
    A tuner in the model learns to unload HQQ layers and to mix adapters in a batch, without `patch_peft`.

    Args:
        peft_model: a `PeftModel` or `PeftMixedModel` with an `OFTConfig`, its tuner, or any module with OFT layers in
            it.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        TypeError: the model has no OFT adapters.
    """
    report = _turn(peft_model, HqqOFTLinear, _why_not_convert)
    _match_tuners(peft_model)
    return report


def revert(peft_model: nn.Module) -> ConversionReport:
    """Turn each `HqqOFTLinear` into PEFT's own layer, in place.

    Args:
        peft_model: a model with `HqqOFTLinear` layers, from `convert` or built under `patch_peft`.

    Returns:
        What was replaced, and what was not and why.

    Raises:
        TypeError: the model has no OFT adapters.
    """
    report = _turn(peft_model, _PeftHqqLayer, _why_not_revert)
    _match_tuners(peft_model)
    return report
