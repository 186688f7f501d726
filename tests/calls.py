"""The arguments of the operations on a quantized weight, in one place: tests name what they pass, not where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from helpers import hqq_layer
from torch import Tensor

from hqq_oft import QuantizedWeight
from hqq_oft.check.measure import widened as widened
from hqq_oft.ops import backends

# Where a call has its `d`.
_ROTATION = {"linear": 2, "linear_backward": 3, "rotate": 1, "rotate_backward": 2}


def quantized_weight(out_features: int = 32, in_features: int = 64, **settings: Any) -> QuantizedWeight:
    settings = {"nbits": settings.pop("bits", 4), **settings}
    return QuantizedWeight.from_hqq(hqq_layer(out_features, in_features, **settings))


def linear(
    x: Tensor, weight: QuantizedWeight, d: Tensor | None = None, bias: Tensor | None = None, index: Tensor | None = None
) -> tuple[Any, ...]:
    return x, weight, d, bias, index


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    d: Tensor | None = None,
    index: Tensor | None = None,
    need_x: bool = True,
    need_d: bool = True,
) -> tuple[Any, ...]:
    return dy, x, weight, d, index, need_x, need_d


def without_rotation(operation: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The call with `d=None`."""
    at = _ROTATION[operation]
    return *args[:at], None, *args[at + 1 :]


def rotations_of(operation: str, args: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None]:
    """The `d` and the adapter index of a forward `linear` or `rotate`."""
    return args[_ROTATION[operation]], args[-1] if operation == "linear" else args[2]


def parts(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the operator `torch.ops.hqq_oft.<name>`: a weight as its parts."""
    return tuple(part for arg in args for part in (arg.arguments() if isinstance(arg, QuantizedWeight) else (arg,)))


def first_dtype(args: tuple[Any, ...]) -> torch.dtype:
    """The dtype of the first tensor of floating point numbers."""
    return next(arg.dtype for arg in parts(args) if isinstance(arg, Tensor) and arg.is_floating_point())


@contextmanager
def planners_of(backend: str, **planners: backends.Planner | None) -> Iterator[None]:
    """Change a backend's planners of some operations inside the block; None removes one."""
    before = backends.registry()[backend]
    operations = {**before.operations, **planners}
    operations = {name: planner for name, planner in operations.items() if planner is not None}
    backends.registry()[backend] = backends.Backend(backend, operations, before.reason)
    backends.forget_plans()
    try:
        yield
    finally:
        backends.registry()[backend] = before
        backends.forget_plans()


def examples() -> list[tuple[str, tuple[Any, ...]]]:
    """A call of every operation, and of its variants, by the operation's name."""
    weight = QuantizedWeight.from_hqq(hqq_layer(16, 24, group_size=8))
    v, d = torch.randn(3, 28) * 0.1, torch.randn(3, 8, 8)
    x, grad = torch.randn(5, 24), torch.randn(5, 16)
    keep, index = torch.tensor([True, False, True]), torch.tensor([0, 1, 1, -1, 0])
    stacked, bias = torch.randn(2, 3, 8, 8), torch.randn(16)
    f32, bf16 = torch.float32, torch.bfloat16
    return [
        ("cayley", (v, 8, 5, None, None, f32)),
        ("cayley", (v, 8, None, keep, 0.1, bf16)),
        ("cayley", (v[:1], 8, 4, keep, None, f32)),
        ("cayley_backward", (d, v, 8, 5, None, None)),
        ("cayley_backward", (d, v[:1], 8, None, keep, 0.1)),
        ("rotate", (x, d, None, False)),
        ("rotate", (torch.randn(24, 5).T, d[:1], None, True)),
        ("rotate", (x, stacked, index, False)),
        ("rotate_backward", (x, x.flip(0), d, None, False, True, True)),
        ("rotate_backward", (x, x.flip(0), stacked, index, True, False, True)),
        ("rotate_backward", (x, x.flip(0), d.double(), None, False, True, False)),
        ("dequantize", (weight, bf16)),
        ("dequantize_rotate", (weight, d, f32)),
        ("linear", linear(x, weight, d, bias)),
        ("linear", linear(torch.randn(24, 5).T, weight, stacked, None, index)),
        ("linear", linear(x, weight, None, bias)),
        ("linear_backward", linear_backward(grad, x, weight, d)),
        ("linear_backward", linear_backward(torch.randn(16, 5).T, x, weight, stacked, index)),
        ("linear_backward", linear_backward(grad, x, weight, d, need_x=False)),
        ("linear_backward", linear_backward(grad, x, weight, need_d=False)),
        ("project_", (v.clone(), 0.1)),
    ]
