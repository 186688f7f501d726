"""Inputs of every operation on any device, and the check against float64; used by the tests and by `sanitize.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.problem import quantized_weight, skew_parameters
from hqq_oft import backend
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
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

    weight = quantized_weight(n, k, device, bits=bits, group=group, axis=axis, dtype=dtype).arguments()
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
        "dequantize": (*weight, dtype),
        "dequantize_rotate": (*weight, d, dtype),
        "linear": (x, several, *weight, bias, index),
        "linear_backward": (dy, x, several, *weight, index, True, True),
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


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments in float64, results as well."""

    def widen(arg: Any) -> Any:
        if isinstance(arg, Tensor) and arg.is_floating_point():
            return arg.double()
        return torch.float64 if isinstance(arg, torch.dtype) else arg

    return tuple(widen(arg) for arg in args)


def relative_error(out: Tensor, truth: Tensor) -> float:
    """|out - truth| / |truth|; NaN if anything in `out` is, so that no comparison with it holds."""
    out, truth = out.detach().double(), truth.detach().double()
    norm = truth.norm()
    return float((out - truth).norm() / (norm if norm > 0 else 1))


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
