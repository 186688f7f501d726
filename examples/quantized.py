"""What the examples share: a language model from a folder, its decoder's linear layers quantized with HQQ."""

from __future__ import annotations

from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path, bits: int, dtype: torch.dtype, device: str) -> nn.Module:
    """The model, frozen, on `device`; groups of 64 weights share a scale."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    for name, layer in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in TARGETS:
            quantized = HQQLinear(layer, config, compute_dtype=dtype, device=device)
            setattr(model.get_submodule(parent), child, quantized)
    model.hqq_quantized = True  # as transformers marks such models, for PEFT to leave their dtypes alone
    return model.to(device)
