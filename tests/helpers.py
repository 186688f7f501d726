from __future__ import annotations

import os
import shutil

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import Tensor, nn

from hqq_oft import HqqOFTLinear

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float64: 1e-12}

# Inductor needs a C++ compiler on the CPU; without one, fall back to a backend that only traces.
COMPILE_BACKEND = "inductor" if shutil.which(os.environ.get("CXX", "g++")) else "aot_eager"


def layers(model: nn.Module) -> list[HqqOFTLinear]:
    """The HqqOFTLinear layers, in order."""
    return [module for module in model.modules() if isinstance(module, HqqOFTLinear)]


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


def packed_bytes(base: HQQLinear) -> dict[str, Tensor]:
    """Every stored tensor of an HQQ layer, copied."""
    state = {"W_q": base.W_q.detach().clone()}
    state.update({key: value.clone() for key, value in base.meta.items() if isinstance(value, Tensor)})
    return state


def same_bytes(base: HQQLinear, state: dict[str, Tensor]) -> bool:
    now = packed_bytes(base)
    return now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)
