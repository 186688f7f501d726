"""What makes a model with HQQ layers known as such: to transformers and to PEFT."""

from __future__ import annotations

from typing import Any

from hqq.core.quantize import HQQLinear
from torch import nn
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
