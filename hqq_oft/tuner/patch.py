"""`patch_peft`: make PEFT wrap every HQQ layer in an `HqqOFTLinear`, every other linear layer in an `OFTLinear`."""

from __future__ import annotations

import functools
import importlib.machinery
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
from .adapters import AdaptedLayer
from .convert import HQQ_MODULE, become, our_class, peft_hqq_module
from .layer import HqqOFTLinear
from .model import adopt, replace_module
from .peft_fixes import FIXES
from .unpatched import watch_for_unpatched_layers


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
        new_module: Any = dispatch_hqq(target, adapter_name, config=oft_config)
        if new_module is None:
            # PEFT decides which layers it wraps, and how its versions name them.
            new_module = original(oft_config, adapter_name, target, **kwargs)
            if (ours := our_class(new_module)) is not None:
                become(new_module, ours)
        return new_module

    return staticmethod(create)


def _patched_replace_module(original: Callable[..., None]) -> Any:
    @functools.wraps(original)
    def replace(self: nn.Module, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, AdaptedLayer):
            adopt(self)  # the model outlives the patch and must still be able to unload
        replace_module(functools.partial(original, self), parent, child_name, new_module, child)

    return replace


def _change(patch: Patch) -> None:
    patch.set(OFTModel, "_create_new_module", _patched_create_new_module(OFTModel._create_new_module))
    for owner, name, fixed in FIXES:
        patch.set(owner, name, fixed(getattr(owner, name)))
    for tuner_class in (OFTModel, MixedModel):
        patch.set(tuner_class, "_replace_module", _patched_replace_module(tuner_class._replace_module))
    for owner, name, value in distributed.patches():
        patch.set(owner, name, value)
    module = peft_hqq_module
    if module is None:
        module = types.ModuleType(HQQ_MODULE, "HQQ layers of PEFT's OFT, served by hqq_oft.")
        module.__spec__ = importlib.machinery.ModuleSpec(HQQ_MODULE, None)
        sys.modules[HQQ_MODULE] = module
        patch.on_undo(functools.partial(sys.modules.pop, HQQ_MODULE, None))
        patch.set(sys.modules["peft.tuners.oft"], "hqq", module)
    patch.set(module, "HqqOFTLinear", HqqOFTLinear)
    patch.set(module, "dispatch_hqq", dispatch_hqq)
    if hasattr(peft_oft_model, "dispatch_hqq"):
        patch.set(peft_oft_model, "dispatch_hqq", dispatch_hqq)


_patch = Patch(_change, included=transformers_patch)
watch_for_unpatched_layers()


def patch_peft() -> PatchHandle:
    """Have PEFT use `HqqOFTLinear` for every HQQ-quantized target of an `OFTConfig`, `OFTLinear` for other linear ones.

    Afterwards `get_peft_model`, `add_adapter`, `load_adapter` and `PeftModel.from_pretrained` build these layers, on
    dense linear layers and on those of bitsandbytes, GPTQ and other quantizers, too; convolutions and embeddings keep
    PEFT's own. `merge_adapter` changes all layers or none; `merge_and_unload` and `unload` restore HQQ layers (merged,
    after a merge, as in PEFT); `adapter_names` is passed to the layers; `target_modules="all-linear"` includes HQQ
    layers and excludes routers; `modules_to_save` that names an HQQ layer is refused; LoRA on an adapted one keeps
    its OFT adapters; and `HqqOFTLinear` and `dispatch_hqq` can be imported from `peft.tuners.oft.hqq` in every PEFT
    version. It includes `patch_transformers`, so that base models stored by transformers or this package load by their
    path, and has FSDP2 save and load HQQ layers. Idempotent.

    Returns:
        A handle that can be used in a `with` statement.
    """
    return PatchHandle(_patch)


def unpatch_peft() -> None:
    """Remove the patch, even inside a `with` block; existing models keep their layers and tuners."""
    _patch.remove()
