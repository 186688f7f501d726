"""`hqq-oft bench` times one OFT layer of this package, one of PEFT, and a dense layer without an adapter."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from hqq.core.quantize import HQQLinear
from peft.tuners.oft.layer import Linear as PeftLinear
from torch import Tensor, nn

from .quant.model import QuantizationSettings
from .tuner.layer import HqqOFTLinear


@dataclass(frozen=True)
class LayerCase:
    """The layer to time.

    Attributes:
        out_features, in_features: shape of the weight.
        tokens: rows of the input.
        block_size: OFT block size of the adapter.
        nbits, group_size: quantization of the weight.
        dtype: dtype of input and computation.
        device: device of the layers.
        seconds: total time for timing all contenders.
    """

    out_features: int = 2048
    in_features: int = 2048
    tokens: int = 512
    block_size: int = 32
    nbits: float = 4
    group_size: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seconds: float = 10.0


def _dense(case: LayerCase) -> nn.Linear:
    return nn.Linear(case.in_features, case.out_features, bias=False).to(case.device, case.dtype).requires_grad_(False)


def _adapted(case: LayerCase, dense: nn.Linear, layer_class: Callable[..., nn.Module]) -> nn.Module:
    """A layer of `layer_class` with random rotations on a quantized copy of `dense`."""
    copy = nn.Linear(case.in_features, case.out_features, bias=False, device="meta")
    copy.weight = nn.Parameter(dense.weight.detach().clone(), requires_grad=False)
    settings = QuantizationSettings(case.nbits, case.group_size)
    settings.check("the layer", dense)
    base = HQQLinear(copy, settings.for_hqq(), compute_dtype=case.dtype, device=case.device)
    config = peft.OFTConfig(r=0, oft_block_size=case.block_size, use_cayley_neumann=True)
    layer = layer_class(base, "default", r=0, config=config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.normal_(layer.get_parameter("oft_R.default.weight"), std=0.02)
    return layer.to(case.device)


def contenders(case: LayerCase) -> dict[str, nn.Module]:
    """The layers by name. PEFT's is included from version 0.21 on, the first that supports HQQ."""
    dense = _dense(case)
    found: dict[str, nn.Module] = {"hqq_oft": _adapted(case, dense, HqqOFTLinear)}
    if tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 21):
        found[f"peft {peft.__version__}"] = _adapted(case, dense, PeftLinear)
    found["dense, no adapter"] = dense
    return found


def _infer(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def _train(layer: nn.Module, x: Tensor) -> None:
    layer(x.detach().requires_grad_()).sum().backward()
    layer.zero_grad()


def run(case: LayerCase) -> dict[tuple[str, str], float]:
    """Median milliseconds by contender and call. Contenders are interleaved, so that slow periods affect all."""
    x = torch.randn(case.tokens, case.in_features).to(case.device, case.dtype)
    layers, medians = contenders(case), {}
    for what, call in (("inference", _infer), ("forward + backward", _train)):
        times: dict[str, list[float]] = {name: [] for name in layers}
        for layer in layers.values():
            call(layer.train(call is _train), x)
        end = time.perf_counter() + case.seconds / 2
        while time.perf_counter() < end or len(times["hqq_oft"]) < 3:
            for name, layer in layers.items():
                _wait(case.device)
                begin = time.perf_counter()
                call(layer, x)
                _wait(case.device)
                times[name].append(1e3 * (time.perf_counter() - begin))
        medians.update({(name, what): statistics.median(values) for name, values in times.items()})
    return medians


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def table(case: LayerCase, times: dict[tuple[str, str], float]) -> str:
    """The times as a text table, each with its ratio to hqq_oft."""
    names = list(dict.fromkeys(name for name, _ in times))
    whats = list(dict.fromkeys(what for _, what in times))
    lines = [
        f"one layer {case.out_features}x{case.in_features}, {case.tokens} tokens, {case.nbits} bits, group "
        f"{case.group_size}, block {case.block_size}, {case.dtype}, {case.device}",
        "median ms (relative to hqq_oft)",
        f"{'':20}" + "".join(f"{what:>24}" for what in whats),
    ]
    for name in names:
        cells = [f"{times[name, what]:10.3f} ({times[name, what] / times['hqq_oft', what]:.2f}x)" for what in whats]
        lines.append(f"{name:20}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)
