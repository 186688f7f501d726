"""Shared by the examples: loads a language model, quantizes it with HQQ, and lists the layers to adapt."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hqq_oft

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: Path, bits: int, dtype: torch.dtype, device: str) -> nn.Module:
    """Load the model from `folder`, freeze it, quantize it with groups of 64 weights, and move it to `device`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    hqq_oft.quantize_model(model, nbits=bits, group_size=64, device=device)
    return model.to(device)
