"""What several files build and compare: layers, adapted models, their logits, tolerances."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import OFTConfig, get_peft_model
from torch import Tensor, nn

from hqq_oft import HqqOFTLinear
from hqq_oft.ops import backends

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float64: 1e-12}

# Inductor needs a C++ compiler on the CPU; without one, fall back to a backend that only traces.
COMPILE_BACKEND = "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"


def layers(model: nn.Module) -> list[HqqOFTLinear]:
    """The HqqOFTLinear layers, in order."""
    return [module for module in model.modules() if isinstance(module, HqqOFTLinear)]


def adapted(base: nn.Module | None = None, *, std: float = 0.05, **settings) -> Any:
    """A model with random rotations in one adapter, by default a small Llama over HQQ layers; PEFT must be patched."""
    from small_llama import quantized_llama

    settings = {"r": 0, "oft_block_size": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    model = get_peft_model(quantized_llama() if base is None else base, OFTConfig(**settings))
    randomize(model, std)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor, **kwargs) -> Tensor:
    return model(input_ids=tokens, **kwargs).logits


def randomize(model: nn.Module, std: float = 0.05, adapter: str = "default") -> None:
    """Random rotations in every layer that has the adapter."""
    for layer in layers(model):
        if adapter in layer.oft_R:
            nn.init.normal_(layer.oft_R[adapter].weight, std=std)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """|out - ref| / |ref|; NaN if anything in `out` is, so that no comparison with it holds."""
    out, reference = out.detach().double(), reference.detach().double()
    norm = reference.norm()
    return float((out - reference).norm() / (norm if norm > 0 else 1))


def hqq_layer(
    out_features: int = 64,
    in_features: int = 96,
    *,
    nbits: float = 4,
    group_size: int | None = 32,
    axis: int = 1,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    view_as_float: bool = False,
    optimize: bool = True,
) -> HQQLinear:
    config = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis, view_as_float=view_as_float)
    config["weight_quant_params"]["optimize"] = optimize
    return HQQLinear(nn.Linear(in_features, out_features, bias=bias), config, compute_dtype=dtype, device="cpu")


def oft_layer(base: HQQLinear | None = None, adapter: str = "default", std: float = 0.05, **settings) -> HqqOFTLinear:
    """A layer with one adapter of random rotations."""
    settings = {"r": 0, "oft_block_size": 8, **settings} if "r" not in settings else settings
    layer = HqqOFTLinear(hqq_layer() if base is None else base, adapter, **settings)
    nn.init.normal_(layer.oft_R[adapter].weight, std=std)
    return layer


def add_adapter(layer: HqqOFTLinear, adapter: str, std: float = 0.05, **settings) -> None:
    settings = {"r": 0, "oft_block_size": 8, **settings} if "r" not in settings else settings
    layer.update_layer(adapter, **settings)
    nn.init.normal_(layer.oft_R[adapter].weight, std=std)


def two_adapters(
    base: HQQLinear | None = None, *, std: float = 0.15, second: dict[str, Any] | None = None, **settings
) -> HqqOFTLinear:
    """A layer in evaluation mode with the active adapters "a" and "b", by default of rotations that do not commute."""
    layer = oft_layer(base, "a", std=std, **{"oft_block_size": 8, **settings}).eval()
    add_adapter(layer, "b", std=std, **({"oft_block_size": 3} if second is None else second))
    layer.set_adapter(["a", "b"])
    return layer


def rotation(layer: HqqOFTLinear, adapter: str) -> Tensor:
    """The dense rotation of an adapter, `[K, K]` in float64, by the oracle."""
    module = layer.oft_R[adapter]
    v = module.weight.detach()
    terms = module.num_cayley_neumann_terms if module.use_cayley_neumann else None
    max_norm = module.eps / v.shape[0] ** 0.5 if module.coft else None
    return oracle.rotation(v, module.block_size, layer.in_features, terms, max_norm)


def truth(layer: HqqOFTLinear, x: Tensor, *adapters: str) -> Tensor:
    """The layer's output in float64, by the oracle."""
    x = x.double()
    for name in adapters:
        x = x @ rotation(layer, name)
    base = layer.get_base_layer()
    y = x @ oracle.of_layer(base).T
    return y if base.bias is None else y + base.bias.double()


def rotated_truth(layer: HqqOFTLinear, *adapters: str) -> Tensor:
    """`W * (R_1 ... R_n)^T` in float64, of the layer's current weight."""
    weight = oracle.of_layer(layer.get_base_layer())
    for name in reversed(adapters):
        weight = weight @ rotation(layer, name).T
    return weight


def packed_bytes(base: HQQLinear) -> dict[str, Tensor]:
    """Every stored tensor of an HQQ layer, copied."""
    state = {"W_q": base.W_q.detach().clone()}
    state.update({key: value.clone() for key, value in base.meta.items() if isinstance(value, Tensor)})
    return state


def same_bytes(base: HQQLinear, state: dict[str, Tensor]) -> bool:
    now = packed_bytes(base)
    return now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach, views counted as if they were their own."""
    for _ in range(3):  # collecting one graph of autograd can release others
        gc.collect()
    plain = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return sum(t.numel() * t.element_size() for t in plain if t.layout == torch.strided)


@contextmanager
def around_operations(around: Callable[[str, Callable[..., Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    """Inside the block every operation that runs, on any backend, is called as `around(name, function, args)`."""

    def watched(operation: str, planner: backends.Planner) -> backends.Planner:
        def plan(by_name: bool, *args: Any) -> Callable[..., Any]:
            function = planner(by_name, *args)
            return lambda *args: around(operation, function, args)

        return plan

    registry = backends.registry()
    before = dict(registry)
    for name, backend in before.items():
        planners = {operation: watched(operation, planner) for operation, planner in backend.operations.items()}
        registry[name] = backends.Backend(name, planners, backend.reason)
    backends.forget_plans()
    try:
        yield
    finally:
        registry.update(before)
        backends.forget_plans()
