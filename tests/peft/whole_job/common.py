"""What both scripts of the whole job need: text as samples, and what is compared."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

ADAPTERS = ("prose", "code")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTH, HELD_OUT = 64, 4  # tokens of a sample, samples held out


def folders(description: str | None) -> tuple[Path, Path]:
    """The folder on the command line, and the one in it that `--out` names."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    return options.folder, options.folder / options.out


def samples(folder: Path, name: str) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Training samples of a text, and the tokens of those held out."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    text = (folder / f"{name}.txt").read_text(encoding="utf-8")
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows[:-HELD_OUT]], rows[-HELD_OUT:]


@torch.no_grad()
def held_out_loss(model: Any, tokens: Tensor) -> float:
    return float(model.eval()(input_ids=tokens, labels=tokens).loss)


@torch.no_grad()
def logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Of the last position of each sample."""
    return model.eval()(input_ids=tokens, **options).logits[:, -1]
