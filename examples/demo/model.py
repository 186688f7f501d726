"""A model that the demo can adapt, with its texts; how it is trained, quantized and evaluated."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

import hqq_oft

from .corpus import Text


@dataclass(frozen=True)
class Job:
    """What is adapted to what.

    Attributes:
        name: of the model.
        dense: returns a new copy of the dense model.
        texts: two texts by name: what the adapter is trained on, and what else is measured.
        question: what the model is asked.
        prompt: the same as tokens `[1, length]`, which the model continues.
        decode: converts generated tokens to text.
        batch: sequences per batch.
        length: tokens per sequence.
        steps: fine-tuning steps, unless given.
        lr: peak learning rate of the fine-tuning.
    """

    name: str
    dense: Callable[[], nn.Module]
    texts: dict[str, Text]
    question: str
    prompt: Tensor
    decode: Callable[[Tensor], str]
    batch: int
    length: int
    steps: int
    lr: float


@dataclass
class Run:
    """What a training run measured.

    Attributes:
        losses: training loss per step, in nats per token.
        step_ms: median time of a step, in milliseconds.
    """

    losses: list[float] = field(default_factory=list)
    step_ms: float = 0.0


def train(model: nn.Module, batches: list[Tensor], lr: float, seed: int, device: str, description: str) -> Run:
    """AdamW with a linear warm-up over a tenth of the steps and a cosine decay to a tenth of `lr`."""
    torch.manual_seed(seed)  # dropout
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    steps, warm_up = len(batches), max(1, len(batches) // 10)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps - warm_up), eta_min=lr / 10)
    ramp = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm_up, total_iters=warm_up)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [ramp, decay], [warm_up])
    run, times = Run(), []
    with tqdm(batches, desc=description, unit="step") as progress:
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


def quantize(model: nn.Module, bits: float, group_size: int, device: str) -> nn.Module:
    """Quantize every linear layer but the head with HQQ, in place."""
    model.requires_grad_(False)
    hqq_oft.quantize_model(model, nbits=bits, group_size=group_size, device=device)
    return model.to(device)


@torch.no_grad()
def evaluate(model: nn.Module, batches: list[Tensor], device: str) -> float:
    """Mean loss over the batches, in nats per token."""
    losses = [model(input_ids=b, labels=b, use_cache=False).loss.item() for b in (b.to(device) for b in batches)]
    return statistics.fmean(losses)


@torch.no_grad()
def logits(model: nn.Module, batch: Tensor, device: str) -> Tensor:
    """Logits of one batch, to be compared bit for bit."""
    return model(input_ids=batch.to(device), use_cache=False).logits


def answer(model: nn.Module, job: Job, tokens: int, device: str) -> tuple[str, float]:
    """What the model continues the prompt with, greedily, and the new tokens per second."""
    prompt = job.prompt.to(device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    start = time.perf_counter()
    new = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, prompt.shape[1] :].cpu()
    return job.decode(new).strip(), len(new) / (time.perf_counter() - start)
