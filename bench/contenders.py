"""What a user would pick for a layer: this package, and the alternatives, by the names that tables use.

A contender is built from a problem and has one callable per set of buffers. Those that rotate compute `x R W^T`, the
others `x W^T`; each is checked against float64 before it is timed. Layers are in evaluation, so nothing is dropped out,
but where gradients are recorded the rotations are computed in every forward.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from hqq.core.quantize import HQQBackend, HQQLinear
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn

import hqq_oft
from hqq_oft import functional
from hqq_oft.ops import backends, reference
from hqq_oft.ops import table as ops
from hqq_oft.ops.packing import unpack

from . import model
from .model import Cost
from .problem import DTYPES, Problem, Setting, hqq_layer, skew_parameters
from .timing import Limits

OURS, DENSE, HQQ, PEFT = "hqq_oft", "dense", "HQQ", "PEFT OFT"
LORA_RANK = 16
LORA = f"PEFT LoRA r={LORA_RANK}"


class Unavailable(RuntimeError):  # noqa: N818
    """A contender cannot take part here; the message says why."""


@dataclass
class Contender:
    """One way to compute a layer, with one callable per set of buffers.

    `decodes_only`: it is for few tokens and has no backward. `compiled`: by `torch.compile`; no CUDA graph captures it,
    and its backward cannot be repeated.
    """

    layers: list[Callable[[Tensor], Tensor]]
    rotates: bool
    parameters: list[Tensor] = field(default_factory=list)
    decodes_only: bool = False
    compiled: bool = False
    name: str = ""

    def wanted(self, number: int, leaf: Tensor) -> list[Tensor]:
        """What one set's backward computes gradients of: its input and its own parameters, or those all sets share."""
        own = len(self.parameters) // len(self.layers) or 1
        return [leaf, *(self.parameters[number * own : (number + 1) * own] or self.parameters[:own])]


Build = Callable[[Problem], Contender]


def adapted(
    module: nn.Module, name: str, setting: Setting, device: torch.device, targets: list[str], adapters: int = 1
) -> nn.Module:
    """A quantized model with the adapters of a contender, whose rotations are random and the same for all."""
    if name == HQQ:
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


def _adapters(name: str, problem: Problem, backend: HQQBackend = HQQBackend.PYTORCH) -> Contender:
    """PEFT's layers around HQQ layers with the problem's contents, on one of HQQ's backends."""
    layers, parameters = [], []
    for weight in problem.weights:
        base = hqq_layer(weight, problem.dtype)
        if backend is not HQQBackend.PYTORCH:
            base.forward = types.MethodType(getattr(HQQLinear, backend.value), base)
        model = adapted(nn.ModuleDict({"layer": base}), name, problem.setting, problem.device, ["layer"])
        layers.append(model.base_model.model["layer"].eval())
        parameters += [parameter for parameter in layers[-1].parameters() if parameter.requires_grad]
    for parameter in parameters if name != LORA else ():
        parameter.data = problem.v
    return Contender(layers, name != LORA, parameters)


def ours(problem: Problem) -> Contender:
    """This package's layer, as PEFT makes it after `patch_peft()`; inference as served, with rotations frozen."""
    contender = _adapters(OURS, problem)
    for layer in contender.layers:
        layer.rotations_frozen = True  # else every replay of a captured graph would compute the rotations again
    return contender


def _operator(problem: Problem, call: Callable[[Any, Tensor], Tensor], rotates: bool) -> Contender:
    return Contender([functools.partial(call, weight) for weight in problem.weights], rotates, decodes_only=True)


def native_decode(problem: Problem) -> Contender:
    """This package's fused product by the native backend, where the automatic choice takes another."""
    reason = backends.registry()["native"].why_not("linear")
    if problem.device.type != "cuda" or reason is not None:
        raise Unavailable(reason or "on a CPU it is what hqq_oft is")
    native = hqq_oft.backend("native")(ops.linear)
    return _operator(problem, lambda weight, x: native(x, weight, problem.d, None, None), True)


def unrotated(problem: Problem) -> Contender:
    """This package's product without a rotation: the difference is what the rotation costs."""
    return _operator(problem, lambda weight, x: functional.linear(x, weight), False)


def dense(problem: Problem) -> Contender:
    """A frozen dense `nn.Linear`: the limit in training."""
    layers = []
    for number in range(problem.copies):
        layer = nn.Linear(problem.k, problem.n, bias=False, device="meta")
        layer.weight = nn.Parameter(problem.dense.clone() if number else problem.dense, requires_grad=False)
        layers.append(layer)
    return Contender(layers, False)


def hqq(problem: Problem) -> Contender:
    """HQQ's own layer without an adapter: dequantize, then the vendor's product."""
    return Contender([hqq_layer(weight, problem.dtype) for weight in problem.weights], False)


def peft_oft(problem: Problem) -> Contender:
    """PEFT's OFT on HQQ."""
    return _adapters(PEFT, problem)


def peft_oft_aten(problem: Problem) -> Contender:
    """PEFT's OFT on HQQ's ATEN backend."""
    if importlib.util.find_spec("hqq_aten") is None or problem.setting.axis != 0:
        raise Unavailable("HQQ's ATEN backend needs hqq_aten, and axis 0")
    return _adapters(PEFT, problem, HQQBackend.ATEN)


def _compiled(problem: Problem, contender: Contender) -> Contender:
    if problem.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Unavailable("torch.compile finds no C++ compiler")
    return replace(contender, compiled=True)


def peft_oft_compiled(problem: Problem) -> Contender:
    """PEFT's OFT on HQQ's PYTORCH_COMPILE backend."""
    return _compiled(problem, _adapters(PEFT, problem, HQQBackend.PYTORCH_COMPILE))


def peft_lora(problem: Problem) -> Contender:
    """PEFT's LoRA on HQQ: what people pick today."""
    return _adapters(LORA, problem)


class _Plain(nn.Module):
    """OFT in plain PyTorch, written well: a float32 series of a cached layout, `bmm` over blocks, HQQ's product.

    Without gradients the rotation is computed once.
    """

    def __init__(self, problem: Problem, base: HQQLinear) -> None:
        super().__init__()
        self.base, self.b, self.terms = base, problem.setting.block, problem.setting.terms
        self.v, self.kept = nn.Parameter(problem.v.clone()), None
        rows, columns = torch.triu_indices(self.b, self.b, 1, device=problem.device)
        self.register_buffer("place", rows * self.b + columns)

    def rotation(self) -> Tensor:
        upper = self.v.new_zeros(self.v.shape[0], self.b**2).index_copy(1, self.place, self.v)
        q = upper.view(-1, self.b, self.b)
        q = q - q.transpose(1, 2)
        if self.terms is None:
            return torch.linalg.solve(torch.eye(self.b, device=q.device) + q, -2 * q, left=False)
        first, *others = reference.series_coefficients(self.terms)
        power, d = q, first * q
        for coefficient in others:
            power = torch.bmm(power, q)
            d = d + coefficient * power
        return d

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or self.kept is None:
            d = self.rotation().to(x.dtype)
            self.kept = None if torch.is_grad_enabled() else d
        else:
            d = self.kept
        return self.base(rotate_blocks(x, d))


def rotate_blocks(x: Tensor, d: Tensor) -> Tensor:
    """`x + x D` by PyTorch's batched product."""
    blocks = x.view(x.shape[0], -1, d.shape[-1]).transpose(0, 1)
    return torch.baddbmm(blocks, blocks, d.expand(len(blocks), -1, -1)).transpose(0, 1).reshape(x.shape)


def plain(problem: Problem) -> Contender:
    """The same OFT in plain PyTorch."""
    layers = [_Plain(problem, hqq_layer(weight, problem.dtype)) for weight in problem.weights]
    return Contender(layers, True, [layer.v for layer in layers])


def plain_compiled(problem: Problem) -> Contender:
    """The same OFT in plain PyTorch under `torch.compile`."""
    contender = _compiled(problem, plain(problem))
    return replace(contender, layers=[torch.compile(layer, dynamic=False) for layer in contender.layers])


class _Scratch(torch.autograd.Function):
    """Rotate x, dequantize into a scratch, the vendor's product; dequantize again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, block: int, terms: int | None, weight: Any) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.spec = (block, terms, weight)
        d = ops.cayley(v, block, terms, None, None, x.dtype)
        return F.linear(ops.rotate(x, d, None, False), ops.dequantize(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, v = ctx.saved_tensors
        block, terms, weight = ctx.spec
        d = ops.cayley(v, block, terms, None, None, grad.dtype)
        dx, dd = ops.rotate_backward(grad @ ops.dequantize(weight, grad.dtype), x, d, None, False, True, True)
        return dx, ops.cayley_backward(dd, v, block, terms, None, None), None, None, None


def scratch(problem: Problem) -> Contender:
    """Unsloth's way with our kernels: a scratch for the weight, the rotation in a pass of its own over x."""
    setting, v = problem.setting, nn.Parameter(problem.v.clone())
    contender = _operator(problem, lambda w, x: _Scratch.apply(x, v, setting.block, setting.terms, w), True)
    return replace(contender, parameters=[v], decodes_only=False)


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


CONTENDERS: dict[str, Build] = {
    OURS: ours,
    DENSE: dense,
    HQQ: hqq,
    PEFT: peft_oft,
    LORA: peft_lora,
    "plain PyTorch": plain,
    "scratch + rotation of x": scratch,
    "PEFT OFT, HQQ ATEN": peft_oft_aten,
    "hqq_oft, no rotation": unrotated,
    "hqq_oft, native": native_decode,
    "PyTorch int4": int4,
    "GemLite": gemlite,
    "plain PyTorch, compiled": plain_compiled,
    "PEFT OFT, HQQ compiled": peft_oft_compiled,
}


def build(name: str, problem: Problem) -> Contender:
    """The contender of that name.

    Raises:
        Unavailable: it cannot take part.
    """
    return replace(CONTENDERS[name](problem), name=name)


def failure(error: Exception) -> str:
    """The status of a row that has no time: why."""
    first = (str(error).splitlines() or [""])[0]
    return f"not run: {error}" if isinstance(error, Unavailable) else f"failed: {type(error).__name__}: {first}"


# --- What a contender has to do at least; what it does beyond that is its own ----------------------------------------


def forward_passes(name: str, layer: model.Layer, m: int, limits: Limits, training: bool = False) -> tuple[Cost, ...]:
    """Of a forward; `layer` has a block if the contender rotates, and in training D is computed as well."""
    if name == DENSE:
        return (model.gemm(layer, m),)
    made = (model.cayley(layer, layer.terms),) if training and layer.block is not None else ()
    return (*made, *_cheapest(model.linear, layer, m, limits), *(_lora(layer, m) if name == LORA else ()))


def backward_passes(name: str, layer: model.Layer, m: int, limits: Limits) -> tuple[Cost, ...]:
    """Of a backward: nothing dense was kept, so the weight is decoded again, and D computed again."""
    if name == DENSE:
        return (model.gemm(layer, m),)
    passes = _cheapest(model.linear_backward, layer, m, limits)
    if layer.block is not None:
        return (model.cayley(layer, layer.terms), *passes, model.cayley_backward(layer, layer.terms))
    return (*passes, *(2 * _lora(layer, m) if name == LORA else ()))


def _cheapest(way: Callable[..., tuple[Cost, ...]], layer: model.Layer, m: int, limits: Limits) -> tuple[Cost, ...]:
    ways = [way(layer, m, scratch=scratch) for scratch in (False, True)]
    return min(ways, key=lambda passes: model.predicted_seconds(passes, limits.bandwidth, limits.rate))


def _lora(layer: model.Layer, m: int) -> tuple[Cost, Cost]:
    """Two products of rank r."""
    (n, k), r, e = (layer.N, layer.K), LORA_RANK, layer.element
    return (
        Cost((m * k + r * k + m * r) * e, 2 * m * k * r),
        Cost((2 * m * n + r * n + m * r) * e, 2 * m * n * r),
    )
