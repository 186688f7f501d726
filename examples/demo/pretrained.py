"""A pretrained chat model that learns what Python's documentation says."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import corpus
from .model import Job


def job(folder: Path, device: str) -> Job:
    """The model in a directory: in bfloat16, on 1024 tokens a step; its tokenizer needs a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def dense() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval().to(device)

    return Job(
        name=folder.name,
        dense=dense,
        texts={"documentation": corpus.chats(tokenizer), "code": corpus.code_tokens(tokenizer)},
        question=corpus.question(corpus.held_out_topic()),
        prompt=corpus.chat(tokenizer, corpus.held_out_topic())[None],
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        batch=4,
        length=256,
        steps=40,
        lr=1e-3,
    )
