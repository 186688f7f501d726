"""What is measured, on which sizes and against what: one table of sweeps for each kind of device.

Every combination of a sweep's values is a case; the first parameter is the outermost loop, lower priorities run first.
"""

from __future__ import annotations

import itertools
from typing import Any

from transformers import LlamaConfig

from . import llama, quantizing  # noqa: F401 (register the kinds of whole models and of quantizing)
from .cases import KINDS, MAIN, Case, Shape
from .contenders import DENSE, HQQ, LORA, OURS, PEFT
from .problem import Setting

Sweep = tuple[str, int, dict[str, tuple[Any, ...]]]  # kind, priority, values of each parameter

ALL = ((OURS, DENSE, HQQ, PEFT, LORA, "hqq_oft, no rotation", "PyTorch int4"),)
FEW = ((OURS, DENSE, HQQ),)
BITS = tuple(Setting(bits=bits) for bits in (2, 3, 8))
BLOCKS = tuple(Setting(block=block) for block in (16, 64, 128, 256))
OTHERS = (Setting(axis=0), Setting(group=128), Setting(share=True), Setting(exact=True), Setting(dtype="fp16"))
QUANTIZED = (*(Setting(bits=bits) for bits in (8, 3, 2, 1)), Setting(axis=0), Setting(group=128))
CPU_SETTINGS = (*BITS, Setting(axis=0), Setting(dtype="fp32"))
SQUARE, UP, DOWN, NARROW = Shape(4096, 4096), Shape(14336, 4096), Shape(4096, 14336), Shape(1024, 4096)  # of 8B
UP_70B, DOWN_70B = Shape(28672, 8192), Shape(8192, 28672)
SHAPES = (SQUARE, UP, UP_70B, DOWN, NARROW, DOWN_70B)
POWERS = tuple(2**power for power in range(15))
FOUR_LAYERS = {"num_hidden_layers": 4, "vocab_size": 1024, "max_position_embeddings": 1 << 16}
LLAMA_8B = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_key_value_heads=8, **FOUR_LAYERS)
SMALL_LLAMA = LlamaConfig(hidden_size=1024, intermediate_size=2816, num_attention_heads=8, **FOUR_LAYERS)
LLAMA_1B = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4)
LM, UNIT = {"source": ("bf16",), "deviation": (0.02,)}, {"source": ("bf16",), "deviation": (1.0,)}  # of the weights
HOST = {1: "forward in evaluation", 16: "forward and backward in training"}
CHECKPOINTED = (", gradient checkpointing", "")


TABLE: dict[str, tuple[Sweep, ...]] = {
    "cuda": (
        ("layer", 0, {"shape": SHAPES[:3], "m": (1, 16, 512, 4096), "setting": (MAIN,), "against": ALL}),
        ("layer", 10, {"shape": SHAPES, "m": POWERS, "setting": (MAIN,), "against": ALL}),
        ("layer_against_gemlite", 20, {"shape": (UP, UP_70B), "m": (1, 16, 4), "setting": (MAIN,)}),
        ("layer", 30, {"setting": (*BITS, *BLOCKS, *OTHERS), "shape": (UP,), "m": (1, 16, 4096), "against": FEW}),
        ("layer", 38, {"setting": (Setting(block=96),), "shape": (Shape(14336, 4032),), "m": (1, 16, 4096),
                       "against": FEW}),
        ("layer_on_dense", 9, {"shape": (SQUARE, UP), "m": (1, 512, 4096), "setting": (MAIN,)}),
        ("cayley_many", 0, {"adapters": ((224, (*[4096] * 6, 14336) * 32),)}),
        ("dequantize", 1, {"shape": SHAPES, "setting": (MAIN,)}),
        ("rotate", 2, {"k": (4096, 8192, 14336, 28672), "m": (16384,)}),
        ("cayley", 2, {"k": (4096, 8192, 14336, 28672), "setting": (MAIN,)}),
        ("dequantize", 20, {"setting": (*BITS, *BLOCKS, *OTHERS), "shape": (SQUARE,)}),
        ("cayley", 21, {"setting": (*BLOCKS, *OTHERS[2:4]), "k": (4096,)}),
        ("merge", 0, {"shape": SHAPES, "setting": (MAIN,)}),
        ("quantize", 5, {"shape": (SQUARE, UP), "setting": (MAIN, *QUANTIZED), **LM}),
        ("whole_job", 20, {"what": ("Llama 1.1B, random weights",), "config": (LLAMA_1B,)}),
        ("training", 0, {"m": (2048, 8192), "config": (LLAMA_8B,), "checkpointing": CHECKPOINTED}),
        ("decoding", 5, {"config": (LLAMA_8B,), "m": (8,), "adapters": (1, 8), "decoded": (255,)}),
        ("first_step", 6, {"config": (LLAMA_8B,), "m": (2048,)}),
        ("training_process", 6, {"config": (LLAMA_8B,), "m": (2048,)}),
    ),
    "cpu": (
        ("layer", 0, {"shape": (SQUARE, UP), "m": (1, 16, 512), "setting": (MAIN,), "against": ALL}),
        ("layer", 30, {"setting": CPU_SETTINGS, "shape": (UP,), "m": (1,), "against": FEW}),
        ("layer_on_dense", 9, {"shape": (SQUARE, UP), "m": (1, 512), "setting": (MAIN,)}),
        ("cayley_many", 0, {"adapters": ((28, (*[1024] * 6, 2816) * 4),)}),
        ("dequantize", 1, {"shape": (SQUARE, UP), "setting": (MAIN,)}),
        ("rotate", 2, {"k": (4096,), "m": (512,)}),
        ("cayley", 2, {"k": (4096,), "setting": (MAIN,)}),
        ("dequantize", 20, {"setting": CPU_SETTINGS, "shape": (SQUARE,)}),
        ("merge", 0, {"shape": (SQUARE, UP), "setting": (MAIN,)}),
        ("quantize", 1, {"shape": (SQUARE, UP), "setting": (MAIN,), **LM}),
        ("quantize", 2, {"shape": (SQUARE,), "setting": (MAIN,), "source": ("fp32",), "deviation": (0.02,)}),
        ("quantize", 3, {"shape": (SQUARE,), "setting": QUANTIZED, **LM}),
        ("quantize", 4, {"shape": (SQUARE,), "setting": (MAIN,), **UNIT}),
        ("whole_job", 20, {"what": ("Llama 1.1B, random weights",), "config": (LLAMA_1B,)}),
        ("whole_job", 21, {"what": ("SmolLM2-135M-Instruct",), "config": (None,)}),
        ("training", 0, {"m": (256,), "config": (SMALL_LLAMA,), "checkpointing": CHECKPOINTED}),
        ("decoding", 5, {"config": (SMALL_LLAMA,), "m": (4,), "adapters": (1, 4), "decoded": (32,)}),
        ("first_step", 6, {"config": (SMALL_LLAMA,), "m": (256,)}),
        ("training_process", 6, {"config": (SMALL_LLAMA,), "m": (256,)}),
        ("smollm2", 20, {"layers": (30,), "m": (32,), "what": ("decoding",)}),
        ("smollm2", 21, {"layers": (30,), "m": (512,), "what": ("training",)}),
        *(("host_stub", 0, {"m": (m,), "what": (what,)}) for m, what in HOST.items()),
        *(("host_native", 1, {"m": (m,), "what": (what,)}) for m, what in HOST.items()),
    ),
}  # fmt: skip
SUITES = ("ops", "layer", "model", "merge", "host")


def cases(suite: str, device: str) -> list[Case]:
    """A suite's cases on a kind of device, by priority; of those of one name, the first."""
    found: dict[str, Case] = {}
    for name, priority, axes in TABLE[device]:
        if KINDS[name].suite != suite:
            continue
        first, *_ = axes.values()
        for values in itertools.product(*axes.values()):
            parameters = dict(zip(axes, values, strict=True))
            rank = priority + first.index(values[0]) if len(first) < 10 else priority
            case = Case(KINDS[name], rank, parameters)
            found.setdefault(case.name, case)
    return sorted(found.values(), key=lambda case: case.priority)
