"""Orthogonal Fine-Tuning (OFT) on HQQ-quantized linear layers: a drop-in layer for PEFT."""

from . import functional
from ._installation import __version__ as __version__
from ._patching import PatchHandle
from .checkpoint.files import CheckpointError
from .checkpoint.load import load_quantized
from .checkpoint.patch import patch_transformers, unpatch_transformers
from .checkpoint.save import save_quantized
from .ops.backends import BackendError, Unsupported, backend
from .ops.weight import QuantizedWeight
from .quant.model import quantize_model
from .quant.report import QuantizationReport
from .quant.settings import QuantizationSettings
from .tuner.convert import ConversionReport, convert, revert
from .tuner.distributed import full_adapter_state_dict
from .tuner.layer import HqqOFTLinear
from .tuner.linear import OFTLinear
from .tuner.merge_report import LayerReport, MergeReport, merge_report
from .tuner.patch import dispatch_hqq, patch_peft, unpatch_peft
from .tuner.rotation_modes import frozen_rotations, share_rotations

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConversionReport",
    "HqqOFTLinear",
    "LayerReport",
    "MergeReport",
    "OFTLinear",
    "PatchHandle",
    "QuantizationReport",
    "QuantizationSettings",
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
    "patch_transformers",
    "quantize_model",
    "revert",
    "save_quantized",
    "share_rotations",
    "unpatch_peft",
    "unpatch_transformers",
]
