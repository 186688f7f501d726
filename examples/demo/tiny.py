"""A Llama of 3.3 million parameters over bytes: trained on prose here, then adapted to code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from . import corpus
from .model import Job, train

BATCH, LENGTH = 16, 128
LLAMA = {
    "vocab_size": corpus.VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def job(pretrain_steps: int, seed: int, cache: Path, device: str) -> Job:
    """The small model, with code to be adapted to."""
    prose, code = corpus.prose(), corpus.code()
    return Job(
        name="small Llama over bytes",
        dense=lambda: trained_on_prose(prose, pretrain_steps, seed, cache, device),
        texts={"code": code, "prose": prose},
        question="def ",
        prompt=torch.tensor([list(b"\n\ndef ")]),
        decode=lambda tokens: bytes(tokens.tolist()).decode("utf-8", "replace"),
        batch=BATCH,
        length=LENGTH,
        steps=120,
        lr=1e-2,
    )


def trained_on_prose(text: corpus.Text, steps: int, seed: int, cache: Path, device: str) -> LlamaForCausalLM:
    """The dense model; from the cache where the same training was done before."""
    key = json.dumps([LLAMA, BATCH, LENGTH, steps, seed, device, torch.__version__, len(text.train)])
    path = cache / f"dense-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).to(device)
    if path.exists():
        model.load_state_dict(load_file(path, device=device))
        return model.eval()
    train(model, text.batches(steps, BATCH, LENGTH, seed), 3e-3, seed, device, "train on prose")
    cache.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return model
