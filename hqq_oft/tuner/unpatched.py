"""A warning where PEFT's own OFT layer wraps an HQQ layer, because `patch_peft` was forgotten."""

from __future__ import annotations

import functools
import warnings

from hqq.core.quantize import HQQLinear
from peft.tuners.oft.layer import OFTLayer
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .layer import HqqOFTLinear


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "PEFT's own OFT layer wraps an HQQ layer, although hqq_oft is imported: it is slower and, depending on PEFT's "
        "version, fails or loses adapters and biases when merging. Call hqq_oft.patch_peft() before adding adapters, "
        "or hqq_oft.convert(model) after.",
        stacklevel=4,  # of the layer's constructor
    )


def _watch(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Called by PyTorch for each module that becomes part of another; changes nothing."""
    if (
        name == "base_layer"
        and isinstance(child, HQQLinear)
        and isinstance(parent, OFTLayer)
        and not isinstance(parent, HqqOFTLinear)
    ):
        _warn_once()


def watch_for_unpatched_layers() -> None:
    """Start watching; PEFT itself stays as it is."""
    register_module_module_registration_hook(_watch)
