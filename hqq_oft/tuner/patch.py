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

from .._patching import Patch, PatchHandle
from ..checkpoint.patch import patch as transformers_patch
from . import distributed
from .layer import HqqOFTLinear
from .model import adopt, replace_module

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


def _change(patch: Patch) -> None:
    transformers_patch.enter()
    patch.on_undo(transformers_patch.leave)
    patch.set(OFTModel, "_create_new_module", _patched_create_new_module(OFTModel._create_new_module))
    for tuner_class in (OFTModel, MixedModel):
        patch.set(tuner_class, "_replace_module", _patched_replace_module(tuner_class._replace_module))
    for owner, name, value in distributed.patches():
        patch.set(owner, name, value)
    module = peft_hqq_module
    if module is None:
        module = types.ModuleType(_HQQ_MODULE, "HQQ layers of PEFT's OFT, served by hqq_oft.")
        module.__spec__ = importlib.machinery.ModuleSpec(_HQQ_MODULE, None)
        sys.modules[_HQQ_MODULE] = module
        patch.on_undo(functools.partial(sys.modules.pop, _HQQ_MODULE, None))
        patch.set(sys.modules["peft.tuners.oft"], "hqq", module)
    patch.set(module, "HqqOFTLinear", HqqOFTLinear)
    patch.set(module, "dispatch_hqq", dispatch_hqq)
    if hasattr(peft_oft_model, "dispatch_hqq"):
        patch.set(peft_oft_model, "dispatch_hqq", dispatch_hqq)


_patch = Patch(_change)


def patch_peft() -> PatchHandle:
    """Have PEFT use `HqqOFTLinear` for every HQQ-quantized target of an `OFTConfig`.

    Afterwards `get_peft_model`, `add_adapter`, `load_adapter` and `PeftModel.from_pretrained` build `HqqOFTLinear`;
    `merge_adapter` changes all layers or none; `merge_and_unload` and `unload` restore HQQ layers (merged, after a
    merge, as in PEFT); `adapter_names` is passed to the layers; and `HqqOFTLinear` and `dispatch_hqq` can be imported
    from `peft.tuners.oft.hqq` in every PEFT version. It includes `patch_transformers`, so that base models stored by
    transformers or this package load by their path, and FSDP2 saves and loads HQQ layers. Idempotent.

    Returns:
        A handle that can be used in a `with` statement.
    """
    return PatchHandle(_patch)


def unpatch_peft() -> None:
    """Remove the patch, even inside a `with` block; existing models keep their `HqqOFTLinear` layers and tuners."""
    _patch.remove()
