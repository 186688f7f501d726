"""The whole way of a call on a GPU, up to the launch: every operation, in every regime of M."""

from __future__ import annotations

import calls
import pytest
import torch
from helpers import add_adapter, hqq_layer, oft_layer
from hqq_oft.triton_kernels import _tiles

from hqq_oft import backend
from hqq_oft.ops import reference
from hqq_oft.ops.table import OPERATIONS

from .problem import described, differentiable, forward_and_backward, moved

CUDA = torch.device("cuda", 0)
BF16 = torch.bfloat16


def regimes(operation):
    """Numbers of rows that select each tile of an operation, and what lies beyond them."""
    rows = [1, *(tile.m for tile in _tiles.tiles("default", operation))]
    return [*rows, rows[-1] + 44]


def problem(name, m, bits=4, axis=1, mixed=False, dtype=BF16):
    """Arguments of an operation on a layer of 1120 x 256, on the CPU."""
    n, k, b = 1120, 256, 32
    d = torch.randn(*((2,) if mixed else ()), k // b, b, b).to(dtype)
    index = torch.arange(m) % 3 - 1 if mixed else None
    weight = calls.quantized_weight(n, k, bits=bits, group_size=64, axis=axis, dtype=dtype, optimize=False)
    x, grad = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    v = torch.randn(k // b, b * (b - 1) // 2)
    return {
        "cayley": (v, b, 5, None, 0.1, dtype),
        "cayley_backward": (d.float(), v, b, 5, None, 0.1),
        "project_": (v, 0.1),
        "rotate": (x, d, index, False),
        "rotate_backward": (x, x.clone(), d, index, False, True, True),
        "dequantize": (weight, dtype),
        "dequantize_rotate": (weight, d, dtype),
        "linear": calls.linear(x, weight, d, torch.randn(n).to(dtype), index),
        "linear_backward": calls.linear_backward(grad, x, weight, d, index),
    }[name]


def check(name, args, launches):
    launches()
    out = OPERATIONS[name](*moved(args, lambda t: t.to(CUDA)))
    assert described(out) == described(getattr(reference, name)(*args))
    assert all(t is None or t.device == CUDA for t in (out if isinstance(out, tuple) else (out,)))
    return launches()


@pytest.mark.parametrize("name", ["cayley", "cayley_backward", "project_", "dequantize", "dequantize_rotate"])
def test_operations_without_rows(name, launches):
    with backend("triton"):
        assert check(name, problem(name, 1), launches) == 1


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_every_packing(bits, launches):
    with backend("triton"):
        for name in ("dequantize", "linear", "linear_backward"):
            assert check(name, problem(name, 16, bits=bits, axis=bits % 2), launches) >= 1


@pytest.mark.parametrize("mixed", [False, True], ids=["one", "mixed"])
@pytest.mark.parametrize(
    ("name", "m"),
    [(name, m) for name in ("rotate", "rotate_backward", "linear", "linear_backward") for m in regimes(name)],
)
def test_every_regime(name, m, mixed, launches):
    with backend("triton"):
        args = problem(name, m, mixed=mixed)
        first = check(name, args, launches)
        assert first >= 1
        assert check(name, args, launches) == first  # by the kept plan
        if name.startswith("linear"):
            assert check(name, calls.without_rotation(name, problem(name, m)), launches) >= 1


@pytest.mark.parametrize("name", differentiable())
def test_forward_and_backward_under_auto(name, launches):
    function, args = differentiable(dtype=BF16)[name]
    expected = forward_and_backward(function, args)
    launches()
    results = forward_and_backward(function, moved(args, lambda t: t.detach().to(CUDA).requires_grad_(t.requires_grad)))
    assert described(results) == described(expected)
    assert launches() >= 1


def test_a_layer(launches):
    layer = oft_layer(hqq_layer(dtype=BF16), "a", use_cayley_neumann=True, oft_block_size=32).to(CUDA)
    add_adapter(layer, "b", oft_block_size=32, use_cayley_neumann=True)
    x = torch.randn(4, 7, 96, dtype=BF16).to(CUDA)
    layer(x.requires_grad_()).sum().backward()
    assert layer.oft_R["a"].weight.grad.shape == layer.oft_R["a"].weight.shape
    assert launches() >= 4
    layer.eval()
    with torch.no_grad():
        for rows in (1, 4):
            assert layer(x[:rows]).shape == (rows, 7, 64)
        launches()
        layer(x)
        assert launches() == 1
        layer(x, adapter_names=["a", "b", "__base__", "a"])
    assert launches() >= 1
