"""What a user would pick for a layer: this package, and the alternatives, by the names that tables use.

Those that rotate compute `x R W^T`, the others `x W^T`. Layers are in evaluation, so nothing is dropped out, but where
gradients are recorded the rotations are computed in every forward.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn

import hqq_oft
from hqq_oft import functional
from hqq_oft.check.cases import DTYPES, skew_parameters
from hqq_oft.ops.packing import unpack

from . import model
from .model import Cost
from .problem import Problem, Setting, hqq_layer
from .timing import Limits

OURS, DENSE, HQQ, PEFT = "hqq_oft", "dense", "HQQ", "PEFT OFT"
LORA_RANK = 16
LORA = f"PEFT LoRA r={LORA_RANK}"


class Unavailable(RuntimeError):  # noqa: N818
    """A contender cannot take part here; the message says why."""


@dataclass
class Contender:
    """One way to compute a layer, with one callable per set of buffers."""

    layers: list[Callable[[Tensor], Tensor]]
    rotates: bool
    parameters: list[Tensor] = field(default_factory=list)
    decodes_only: bool = False  # for few tokens, without a backward
    dense: bool = False  # whether the weight is
    name: str = ""

    def wanted(self, number: int, leaf: Tensor) -> list[Tensor]:
        """What one set's backward computes gradients of: its input and its own parameters, or those all sets share."""
        own = len(self.parameters) // len(self.layers) or 1
        return [leaf, *(self.parameters[number * own : (number + 1) * own] or self.parameters[:own])]


def adapted(
    module: nn.Module, name: str, setting: Setting, device: torch.device, targets: list[str], adapters: int = 1
) -> nn.Module:
    """A quantized model with the adapters of a contender, whose rotations are random and the same for all."""
    if name in (HQQ, DENSE):
        return module
    neumann = {"use_cayley_neumann": not setting.exact, "block_share": setting.share}
    config: Any = OFTConfig(r=0, oft_block_size=setting.block, target_modules=targets, **neumann)
    if name == LORA:
        config = LoraConfig(r=LORA_RANK, target_modules=targets)
    with hqq_oft.patch_peft() if name == OURS else contextlib.nullcontext():
        model = get_peft_model(module, config)
        for number in range(1, adapters):
            model.add_adapter(f"adapter{number}", config)
    torch.manual_seed(0)
    for key, parameter in model.to(device).named_parameters():
        if "lora_" in key:  # in the model's dtype, as half-precision training sets it
            parameter.data = parameter.data.to(DTYPES[setting.dtype])
        elif "oft_R" in key:
            parameter.data.copy_(skew_parameters(parameter.shape[0], setting.block, device))
    return model


def _adapters(name: str, problem: Problem, bases: list[Any] | None = None) -> Contender:
    """PEFT's layers around HQQ layers with the problem's contents, or around others."""
    layers, parameters = [], []
    for base in bases or [hqq_layer(weight, problem.dtype) for weight in problem.weights]:
        model = adapted(nn.ModuleDict({"layer": base}), name, problem.setting, problem.device, ["layer"])
        layers.append(model.base_model.model["layer"].eval())
        parameters += [parameter for parameter in layers[-1].parameters() if parameter.requires_grad]
    for parameter in parameters if name != LORA else ():
        parameter.data = problem.v
    if name == OURS:  # as served; else every replay of a captured graph would compute the rotations again
        for layer in layers:
            layer.rotations_frozen = True
    return Contender(layers, name != LORA, parameters, dense=bases is not None)


def _operator(problem: Problem, call: Callable[[Any, Tensor], Tensor], rotates: bool) -> Contender:
    return Contender([functools.partial(call, weight) for weight in problem.weights], rotates, decodes_only=True)


def dense(problem: Problem) -> Contender:
    """A frozen dense `nn.Linear`: the limit in training."""
    layers = [nn.Linear(problem.k, problem.n, bias=False, device="meta") for _ in problem.weights]
    for number, layer in enumerate(layers):
        layer.weight = nn.Parameter(problem.dense.clone() if number else problem.dense, requires_grad=False)
    return Contender(layers, False, dense=True)


def on_dense(name: str, problem: Problem) -> Contender:
    """The contender of that name around dense layers, or these alone."""
    contender = dense(problem)
    return replace(contender if name == DENSE else _adapters(name, problem, contender.layers), name=name)


def gemlite(problem: Problem) -> Contender:
    """GemLite's forward, without a rotation."""
    if problem.device.type != "cuda" or importlib.util.find_spec("gemlite") is None:
        raise Unavailable("GemLite needs a GPU, and its package")
    from gemlite.helper import A16Wn

    helper = A16Wn(device=str(problem.device))
    layers = [helper.from_hqqlinear(hqq_layer(w, problem.dtype), del_orig=False) for w in problem.weights]
    return Contender(layers, False, decodes_only=True)


def int4(problem: Problem) -> Contender:
    """PyTorch's own int4 kernel for CPUs, without a rotation."""
    setting = problem.setting
    if problem.device.type != "cpu" or (setting.bits, setting.axis, setting.dtype) != (4, 1, "bf16"):
        raise Unavailable("PyTorch's int4 kernel is timed on a CPU, for 4 bits on axis 1 in bf16")
    (weight,), shape = problem.weights, (problem.n, problem.k // setting.group, 2)
    levels = unpack(weight.packed, 4, weight.groups).view(weight.shape).int().contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    zero = (8 - weight.zero.float()) * weight.scale.float()  # its form is (level - 8) scale + zero
    pairs = torch.stack([weight.scale, zero.bfloat16()], dim=-1).view(shape).transpose(0, 1).contiguous()
    product = torch.ops.aten._weight_int4pack_mm_for_cpu
    return _operator(problem, lambda _, x: product(x, packed, setting.group, pairs), False)


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    **{name: functools.partial(_adapters, name) for name in (OURS, PEFT, LORA)},
    DENSE: dense,
    HQQ: lambda problem: Contender([hqq_layer(weight, problem.dtype) for weight in problem.weights], False),
    "hqq_oft, no rotation": lambda problem: _operator(problem, lambda weight, x: functional.linear(x, weight), False),
    "PyTorch int4": int4,
    "GemLite": gemlite,
}


def build(name: str, problem: Problem) -> Contender:
    """The contender of that name, or `Unavailable`."""
    return replace(CONTENDERS[name](problem), name=name)


def failure(error: Exception) -> str:
    """The status of a row that has no time: why."""
    first = f"{error}".partition("\n")[0]
    return f"not run: {error}" if isinstance(error, Unavailable) else f"failed: {type(error).__name__}: {first}"


# What a contender has to do at least; what it does beyond that, such as the two thin products of LoRA, is its own.


def forward_passes(
    contender: Contender, layer: model.Layer, m: int, limits: Limits, training: bool = False
) -> tuple[Cost, ...]:
    """Of a forward; `layer` has a block if the contender rotates, and in training D is computed as well."""
    made = (model.cayley(layer, layer.terms),) if training and layer.block is not None else ()
    if contender.dense:
        return (*made, *((model.rotate(layer, m),) if layer.block is not None else ()), model.gemm(layer, m))
    return (*made, *_cheapest(model.linear, layer, m, limits))


def backward_passes(contender: Contender, layer: model.Layer, m: int, limits: Limits) -> tuple[Cost, ...]:
    """Of a backward: nothing dense was kept, so a packed weight is decoded again, and D computed again."""
    passes = (model.gemm(layer, m),) if contender.dense else _cheapest(model.linear_backward, layer, m, limits)
    if layer.block is None:
        return passes
    turned = (model.rotate_backward(layer, m),) if contender.dense else ()
    return (model.cayley(layer, layer.terms), *passes, *turned, model.cayley_backward(layer, layer.terms))


def _cheapest(way: Callable[..., tuple[Cost, ...]], layer: model.Layer, m: int, limits: Limits) -> tuple[Cost, ...]:
    ways = [way(layer, m, scratch=scratch) for scratch in (False, True)]
    return min(ways, key=lambda passes: model.predicted_seconds(passes, limits.bandwidth, limits.rate))
