"""The small Llama of the demo: made, trained, quantized, evaluated."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import hqq_oft

from .corpus import VOCABULARY, Text

BATCH, LENGTH = 16, 128
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@dataclass
class Run:
    """What a training run measured.

    Attributes:
        losses: training loss per step, in nats per byte.
        step_ms: median time of a step, in milliseconds.
        cached: whether it was an earlier process that measured it.
    """

    losses: list[float] = field(default_factory=list)
    step_ms: float = 0.0
    cached: bool = False


def new_model(seed: int) -> LlamaForCausalLM:
    """A Llama of 3.3 million parameters with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def train(model: nn.Module, text: Text, steps: int, lr: float, seed: int, device: str, description: str) -> Run:
    """AdamW with a linear warm-up over a tenth of the steps and a cosine decay to a tenth of `lr`."""
    torch.manual_seed(seed)  # dropout
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    warm_up = max(1, steps // 10)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up), eta_min=lr / 10)
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, decay], [warm_up])
    run, times = Run(), []
    with tqdm(text.batches(steps, BATCH, LENGTH, seed), desc=description, unit="step") as progress:
        for batch in progress:
            start = time.perf_counter()
            tokens = batch.to(device)
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            run.losses.append(loss.item())
            times.append(time.perf_counter() - start)
            progress.set_postfix(loss=f"{run.losses[-1]:.3f}")
    model.eval()
    run.step_ms = 1e3 * statistics.median(times)
    return run


def milliseconds(call: Callable[[], object], device: str) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def step_milliseconds(model: nn.Module, batches: list[Tensor], device: str) -> list[float]:
    """Times of forward and backward on each batch, in milliseconds; nothing is trained."""
    model.train()
    times = []
    for batch in batches:
        tokens = batch.to(device)
        inputs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
        times.append(milliseconds(lambda: model(**inputs).loss.backward(), device))  # noqa: B023
        model.zero_grad()
    model.eval()
    return times


def trained_on_prose(text: Text, steps: int, seed: int, cache: Path, device: str) -> tuple[LlamaForCausalLM, Run]:
    """The dense model and how its training went; from the cache where the same training was done before."""
    key = json.dumps([LLAMA, BATCH, LENGTH, steps, seed, device, torch.__version__, len(text.train)])
    path = cache / f"dense-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    model = new_model(seed).to(device)
    if path.exists() and path.with_suffix(".json").exists():
        model.load_state_dict(load_file(path, device=device))
        return model.eval(), Run(**{**json.loads(path.with_suffix(".json").read_text()), "cached": True})
    run = train(model, text, steps, 3e-3, seed, device, "train on prose")
    cache.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(vars(run)))
    return model, run


def quantize(model: LlamaForCausalLM, bits: float, group_size: int, device: str) -> LlamaForCausalLM:
    """Quantize every linear layer but the head with HQQ, in place."""
    model.requires_grad_(False)
    hqq_oft.quantize_model(model, nbits=bits, group_size=group_size, device=device)
    return model


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Tensor], device: str) -> float:
    """Mean loss over the batches, in nats per byte."""
    losses = [model(input_ids=b, labels=b, use_cache=False).loss.item() for b in (b.to(device) for b in batches)]
    return statistics.fmean(losses)


@torch.no_grad()
def logits(model: nn.Module, batch: Tensor, device: str) -> Tensor:
    """Logits of one batch, to be compared bit for bit."""
    return model(input_ids=batch.to(device), use_cache=False).logits
