"""What the examples share: a language model from a folder, quantized with HQQ, and which layers to adapt."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hqq_oft

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path, bits: int, dtype: torch.dtype, device: str) -> nn.Module:
    """The model, frozen, on `device`; groups of 64 weights share a scale."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    hqq_oft.quantize_model(model, nbits=bits, group_size=64, device=device)
    return model.to(device)
