"""Each operation's gradient against finite differences, and what is saved for backward."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import TOLERANCE, hqq_layer, relative_error

import hqq_oft.ops.table  # noqa: F401  (registers the operators)
from hqq_oft import QuantizedWeight, functional
from hqq_oft.ops import reference

TERMS = [1, 2, 3, 4, 5, 6, 7, 8, None]
HALF = [torch.float16, torch.bfloat16]


def skew_parameters(blocks, b, dtype=torch.float32, std=0.1):
    return (torch.randn(blocks, b * (b - 1) // 2) * std).to(dtype)


def quantized_weight(out_features=24, in_features=32, **settings):
    settings = {"group_size": 16, **settings}
    return QuantizedWeight.from_hqq(hqq_layer(out_features, in_features, **settings))


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("b", [2, 3, 6])
def test_gradcheck_cayley(terms, b):
    v = skew_parameters(2, b, torch.float64).requires_grad_()
    keep = torch.tensor([True, False])
    assert torch.autograd.gradcheck(lambda v: functional.cayley(v, b, terms), v)
    assert torch.autograd.gradcheck(lambda v: functional.cayley(v, b, terms, keep=keep), v)
    assert torch.autograd.gradcheck(lambda v: functional.cayley(v[:1], b, terms, keep=keep), v)


@pytest.mark.parametrize("terms", [5, None])
def test_the_projection_passes_its_gradient_straight_through(terms):
    v = skew_parameters(2, 8, torch.float64, std=0.3).requires_grad_()
    grad = torch.randn(2, 8, 8, dtype=torch.float64)
    functional.cayley(v, 8, terms, max_norm=0.1).backward(grad)
    norms = (2 * v.detach().square().sum(1, keepdim=True)).sqrt()
    projected = (v.detach() * 0.1 / norms).requires_grad_()
    functional.cayley(projected, 8, terms).backward(grad)
    assert relative_error(v.grad, projected.grad) <= 1e-12


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("stored", [4, 1])
@pytest.mark.parametrize("index", [None, torch.tensor([1, 0, -1])])
def test_gradcheck_rotate(transpose, stored, index):
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    shape = (stored, 3, 3) if index is None else (2, stored, 3, 3)
    d = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def f(x, d):
        return functional.rotate(x, d, transpose=transpose, adapter_index=index)

    assert torch.autograd.gradcheck(f, (x, d))
    assert torch.autograd.gradcheck(lambda x: f(x, d.detach()), x)
    assert torch.autograd.gradcheck(lambda d: f(x.detach(), d), d)


@pytest.mark.parametrize("stored", [4, 1])
def test_gradcheck_dequantize_rotate(stored):
    weight = quantized_weight(8, 32)
    d = torch.randn(stored, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: functional.dequantize_rotate(weight, d, torch.float64), d, fast_mode=True)


@pytest.mark.parametrize("stored", [4, 1, None])
@pytest.mark.parametrize("index", [None, torch.tensor([1, 0, -1])])
def test_gradcheck_linear(stored, index):
    weight = quantized_weight(8, 12, group_size=8)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    if stored is None:
        assert torch.autograd.gradcheck(lambda x, bias: functional.linear(x, weight, bias), (x, bias))
        return
    shape = (stored, 3, 3) if index is None else (2, stored, 3, 3)
    d = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def f(x, d, bias):
        return functional.linear(x, weight, bias, d=d, adapter_index=index)

    assert torch.autograd.gradcheck(f, (x, d, bias))
    assert torch.autograd.gradcheck(lambda x: f(x, d.detach(), bias.detach()), x)
    assert torch.autograd.gradcheck(lambda d: f(x.detach(), d, bias.detach()), d)
    assert torch.autograd.gradcheck(lambda bias: f(x.detach(), d.detach(), bias), bias)


@pytest.mark.parametrize("terms", [1, 5, None])
def test_gradcheck_oft_linear(terms):
    weight = quantized_weight(8, 12, group_size=8)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    v = skew_parameters(4, 3, torch.float64).requires_grad_()
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, False, True, True])

    def f(x, v, bias):
        return functional.oft_linear(x, weight, bias, v=v, block_size=3, terms=terms, keep=keep)

    assert torch.autograd.gradcheck(f, (x, v, bias))
    assert torch.autograd.gradcheck(lambda x: f(x, v.detach(), bias.detach()), x)
    assert torch.autograd.gradcheck(lambda v: f(x.detach(), v, bias.detach()), v)
    assert torch.autograd.gradcheck(lambda bias: f(x.detach(), v.detach(), bias), bias)


@pytest.mark.parametrize("terms", [1, 5, None])
def test_gradcheck_oft_rotate(terms):
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    v = skew_parameters(4, 3, torch.float64).requires_grad_()
    keep = torch.tensor([True, False, True, True])

    def f(x, v):
        return functional.oft_rotate(x, v, block_size=3, terms=terms, keep=keep)

    assert torch.equal(f(x, v), functional.rotate(x, functional.cayley(v, 3, terms, keep=keep)))
    assert torch.autograd.gradcheck(f, (x, v))
    assert torch.autograd.gradcheck(lambda x: f(x, v.detach()), x)
    assert torch.autograd.gradcheck(lambda v: f(x.detach(), v), v)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_projecting_twice_changes_nothing(dtype):
    v = skew_parameters(50, 32, dtype, std=0.3)
    once = reference.project(v, 0.1)
    assert torch.equal(reference.project(once, 0.1), once)
    norms = (2 * once.double().square().sum(1)).sqrt()
    assert norms.max() <= 0.1 * (1 + torch.finfo(dtype).eps)
    assert norms.min() >= 0.1 * (1 - torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("terms", [5, None])
def test_half_precision_gradients(dtype, terms):
    weight = quantized_weight(64, 96, dtype=dtype, group_size=32)
    x = torch.randn(33, 96).to(dtype).requires_grad_()
    v = skew_parameters(12, 8).requires_grad_()
    grad = torch.randn(33, 64).to(dtype)
    functional.oft_linear(x, weight, v=v, block_size=8, terms=terms).backward(grad)
    x64, v64 = x.detach().double().requires_grad_(), v.detach().double().requires_grad_()
    dense = oracle.rotation(v64, 8, 96, terms)
    (x64 @ dense @ functional.dequantize(weight, torch.float64).T).backward(grad.double())
    assert x.grad.dtype == dtype
    assert v.grad.dtype == torch.float32
    assert relative_error(x.grad, x64.grad) <= TOLERANCE[dtype]
    assert relative_error(v.grad, v64.grad) <= TOLERANCE[dtype]


def test_only_the_inputs_are_saved_for_backward():
    weight, v = quantized_weight(), skew_parameters(4, 8).requires_grad_()
    x = torch.randn(5, 32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        functional.oft_linear(x, weight, v=v, block_size=8)
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), v.data_ptr()}
        saved.clear()
        functional.oft_rotate(x, v, block_size=8)
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), v.data_ptr()}
        saved.clear()
        functional.oft_linear(x, weight, v=v.detach(), block_size=8)
        assert {t.data_ptr() for t in saved} == {v.data_ptr()}
        saved.clear()
        functional.oft_linear(x.detach(), weight, v=v.detach(), block_size=8)
        assert saved == []


def test_second_derivatives_are_refused():
    v = skew_parameters(1, 4).requires_grad_()
    (grad,) = torch.autograd.grad(functional.cayley(v, 4).square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def _calls():
    """Every differentiable function with all its differentiable arguments."""
    weight, bias = quantized_weight(), torch.randn(24)
    x, v, d, keep = (
        torch.randn(5, 32),
        skew_parameters(4, 8),
        torch.randn(4, 8, 8) * 0.1,
        torch.tensor([True] * 3 + [False]),
    )
    stacked, index = torch.randn(2, 4, 8, 8) * 0.1, torch.tensor([0, 1, -1, 1, 0])
    return {
        "cayley": (lambda v: functional.cayley(v, 8, 5, keep=keep), (v,)),
        "rotate": (functional.rotate, (x, d)),
        "rotate mixed": (lambda x, d: functional.rotate(x, d, adapter_index=index), (x, stacked)),
        "oft_rotate": (lambda x, v: functional.oft_rotate(x, v, block_size=8), (x, v)),
        "dequantize_rotate": (lambda d: functional.dequantize_rotate(weight, d), (d,)),
        "linear": (lambda x, bias, d: functional.linear(x, weight, bias, d=d), (x, bias, d)),
        "oft_linear": (
            lambda x, bias, v: functional.oft_linear(x, weight, bias, v=v, block_size=8, terms=5),
            (x, bias, v),
        ),
    }


@pytest.mark.parametrize("name", _calls())
def test_gradients_by_torch_func(name):
    function, args = _calls()[name]

    def loss(*args):
        return function(*args).square().sum()

    leaves = [arg.clone().requires_grad_() for arg in args]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    gradients = torch.func.grad(loss, tuple(range(len(args))))(*args)
    _, pull_back = torch.func.vjp(loss, *args)
    for got in (gradients, pull_back(torch.ones(()))):
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
