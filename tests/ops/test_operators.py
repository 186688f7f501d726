"""Each operation as a PyTorch operator: opcheck, compilation, autocast."""

from __future__ import annotations

import calls
import pytest
import torch
from helpers import COMPILE_BACKEND, hqq_layer, relative_error

import hqq_oft.ops.table  # noqa: F401  (registers the operators)
from hqq_oft import QuantizedWeight, functional


def skew_parameters(blocks, b, dtype=torch.float32, std=0.1):
    return (torch.randn(blocks, b * (b - 1) // 2) * std).to(dtype)


def quantized_weight(out_features=24, in_features=32, **settings):
    settings = {"group_size": 16, **settings}
    return QuantizedWeight.from_hqq(hqq_layer(out_features, in_features, **settings))


@pytest.mark.parametrize("case", range(21))
def test_opcheck(case):
    name, args = calls.examples()[case]
    torch.library.opcheck(getattr(torch.ops.hqq_oft, name).default, calls.parts(args))


def test_compile_without_graph_breaks_forward_and_backward():
    weight, bias = quantized_weight(), torch.randn(24)
    v, w = skew_parameters(4, 8), skew_parameters(4, 8)

    def f(x, v, w):
        x = functional.rotate(x, functional.cayley(v, 8, 5))
        return functional.oft_linear(x, weight, bias, v=w, block_size=8)

    results = []
    for function in (f, torch.compile(f, backend=COMPILE_BACKEND, fullgraph=True)):
        inputs = [t.detach().clone().requires_grad_() for t in (torch.ones(5, 32), v, w)]
        out = function(*inputs)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in inputs)])
    for eager, compiled in zip(*results, strict=True):
        assert relative_error(compiled, eager) <= 1e-6


def test_autocast_does_not_lower_the_precision():
    weight, v, x = quantized_weight(), skew_parameters(4, 8).requires_grad_(), torch.randn(5, 32)
    expected = functional.oft_linear(x, weight, v=v, block_size=8, terms=5)
    expected.sum().backward()
    grad, v.grad = v.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = functional.oft_linear(x, weight, v=v, block_size=8, terms=5)
        out.sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(v.grad, grad)
