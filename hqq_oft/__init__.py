"""Orthogonal Fine-Tuning (OFT) on HQQ-quantized linear layers: a drop-in layer for PEFT."""

from importlib import metadata as _metadata

from . import functional
from .backends import BackendError, Unsupported, backend
from .conversion import ConversionReport, convert, revert
from .layer import HqqOFTLinear
from .loading import load_quantized
from .merge_report import MergeReport, merge_report
from .peft_integration import dispatch_hqq, patch_peft, unpatch_peft
from .quantizing import QuantizationReport, quantize_model
from .safetensors_file import CheckpointError
from .saving import save_quantized
from .serving import frozen_rotations
from .sharded import full_adapter_state_dict
from .sharing import share_rotations
from .weight import QuantizedWeight

__version__ = _metadata.version("hqq-oft")

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConversionReport",
    "HqqOFTLinear",
    "MergeReport",
    "QuantizationReport",
    "QuantizedWeight",
    "Unsupported",
    "backend",
    "convert",
    "dispatch_hqq",
    "frozen_rotations",
    "full_adapter_state_dict",
    "functional",
    "load_quantized",
    "merge_report",
    "patch_peft",
    "quantize_model",
    "revert",
    "save_quantized",
    "share_rotations",
    "unpatch_peft",
]
