"""Inputs of every operation on any device, and the check against float64; used by the tests and by `sanitize.py`."""

from __future__ import annotations

from typing import Any

import calls
import torch
from calls import widened
from helpers import TOLERANCE, relative_error
from torch import Tensor

from hqq_oft import backend
from hqq_oft.check.cases import quantized_weight, skew_parameters
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops

# Tolerance for the summation order of float32 products, added to twice the error of the reference.
ORDER_OF_SUMS = {torch.float32: 5e-6, torch.float16: 2e-5, torch.bfloat16: 2e-5}


def operations(
    m: int,
    n: int,
    k: int,
    b: int,
    device: Any,
    dtype: torch.dtype,
    *,
    bits: int = 4,
    group: int = 64,
    axis: int = 1,
    stored: int | None = None,
    adapters: int = 0,
    terms: int | None = 5,
    transpose: bool = False,
) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation, by its name.

    Args:
        m, n, k, b: tokens, out-features, in-features, block size.
        stored: blocks that are stored, by default k / b; 1 for one shared block.
        adapters: how many are mixed, row by row; 0 for one adapter and no index.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    weight = quantized_weight(n, k, device, bits=bits, group=group, axis=axis, dtype=dtype)
    stored = stored or k // b
    v = skew_parameters(stored, b, device, dtype)
    d = reference.cayley(v.double(), b, 5, None, None, dtype)
    dd = torch.randn(stored, b, b, device=device)
    x, g, dy, bias = normal(m, k), normal(m, k), normal(m, n), normal(n)
    several, index = d, None
    if adapters:
        several = torch.stack([d * (adapter + 1) / adapters for adapter in range(adapters)])
        index = torch.randint(-1, adapters, (m,), device=device)
    return {
        "cayley": (v, b, terms, None, None, dtype),
        "cayley_backward": (dd, v, b, terms, None, None),
        "rotate": (x, several, index, transpose),
        "rotate_backward": (g, x, several, index, transpose, True, True),
        "dequantize": (weight, dtype),
        "dequantize_rotate": (weight, d, dtype),
        "linear": calls.linear(x, weight, several, bias, index),
        "linear_backward": calls.linear_backward(dy, x, weight, several, index),
    }


def run(name: str, args: tuple[Any, ...], on: Any = "triton") -> tuple[Tensor, ...]:
    """The operation's results on a backend, always as a tuple."""
    with backend(on):
        out = getattr(ops, name)(*args)
    return out if isinstance(out, tuple) else (out,)


def run_reference(name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The operation's results by the reference, always as a tuple."""
    out = getattr(reference, name)(*args)
    return out if isinstance(out, tuple) else (out,)


def check(name: str, args: tuple[Any, ...], dtype: torch.dtype, on: Any = "triton") -> None:
    """A backend's results against float64: within the dtype's tolerance, and twice the error of the reference in it."""
    results = run(name, args, on)
    truths = run_reference(name, widened(args))
    references = run_reference(name, args)
    for i, (out, truth, own) in enumerate(zip(results, truths, references, strict=True)):
        assert (out.shape, out.dtype, out.device) == (own.shape, own.dtype, own.device)
        error, own_error = relative_error(out, truth), relative_error(own, truth)
        message = f"{name}, result {i}: error {error:.2e}, the reference's {own_error:.2e}"
        assert error <= TOLERANCE[dtype], message
        assert error <= 2 * own_error + ORDER_OF_SUMS[dtype], message
