"""Differentiable calls of the package with their arguments, and what is known of results without their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import calls
import torch
from torch import Tensor

from hqq_oft import QuantizedWeight, functional


def moved(args: tuple[Any, ...], move: Callable[[Tensor], Tensor]) -> tuple[Any, ...]:
    """The arguments of a call, with every tensor replaced."""

    def one(arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return move(arg)
        if isinstance(arg, QuantizedWeight):
            return QuantizedWeight(*map(one, arg.arguments()))
        return arg

    return tuple(map(one, args))


def described(out: Any) -> list[tuple[Any, ...]]:
    """What is known of results without their values."""
    results = out if isinstance(out, (tuple, list)) else (out,)
    return [None if t is None else (tuple(t.shape), t.dtype, t.stride()) for t in results]


def differentiable(m: int = 5, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Every function of `hqq_oft.functional` with arguments on the CPU; floating point tensors require gradients."""
    n, k, b = 32, 64, 16

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(shape) * 0.1).to(dtype).requires_grad_()

    weight = calls.quantized_weight(n, k, dtype=dtype)
    x, v, d, stacked, bias = leaf(m, k), leaf(4, 120), leaf(4, b, b), leaf(2, 4, b, b), leaf(n)
    index, keep = torch.arange(m) % 3 - 1, torch.tensor([True, False, True, True])
    oft = {"block_size": b, "terms": 5}
    return {
        "cayley": (lambda v, keep: functional.cayley(v, b, keep=keep, max_norm=0.1), (v, keep)),
        "cayley series": (lambda v: functional.cayley(v, b, 5, dtype=torch.bfloat16), (v,)),
        "rotate": (functional.rotate, (x, d)),
        "rotate mixed": (lambda x, d, i: functional.rotate(x, d, adapter_index=i), (x, stacked, index)),
        "oft_rotate": (lambda x, v, keep: functional.oft_rotate(x, v, keep=keep, **oft), (x, v, keep)),
        "dequantize": (lambda w: functional.dequantize(w), (weight,)),
        "dequantize_rotate": (functional.dequantize_rotate, (weight, d)),
        "linear": (lambda x, w, bias, d: functional.linear(x, w, bias, d=d), (x, weight, bias, d)),
        "linear mixed": (
            lambda x, w, d, i: functional.linear(x, w, d=d, adapter_index=i),
            (x, weight, stacked, index),
        ),
        "oft_linear": (lambda x, w, bias, v: functional.oft_linear(x, w, bias, v=v, **oft), (x, weight, bias, v)),
    }


def leaves(args: tuple[Any, ...]) -> list[Tensor]:
    """The arguments that require gradients."""
    return [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]


def forward_and_backward(function: Callable[..., Tensor], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The result and the gradient of every leaf."""
    out = function(*args)
    inputs = leaves(args)
    return (out, *torch.autograd.grad(out, inputs, torch.empty_like(out))) if inputs else (out,)
