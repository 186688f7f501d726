"""What makes a model with HQQ layers known as such: to transformers, to PEFT, and to models that read `.weight`."""

from __future__ import annotations

from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from torch import Tensor, nn
from transformers import PretrainedConfig

from .hqq_layer import quantization_settings


def mark_quantized(model: nn.Module) -> None:
    """Mark a model, so that PEFT does not cast it and `save_pretrained` describes its HQQ layers, if any."""
    model.hqq_quantized = True  # type: ignore[assignment]
    has_layers = any(isinstance(module, HQQLinear) for module in model.modules())
    if has_layers and isinstance(config := getattr(model, "config", None), PretrainedConfig):
        config.quantization_config = quantization_config(model)


def quantization_config(model: nn.Module) -> dict[str, Any]:
    """The `quantization_config` of `config.json`, with the fields that transformers 4.57 requires for HQQ models.

    Args:
        model: a model with at least one HQQ layer.
    """
    first = next(module for module in model.modules() if isinstance(module, HQQLinear))
    return {
        "quant_method": "hqq",
        # of the first layer; each layer's settings are stored with its weight
        "quant_config": {**quantization_settings(first), "offload_meta": False},
        "skip_modules": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)],
    }


def _no_weight(layer: HQQLinear) -> Tensor:
    weight = torch.empty(0, dtype=layer.compute_dtype, device=layer.device)
    weight._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers 5 would initialize it by its shape
    return weight


# T5, Mamba and others read dtype and device of `weight` in their forward. transformers 4.57 gives HQQ layers the same.
if not hasattr(HQQLinear, "weight"):
    HQQLinear.weight = property(_no_weight)
