"""What a user would pick for a layer: ours, and what there is instead.

A contender is built from a problem and holds one callable per set of buffers. Those that rotate compute `x R W^T`, the
others `x W^T`; each is checked against float64 before it is timed. Layers are in evaluation: nothing here drops
anything out in training, and where gradients are recorded, rotations are made anew all the same.
"""

from __future__ import annotations

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
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops

from . import model
from .limits import Limits
from .model import Cost
from .problem import Problem, hqq_layer
from .session import LORA, LORA_RANK, Unavailable


@dataclass
class Contender:
    """One way to compute a layer.

    Attributes:
        name: what tables call it.
        layers: one callable per set of buffers.
        rotates: whether it computes the rotation, too.
        parameters: trained; they get a gradient.
        held: all tensors that stay whether or not there is a backward.
        decodes_only: whether it is for few tokens alone, and has no backward.
        compiled: whether `torch.compile` made it: no CUDA graph captures it, and its backward can't be repeated.
    """

    name: str
    layers: list[Callable[[Tensor], Tensor]]
    rotates: bool
    parameters: list[Tensor] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    decodes_only: bool = False
    compiled: bool = False


class _Holder(nn.Module):
    """The smallest model that PEFT accepts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _held(layers: list[Any]) -> list[Tensor]:
    tensors = []
    for layer in layers:
        for module in layer.modules():
            tensors += [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if isinstance(module, HQQLinear):
                tensors += [value for value in module.meta.values() if isinstance(value, Tensor)]
    return tensors


def _adapted(problem: Problem, config: Any, backend: HQQBackend | None = None) -> list[nn.Module]:
    """PEFT's layers round HQQ layers, in the problem's contents."""
    layers = []
    for weight in problem.weights:
        base = hqq_layer(weight, problem.dtype)
        if backend is not None:
            base.forward = types.MethodType(getattr(HQQLinear, backend.value), base)
        layers.append(get_peft_model(_Holder(base), config).base_model.model.layer.to(problem.device).eval())
    return layers


def _oft_config(problem: Problem) -> OFTConfig:
    setting = problem.setting
    return OFTConfig(
        r=0,
        oft_block_size=setting.block,
        target_modules=["layer"],
        use_cayley_neumann=not setting.exact,
        block_share=setting.share,
    )


def _oft(name: str, problem: Problem, layers: list[nn.Module], **options: Any) -> Contender:
    parameters = [layer.oft_R["default"].weight for layer in layers]
    for parameter in parameters:
        parameter.data = problem.v
    return Contender(name, layers, True, parameters, _held(layers), **options)


def _check_compiles(problem: Problem) -> None:
    if problem.device.type == "meta":
        raise Unavailable("there is nothing to compile for tensors without memory")
    if problem.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise Unavailable("torch.compile finds no C++ compiler")


def ours(problem: Problem) -> Contender:
    """This package's layer, as PEFT makes it after `patch_peft()`."""
    with hqq_oft.patch_peft():
        layers = _adapted(problem, _oft_config(problem))
    return _oft("hqq_oft", problem, layers)


def native_decode(problem: Problem) -> Contender:
    """This package's fused product by the native backend, where the automatic choice takes another."""
    if problem.device.type != "cuda":
        raise Unavailable("elsewhere than on a GPU it is what hqq_oft is")
    reason = hqq_oft.ops.backends.registry()["native"].why_not("linear")
    if reason is not None:
        raise Unavailable(reason)

    def layer(weight: Any) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            with hqq_oft.backend("native"):
                return ops.linear(x, problem.d, *weight.arguments(), None, None)

        return forward

    return Contender("hqq_oft, native", [layer(weight) for weight in problem.weights], True, decodes_only=True)


def unrotated(problem: Problem) -> Contender:
    """This package's product without a rotation: what the rotation costs is the difference."""

    def layer(weight: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: hqq_oft.functional.linear(x, None, weight)

    return Contender("hqq_oft, no rotation", [layer(weight) for weight in problem.weights], False, decodes_only=True)


def dense(problem: Problem) -> Contender:
    """A frozen dense `nn.Linear`: the limit in training."""
    layers = []
    for number in range(problem.copies):
        layer = nn.Linear(problem.k, problem.n, bias=False, device="meta")
        layer.weight = nn.Parameter(problem.dense.clone() if number else problem.dense, requires_grad=False)
        layers.append(layer)
    return Contender("dense", layers, False, held=_held(layers))


def hqq(problem: Problem) -> Contender:
    """HQQ's own layer without an adapter: dequantize, then the vendor's product."""
    layers = [hqq_layer(weight, problem.dtype) for weight in problem.weights]
    return Contender("HQQ", layers, False, held=_held(layers))


def peft_oft(problem: Problem) -> Contender:
    """PEFT's OFT on HQQ's PyTorch backend."""
    return _oft("PEFT OFT", problem, _adapted(problem, _oft_config(problem)))


def peft_oft_compiled(problem: Problem) -> Contender:
    """PEFT's OFT on HQQ's PYTORCH_COMPILE backend."""
    _check_compiles(problem)
    layers = _adapted(problem, _oft_config(problem), HQQBackend.PYTORCH_COMPILE)
    return _oft("PEFT OFT, HQQ compiled", problem, layers, compiled=True)


def peft_oft_aten(problem: Problem) -> Contender:
    """PEFT's OFT on HQQ's ATEN backend."""
    if importlib.util.find_spec("hqq_aten") is None:
        raise Unavailable("hqq_aten is not installed")
    if problem.setting.axis != 0:
        raise Unavailable("HQQ's ATEN backend serves axis 0 alone")
    return _oft("PEFT OFT, HQQ ATEN", problem, _adapted(problem, _oft_config(problem), HQQBackend.ATEN))


def peft_lora(problem: Problem) -> Contender:
    """PEFT's LoRA on HQQ: what people pick today."""
    layers = _adapted(problem, LoraConfig(r=LORA_RANK, target_modules=["layer"]))
    parameters = []
    for layer in layers:  # in the layer's dtype, as half-precision training sets it
        layer.lora_A.to(problem.dtype), layer.lora_B.to(problem.dtype)
        parameters += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return Contender(LORA, layers, False, parameters, _held(layers))


class _Plain(nn.Module):
    """OFT written well in plain PyTorch: float32 series of a cached layout, `bmm` over blocks, HQQ's product.

    Without gradients the rotation is made once.
    """

    def __init__(self, problem: Problem, base: HQQLinear) -> None:
        super().__init__()
        self.base, self.b, self.terms = base, problem.setting.block, problem.setting.terms
        self.v = nn.Parameter(problem.v.clone())
        rows, columns = torch.triu_indices(self.b, self.b, 1, device=problem.device)
        self.register_buffer("place", rows * self.b + columns)
        self.kept: Tensor | None = None

    def rotation(self, dtype: torch.dtype) -> Tensor:
        upper = self.v.new_zeros(self.v.shape[0], self.b**2).index_copy(1, self.place, self.v)
        upper = upper.view(-1, self.b, self.b)
        q = upper - upper.transpose(1, 2)
        if self.terms is None:
            identity = torch.eye(self.b, device=q.device)
            return torch.linalg.solve(identity + q, -2 * q, left=False).to(dtype)
        d = power = q
        for number, coefficient in enumerate(reference.series_coefficients(self.terms)):
            power = torch.bmm(power, q) if number else q
            d = d + coefficient * power if number else coefficient * power
        return d.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            d = self.rotation(x.dtype)
        else:
            self.kept = d = self.rotation(x.dtype) if self.kept is None else self.kept
        blocks = x.view(x.shape[0], -1, self.b)
        d = d.expand(blocks.shape[1], -1, -1)
        turned = torch.baddbmm(blocks.transpose(0, 1), blocks.transpose(0, 1), d)
        return self.base(turned.transpose(0, 1).reshape(x.shape))


def plain(problem: Problem) -> Contender:
    """The same OFT in plain PyTorch."""
    layers = [_Plain(problem, hqq_layer(weight, problem.dtype)) for weight in problem.weights]
    return Contender("plain PyTorch", layers, True, [layer.v for layer in layers], _held(layers))


def plain_compiled(problem: Problem) -> Contender:
    """The same OFT in plain PyTorch under `torch.compile`."""
    _check_compiles(problem)
    contender = plain(problem)
    contender.layers = [torch.compile(layer, dynamic=False) for layer in contender.layers]
    contender.name, contender.compiled = "plain PyTorch, compiled", True
    return contender


class _Scratch(torch.autograd.Function):
    """Rotate x, dequantize into a scratch, the vendor's product; dequantize again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, v: Tensor, block: int, terms: int | None, weight: Any) -> Tensor:
        ctx.save_for_backward(x, v)
        ctx.spec = (block, terms, weight)
        d = ops.cayley(v, block, terms, None, None, x.dtype)
        return F.linear(ops.rotate(x, d, None, False), ops.dequantize(*weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, v = ctx.saved_tensors
        block, terms, weight = ctx.spec
        d = ops.cayley(v, block, terms, None, None, grad.dtype)
        dx, dd = ops.rotate_backward(grad @ ops.dequantize(*weight, grad.dtype), x, d, None, False, True, True)
        return dx, ops.cayley_backward(dd, v, block, terms, None, None), None, None, None


def scratch(problem: Problem) -> Contender:
    """Unsloth's way with our kernels: a scratch for the weight, the rotation in a pass of its own over x."""
    setting = problem.setting
    v = nn.Parameter(problem.v.clone())

    def layer(weight: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: _Scratch.apply(x, v, setting.block, setting.terms, weight.arguments())

    layers = [layer(weight) for weight in problem.weights]
    held = [v, *(tensor for w in problem.weights for tensor in (w.packed, w.scale, w.zero))]
    return Contender("scratch + rotation of x", layers, True, [v], held)


def gemlite(problem: Problem) -> Contender:
    """GemLite's forward, without a rotation."""
    if problem.device.type != "cuda":
        raise Unavailable("GemLite needs a GPU")
    if importlib.util.find_spec("gemlite") is None:
        raise Unavailable("gemlite is not installed")
    if problem.setting.bits == 3 or problem.setting.axis != 1:
        raise Unavailable("GemLite serves 8, 4, 2 and 1 bits on axis 1")
    from gemlite.helper import A16Wn

    helper = A16Wn(device=str(problem.device))
    layers = [helper.from_hqqlinear(hqq_layer(w, problem.dtype), del_orig=False) for w in problem.weights]
    return Contender("GemLite", layers, False, decodes_only=True)


def int4(problem: Problem) -> Contender:
    """PyTorch's own int4 kernel for CPUs, without a rotation."""
    setting = problem.setting
    if problem.device.type != "cpu" or setting.bits != 4 or setting.axis != 1 or setting.dtype != "bf16":
        raise Unavailable("PyTorch's int4 kernel is timed on a CPU, for 4 bits on axis 1 in bf16")
    groups = problem.k // setting.group

    def layer(weight: Any) -> Callable[[Tensor], Tensor]:
        levels = reference.unpack(weight.packed, 4, problem.n * groups).view(problem.n, problem.k)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.int().contiguous(), 1)
        # its form is (level - 8) scale + zero
        zero = (8 - weight.zero.float()) * weight.scale.float()
        pairs = torch.stack([weight.scale, zero.bfloat16()], dim=-1)
        pairs = pairs.view(problem.n, groups, 2).transpose(0, 1).contiguous()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, setting.group, pairs)

    return Contender("PyTorch int4", [layer(weight) for weight in problem.weights], False, decodes_only=True)


def forward_passes(contender: Contender, problem: Problem, m: int, training: bool, limits: Limits) -> tuple[Cost, ...]:
    """The least that a forward of this contender must do; what it does beyond that is its own."""
    layer = problem.layer
    if contender.name == "dense":
        return (model.gemm(layer, m),)
    if not contender.rotates:
        passes = _cheapest(model.linear, replace(layer, block=None), m, limits)
        return (*passes, *_lora(layer, m)) if contender.name == LORA else passes
    passes = _cheapest(model.linear, layer, m, limits)
    return (model.cayley(layer, problem.setting.terms), *passes) if training else passes


def backward_passes(contender: Contender, problem: Problem, m: int, limits: Limits) -> tuple[Cost, ...]:
    """The least that a backward must do: nothing dense was kept, so the weight is decoded again, and D made again."""
    layer, terms = problem.layer, problem.setting.terms
    if contender.name == "dense":
        return (model.gemm(layer, m),)
    if not contender.rotates:
        passes = _cheapest(model.linear_backward, replace(layer, block=None), m, limits)
        return (*passes, *_lora(layer, m), *_lora(layer, m)) if contender.name == LORA else passes
    product = _cheapest(model.linear_backward, layer, m, limits)
    return (model.cayley(layer, terms), *product, model.cayley_backward(layer, terms))


def _cheapest(way: Callable[..., tuple[Cost, ...]], layer: model.Layer, m: int, limits: Limits) -> tuple[Cost, ...]:
    ways = [way(layer, m, scratch=scratch) for scratch in (False, True)]
    return min(ways, key=lambda passes: model.predicted_seconds(passes, limits.bandwidth, limits.rate))


def _lora(layer: model.Layer, m: int) -> tuple[Cost, Cost]:
    """Two products of rank r."""
    r, e = LORA_RANK, layer.element
    return (
        Cost((m * layer.K + r * layer.K + m * r) * e, 2 * m * layer.K * r),
        Cost((2 * m * layer.N + r * layer.N + m * r) * e, 2 * m * layer.N * r),
    )
