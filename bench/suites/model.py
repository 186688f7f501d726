"""A stack of decoder layers: a training step, decoding token by token, and what takes fresh processes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import hqq_oft
from hqq_oft import HqqOFTLinear

from .. import contenders, model
from ..contenders import Contender
from ..environment import ROOT
from ..problem import DTYPES, Problem, hqq_layer, skew_parameters
from ..session import LORA, LORA_RANK, OURS, PEFT, Case, Job, Session
from ..timing import kept_bytes
from .profile import MAIN, Decoder, Profile

OPERATIONS = frozenset({"cayley", "cayley_backward", "rotate", "rotate_backward", "linear", "linear_backward"})
KINDS = (OURS, "dense", LORA, PEFT)
PROCESSES = (OURS, PEFT)  # that are trained each in a process of its own
RESET_PEAK = Path("/proc/self/clear_refs")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def cases(profile: Profile) -> list[Case]:
    """Training first, then decoding, then the first step."""
    found = []
    shape = profile.decoder
    facts = {"block": MAIN.block, "bits": MAIN.bits, "group": MAIN.group, "axis": MAIN.axis, "dtype": MAIN.dtype}
    for rank, sequence in enumerate(profile.sequences):
        for checkpointing in (True, False):
            name = f"training step, {shape.layers} layers of {shape.hidden}, sequence {sequence}"
            name += ", gradient checkpointing" if checkpointing else ""
            jobs = partial(_training, profile, sequence, checkpointing)
            found.append(Case("model", name, rank, OPERATIONS, {"M": sequence, **facts}, jobs))
    for adapters in (1, profile.served):
        name = f"decode, {shape.layers} layers of {shape.hidden}, {profile.served} sequences, {adapters} adapters"
        jobs = partial(_decoding, profile, adapters)
        found.append(Case("model", name, 5, OPERATIONS, {"M": profile.served, **facts}, jobs))
    found.append(Case("model", f"first step, {shape.layers} layers", 6, OPERATIONS, facts, partial(_first, profile)))
    name = f"training process, {shape.layers} layers of {shape.hidden}, sequence {min(profile.sequences)}"
    found.append(Case("model", name, 6, OPERATIONS, facts, partial(_processes, profile)))
    return found


def linear_shapes(shape: Decoder) -> list[tuple[int, int]]:
    """Out- and in-features of a decoder layer's seven linear layers."""
    narrow = shape.hidden // shape.heads * shape.key_value_heads
    return [
        *[(shape.hidden, shape.hidden)] * 2,
        *[(narrow, shape.hidden)] * 2,
        *[(shape.intermediate, shape.hidden)] * 2,
        (shape.hidden, shape.intermediate),
    ]


def build(kind: str, shape: Decoder, device: torch.device, adapters: int = 1) -> nn.Module:
    """A Llama with random weights, frozen; its decoder layers quantized unless `dense`, and adapted."""
    dtype = DTYPES[MAIN.dtype]
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=1 << 16,
        attn_implementation="sdpa",
    )
    with device:
        llama = LlamaForCausalLM(config).to(dtype)
    llama.requires_grad_(False)
    if kind == "dense":
        return llama
    for decoder_layer in llama.model.layers:
        for name in TARGETS:
            parent = decoder_layer.self_attn if hasattr(decoder_layer.self_attn, name) else decoder_layer.mlp
            linear = getattr(parent, name)
            problem = Problem(linear.out_features, linear.in_features, MAIN, device)
            setattr(parent, name, hqq_layer(problem.weights[0], dtype))
    llama.hqq_quantized = True
    if kind == "HQQ":
        return llama
    if kind == LORA:
        adapted = get_peft_model(llama, LoraConfig(r=LORA_RANK, target_modules=TARGETS))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:  # in the model's dtype, as half-precision training sets it
                parameter.data = parameter.data.to(dtype)
        return adapted.to(device)
    config = OFTConfig(r=0, oft_block_size=MAIN.block, target_modules=TARGETS, use_cayley_neumann=True)
    if kind == "hqq_oft":
        with hqq_oft.patch_peft():
            adapted = get_peft_model(llama, config)
            for number in range(1, adapters):
                adapted.add_adapter(f"adapter{number}", config)
    else:
        adapted = get_peft_model(llama, config)
    adapted = adapted.to(device)
    for name, parameter in adapted.named_parameters():
        if "oft_R" in name:
            parameter.data.copy_(skew_parameters(parameter.shape[0], MAIN.block, device))
    return adapted


class TrainingStep:
    """Forward, backward and an optimizer's step on random tokens."""

    def __init__(self, llama: nn.Module, shape: Decoder, sequence: int, checkpointing: bool, device: torch.device):
        self.llama = llama.train()
        base = llama.get_base_model() if hasattr(llama, "get_base_model") else llama
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            base.gradient_checkpointing_disable()
        self.tokens = torch.randint(0, shape.vocabulary, (1, sequence), device=device)
        embedded = base.get_input_embeddings()(self.tokens)
        # A gradient reaches the first layer whatever is trained, so that all contenders do the same backward.
        self.embedded = embedded.detach().requires_grad_()
        self.trained = [p for p in llama.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5) if self.trained else None

    def forward(self) -> Tensor:
        return self.llama(inputs_embeds=self.embedded, labels=self.tokens, use_cache=False).loss

    def __call__(self, number: int) -> None:
        self.forward().backward()
        self.embedded.grad = None
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()


def _models(profile: Profile, kinds: tuple[str, ...], session: Session, adapters: int = 1) -> dict[str, nn.Module]:
    key = ("models", profile.decoder, kinds, adapters)
    return session.keep(key, lambda: {kind: build(kind, profile.decoder, session.device, adapters) for kind in kinds})


def _training(profile: Profile, sequence: int, checkpointing: bool, session: Session) -> list[Job]:
    jobs = []
    for kind, llama in _models(profile, KINDS, session).items():
        # As jobs take turns, each has to set what it needs; here all need the same.
        step = TrainingStep(llama, profile.decoder, sequence, checkpointing, session.device)
        passes = tuple(step_passes(kind, profile.decoder, sequence, checkpointing, session))
        held = [step.embedded, *llama.parameters(), *llama.buffers()]
        columns: dict[str, Any] = {}
        if session.device.type != "cuda":
            columns["kept_mib"] = kept_bytes(step.forward, held) / 2**20
        jobs.append(Job(kind, "training step", step, passes, columns=columns))
    return jobs


def step_passes(kind: str, shape: Decoder, tokens: int, checkpointing: bool, session: Session) -> Iterator[model.Cost]:
    """The linear layers forward and backward, and attention; once more forward where it is computed again."""
    rotates = kind.endswith("OFT") or kind == "hqq_oft"
    contender = Contender(kind, [], rotates)
    forwards = 2 if checkpointing else 1
    # A product of two [S, S] halves per head: half of 4 S^2 H operations, and two and a half times that backward.
    attention = 2 * tokens**2 * shape.hidden
    for _ in range(shape.layers):
        for n, k in linear_shapes(shape):
            problem = Problem(n, k, MAIN, session.device)
            for _ in range(forwards):
                yield from contenders.forward_passes(contender, problem, tokens, True, session.limits)
            yield from contenders.backward_passes(contender, problem, tokens, session.limits)
        yield model.Cost(0, attention * (forwards + 2.5))


def _decoding(profile: Profile, adapters: int, session: Session) -> list[Job]:
    """One token per sequence, after `decoded` others; the cache is static, as a CUDA graph asks."""
    kinds = ("hqq_oft", "dense", "HQQ", "PEFT OFT") if adapters == 1 else ("hqq_oft",)
    jobs = []
    for kind, llama in _models(profile, kinds, session, adapters).items():
        llama.eval()
        options: dict[str, Any] = {}
        if adapters > 1:
            names = ["default", *(f"adapter{number}" for number in range(1, adapters))]
            options["adapter_names"] = [names[i % adapters] for i in range(profile.served)]
        call = decoder(llama, profile, options, session.device)
        passes = tuple(decode_passes(kind, profile, adapters))
        jobs.append(Job(kind, "decode", call, passes, 1, graph=kind != "PEFT OFT"))
    return jobs


def decoder(
    llama: nn.Module, profile: Profile, options: dict[str, Any], device: torch.device
) -> Callable[[int], object]:
    """A function that decodes the next token of every sequence."""
    base = llama.get_base_model() if hasattr(llama, "get_base_model") else llama
    shape = profile.decoder
    cache = StaticCache(config=base.config, max_cache_len=profile.decoded + 1)
    tokens = torch.randint(0, shape.vocabulary, (profile.served, profile.decoded), device=device)
    with torch.no_grad():
        llama(input_ids=tokens, past_key_values=cache, use_cache=True, **options)
    # Frozen for good: the model is measured in evaluation alone from here on, and dropped afterwards.
    for module in llama.modules():
        if isinstance(module, HqqOFTLinear):
            module.rotations_frozen = True
    last = tokens[:, -1:].contiguous()
    position = torch.full((profile.served, 1), profile.decoded, device=device)

    def call(number: int) -> object:
        # The same position in every call: attention reads all of the cache, and room for each call would cost the most.
        for layer in cache.layers:
            layer.cumulative_length.fill_(profile.decoded)
        with torch.no_grad():
            return llama(input_ids=last, past_key_values=cache, use_cache=True, position_ids=position, **options)

    return call


def decode_passes(kind: str, profile: Profile, adapters: int) -> Iterator[model.Cost]:
    """The packed weights, the rotations and the cache once; the norms' bytes are left out."""
    m, shape = profile.served, profile.decoder
    width = 2 * shape.hidden // shape.heads * shape.key_value_heads  # of a key and a value
    cached = m * (profile.decoded + 1) * width * DTYPES[MAIN.dtype].itemsize
    yield model.Cost(shape.layers * cached, 0)
    for n, k in linear_shapes(profile.decoder) * profile.decoder.layers:
        layer = MAIN.layer(n, k)
        if kind == "dense":
            yield model.gemm(layer, m)
        elif kind == "HQQ":
            yield from model.linear(replace(layer, block=None), m, scratch=False)
        else:
            for cost in model.linear(layer, m, scratch=False):
                yield cost + model.Cost((adapters - 1) * layer.rotation_bytes, 0)


# --- Fresh processes -------------------------------------------------------------------------------------------------


def _run(what: str, kind: str, profile: Profile, session: Session, **environment: str) -> list[float]:
    """What a function of this module finds in a process of its own."""
    command = [sys.executable, "-m", __name__, what, kind, str(session.device), json.dumps(asdict(profile.decoder))]
    command.append(str(min(profile.sequences)))
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)
    if out.returncode:
        raise RuntimeError(f"the {what} of {kind} in a fresh process failed:\n{out.stderr[-2000:]}")
    found: list[float] = json.loads(out.stdout.splitlines()[-1])
    return found


def _first(profile: Profile, session: Session) -> list[Job]:
    """Time of the first step beyond the second's, in a process of its own with an empty kernel cache."""
    if session.device.type == "meta":
        return []
    with tempfile.TemporaryDirectory() as folder:
        first, second = _run("first steps", "hqq_oft", profile, session, TRITON_CACHE_DIR=folder)
    columns = {"status": "measured", "p50_us": 1e6 * (first - second), "repeats": 1, "mode": "fresh process"}
    return [Job("hqq_oft", "first step beyond the second", None, columns=columns)]


def _first_steps(kind: str, device: torch.device, shape: Decoder, sequence: int) -> list[float]:
    step = TrainingStep(build(kind, shape, device), shape, sequence, False, device)
    layers = [module for module in step.llama.modules() if isinstance(module, HqqOFTLinear)]
    assert len(layers) == 7 * shape.layers
    if device.type == "cuda":  # the vendor's libraries start here, not in the first step
        a = torch.randn(256, 256, device=device, dtype=DTYPES[MAIN.dtype], requires_grad=True)
        (a @ a).sum().backward()
        torch.cuda.synchronize()
    return _times(step, 2, device)


def _times(step: TrainingStep, repeats: int, device: torch.device) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step(0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times


def _processes(profile: Profile, session: Session) -> list[Job]:
    """Median step and peak memory of a process that does nothing but train; on a CPU, where no allocator counts."""
    if session.device.type != "cpu" or not RESET_PEAK.exists():
        return []
    rounds = [
        {kind: _run("training", kind, profile, session) for kind in PROCESSES} for _ in range(1 if session.dry else 2)
    ]
    jobs = []
    for kind in PROCESSES:
        seconds = [seconds for found in rounds for seconds in found[kind][1:]]
        columns = {
            "status": "measured",
            "p50_us": 1e6 * statistics.median(seconds),
            "repeats": len(seconds),
            "mode": "eager",
            "peak_mib": max(found[kind][0] for found in rounds),
        }
        jobs.append(Job(kind, "training process", None, columns=columns))
    return jobs


def _trained(kind: str, device: torch.device, shape: Decoder, sequence: int) -> list[float]:
    """Peak of the memory in use while training, in MiB, and the seconds of each step after the first ones."""
    step = TrainingStep(build(kind, shape, device), shape, sequence, False, device)
    RESET_PEAK.write_text("5")  # of the process: what building the model took does not count
    times = _times(step, 20, device)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    return [peak / 1024, *times[3:]]


if __name__ == "__main__":
    what, kind, where, decoder_shape, length = sys.argv[1:]
    function = {"first steps": _first_steps, "training": _trained}[what]
    print(json.dumps(function(kind, torch.device(where), Decoder(**json.loads(decoder_shape)), int(length))))
