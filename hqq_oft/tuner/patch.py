"""`patch_peft`: make PEFT wrap every HQQ layer in an `HqqOFTLinear`."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import peft.tuners.oft.model as peft_oft_model
from hqq.core.quantize import HQQLinear
from peft.tuners.mixed.model import MixedModel
from peft.tuners.oft.model import OFTModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .layer import HqqOFTLinear
from .model import adopt, replace_module
from .peft_fixes import FIXES
from .unpatched import watch_for_unpatched_layers

_HQQ_MODULE = "peft.tuners.oft.hqq"
# PEFT up to 0.20 has a separate module for HQQ layers; from 0.21 its Linear supports them.
peft_hqq_module = importlib.import_module(_HQQ_MODULE) if importlib.util.find_spec(_HQQ_MODULE) else None


def dispatch_hqq(target: nn.Module, adapter_name: str, **kwargs: Any) -> HqqOFTLinear | None:
    """An `HqqOFTLinear` around `target` if it is an `HQQLinear` or a tuner layer around one, else None.

    Args:
        target: the module to wrap.
        adapter_name: name of its first adapter.
        **kwargs: the settings of `HqqOFTLinear`, or a `peft.OFTConfig` as `config` or `oft_config`.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    return HqqOFTLinear(target, adapter_name, **kwargs) if isinstance(base, HQQLinear) else None


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
            adopt(self)  # the model outlives the patch and must still be able to unload
        replace_module(functools.partial(original, self), parent, child_name, new_module, child)

    return replace


class _Patch:
    """The changes made by `patch_peft`, and how to undo them; one per process."""

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
        for owner, name, fixed in FIXES:
            self._set(owner, name, fixed(getattr(owner, name)))
        for tuner_class in (OFTModel, MixedModel):
            self._set(tuner_class, "_replace_module", _patched_replace_module(tuner_class._replace_module))
        module = peft_hqq_module
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
watch_for_unpatched_layers()


class PatchHandle:
    """Handle returned by `patch_peft`: as a context manager it removes the patch at the end of the block.

    A patch applied before the block, or a permanent one applied inside it, stays active.
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

    Afterwards `get_peft_model`, `add_adapter`, `load_adapter` and `PeftModel.from_pretrained` build `HqqOFTLinear`;
    `merge_adapter` changes all layers or none; `merge_and_unload` and `unload` restore HQQ layers (merged, after a
    merge, as in PEFT); `adapter_names` is passed to the layers; `target_modules="all-linear"` includes HQQ layers;
    `modules_to_save` that names one is refused; LoRA on an adapted HQQ layer keeps its OFT adapters; and `HqqOFTLinear`
    and `dispatch_hqq` can be imported from `peft.tuners.oft.hqq` in every PEFT version. Idempotent.

    Returns:
        A handle that can be used in a `with` statement.
    """
    handle = PatchHandle(_patch.lasting)
    _patch.apply()
    _patch.lasting = True
    return handle


def unpatch_peft() -> None:
    """Remove the patch, even inside a `with` block; existing models keep their `HqqOFTLinear` layers and tuners."""
    _patch.lasting, _patch.blocks = False, 0
    _patch.revert_unless_wanted()
