"""Orthogonal Fine-Tuning (OFT) on HQQ-quantized linear layers: a drop-in layer for PEFT."""

from importlib import metadata as _metadata

from . import functional
from .backends import BackendError, Unsupported, backend
from .layer import HqqOFTLinear
from .peft_integration import ConversionReport, convert, dispatch_hqq, patch_peft, revert, unpatch_peft
from .serving import frozen_rotations
from .sharded import full_adapter_state_dict
from .sharing import share_rotations
from .weight import QuantizedWeight

__version__ = _metadata.version("hqq-oft")

__all__ = [
    "BackendError",
    "ConversionReport",
    "HqqOFTLinear",
    "QuantizedWeight",
    "Unsupported",
    "backend",
    "convert",
    "dispatch_hqq",
    "frozen_rotations",
    "full_adapter_state_dict",
    "functional",
    "patch_peft",
    "revert",
    "share_rotations",
    "unpatch_peft",
]
