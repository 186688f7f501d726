"""Each operation against the float64 oracle, its gradient against finite differences, its operator against opcheck."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from helpers import COMPILE_BACKEND, TOLERANCE, hqq_layer, relative_error
from torch.autograd import forward_ad

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


# --- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("b", [1, 2, 3, 8, 32, 96])
def test_cayley(terms, b):
    v = skew_parameters(2, b, std=0.3 / math.sqrt(b))
    out = functional.cayley(v, b, terms)
    truth = torch.stack([oracle.block(row, b, terms) for row in v]) - torch.eye(b)
    assert out.dtype == torch.float32
    assert relative_error(out, truth) <= 1e-6


@pytest.mark.parametrize("terms", [5, None])
@pytest.mark.parametrize("dtype", HALF)
def test_cayley_computes_in_float32_for_every_input_dtype(terms, dtype):
    v = skew_parameters(3, 8, dtype)
    out = functional.cayley(v, 8, terms)
    truth = torch.stack([oracle.block(row, 8, terms) for row in v]) - torch.eye(8)
    assert relative_error(out, truth) <= 1e-6  # the reference uses the same stored v, so rounding v adds no error


def test_the_residual_form_keeps_small_rotations_in_bf16():
    v = skew_parameters(4, 8, std=0.01)
    identity = torch.eye(8, dtype=torch.float64)
    truth = torch.stack([oracle.block(row, 8, None) for row in v]) - identity
    d = functional.cayley(v, 8, None, dtype=torch.bfloat16)
    rounded = (truth + identity).bfloat16().double() - identity  # the diagonal of R, 1 - 1e-3, becomes 1
    assert relative_error(d, truth) <= 4e-3
    assert relative_error(d.diagonal(0, 1, 2), truth.diagonal(0, 1, 2)) <= 4e-3
    assert relative_error(rounded.diagonal(0, 1, 2), truth.diagonal(0, 1, 2)) >= 0.5


def test_the_exact_map_is_orthogonal_and_transposed_to_the_limit_of_the_series():
    v = skew_parameters(2, 8, torch.float64, std=0.05)
    identity = torch.eye(8, dtype=torch.float64)
    exact = functional.cayley(v, 8, None) + identity
    assert relative_error(exact @ exact.transpose(1, 2), identity.expand(2, 8, 8)) <= 1e-13
    series = functional.cayley(v, 8, 40) + identity
    assert relative_error(series.transpose(1, 2), exact) <= 1e-12


def test_dropped_blocks_are_the_identity():
    v = skew_parameters(4, 8)
    keep = torch.tensor([True, False, True, False])
    d = functional.cayley(v, 8, keep=keep)
    assert torch.equal(d[~keep], torch.zeros(2, 8, 8))
    assert torch.equal(d[keep], functional.cayley(v, 8)[keep])
    shared = functional.cayley(v[:1], 8, keep=keep)
    assert shared.shape == (4, 8, 8)
    assert torch.equal(shared[2], functional.cayley(v[:1], 8)[0])
    broken = v.clone()
    broken[1] = float("nan")
    assert torch.isfinite(functional.cayley(broken, 8, keep=keep)).all()


@pytest.mark.parametrize("terms", [5, None])
def test_constrained_blocks_are_scaled_to_the_bound(terms):
    v = torch.cat([skew_parameters(1, 8, std=0.2), skew_parameters(1, 8, std=1e-4)])
    out = functional.cayley(v, 8, terms, max_norm=0.1)
    truth = oracle.rotation(v, 8, 16, terms, max_norm=0.1) - torch.eye(16)
    assert relative_error(torch.block_diag(*out), truth) <= 1e-6
    assert torch.equal(out[1], functional.cayley(v, 8, terms)[1])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("stored", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("std", [0.1, 1e-3])
def test_rotate(transpose, stored, dtype, std):
    d = functional.cayley(skew_parameters(stored, 8, std=std), 8)
    x = torch.randn(3, 5, 32).to(dtype)
    dense = torch.block_diag(*(d.double() + torch.eye(8)).expand(4, 8, 8))
    out = functional.rotate(x, d, transpose=transpose)
    assert (out.dtype, out.shape) == (dtype, x.shape)
    truth = x.double() @ (dense.T if transpose else dense)
    assert relative_error(out, truth) <= TOLERANCE[dtype]
    # computed in float32 and rounded once; rounding R or partial sums would exceed this tolerance
    assert relative_error(out, truth) <= 1.02 * relative_error(truth.to(dtype), truth) + 1e-7


@pytest.mark.parametrize("stored", [4, 1])
def test_rotate_by_an_index_per_row(stored):
    d = torch.stack([functional.cayley(skew_parameters(stored, 8), 8) for _ in range(3)])
    x = torch.randn(6, 32)
    index = torch.tensor([2, -1, 0, 0, 1, -1])
    out = functional.rotate(x, d, adapter_index=index)
    for row, adapter in enumerate(index.tolist()):
        expected = x[row : row + 1] if adapter < 0 else functional.rotate(x[row : row + 1], d[adapter])
        assert relative_error(out[row : row + 1], expected) <= 1e-6


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("stored", [4, 1])
def test_dequantize_rotate(axis, stored):
    weight = quantized_weight(axis=axis)
    d = functional.cayley(skew_parameters(stored, 8), 8)
    dense = torch.block_diag(*(d.double() + torch.eye(8)).expand(4, 8, 8))
    truth = functional.dequantize(weight, torch.float64) @ dense.T
    assert relative_error(functional.dequantize_rotate(weight, d), truth) <= 1e-6
    assert functional.dequantize_rotate(weight, d, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rotated", [True, False])
def test_linear(dtype, bias, rotated):
    weight = quantized_weight(dtype=dtype)
    b = torch.randn(24).to(dtype) if bias else None
    d = functional.cayley(skew_parameters(4, 8), 8) if rotated else None
    x = torch.randn(2, 7, 32).to(dtype)
    dense = torch.block_diag(*(d.double() + torch.eye(8))) if rotated else torch.eye(32, dtype=torch.float64)
    truth = x.double() @ dense @ functional.dequantize(weight, torch.float64).T + (b.double() if bias else 0)
    out = functional.linear(x, d, weight, b)
    assert (out.dtype, out.shape) == (dtype, (2, 7, 24))
    assert relative_error(out, truth) <= TOLERANCE[dtype]


def test_linear_by_an_index_per_row():
    weight = quantized_weight()
    d = torch.stack([functional.cayley(skew_parameters(4, 8), 8) for _ in range(2)])
    x, index = torch.randn(3, 2, 32), torch.tensor([0, 1, -1, 0, 1, 1])
    out = functional.linear(x, d, weight, adapter_index=index).reshape(6, 24)
    for row, adapter in enumerate(index.tolist()):
        single = functional.linear(x.reshape(6, 32)[row : row + 1], None if adapter < 0 else d[adapter], weight)
        assert relative_error(out[row : row + 1], single) <= 1e-6


@pytest.mark.parametrize("terms", [5, None])
def test_oft_linear_is_linear_of_cayley(terms):
    weight, v, x = quantized_weight(), skew_parameters(4, 8), torch.randn(5, 32)
    keep = torch.tensor([True, True, False, True])
    fused = functional.oft_linear(x, v, weight, block_size=8, terms=terms, keep=keep, max_norm=0.2)
    parts = functional.linear(x, functional.cayley(v, 8, terms, keep=keep, max_norm=0.2), weight)
    assert torch.equal(fused, parts)


@pytest.mark.parametrize("x", [torch.randn(32), torch.randn(0, 32), torch.randn(2, 0, 32), torch.randn(32, 6).T])
def test_any_leading_dimensions_and_strides(x):
    weight, v = quantized_weight(), skew_parameters(4, 8)
    out = functional.oft_linear(x, v, weight, block_size=8)
    truth = x.double() @ oracle.rotation(v, 8, 32, 5) @ functional.dequantize(weight, torch.float64).T
    assert out.shape == (*x.shape[:-1], 24)
    assert relative_error(out, truth) <= 1e-5


# --- Gradients -------------------------------------------------------------------------------------------------------


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
        assert torch.autograd.gradcheck(lambda x, bias: functional.linear(x, None, weight, bias), (x, bias))
        return
    shape = (stored, 3, 3) if index is None else (2, stored, 3, 3)
    d = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def f(x, d, bias):
        return functional.linear(x, d, weight, bias, adapter_index=index)

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
        return functional.oft_linear(x, v, weight, bias, block_size=3, terms=terms, keep=keep)

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
    functional.oft_linear(x, v, weight, block_size=8, terms=terms).backward(grad)
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
        functional.oft_linear(x, v, weight, block_size=8)
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), v.data_ptr()}
        saved.clear()
        functional.oft_rotate(x, v, block_size=8)
        assert {t.data_ptr() for t in saved} == {x.data_ptr(), v.data_ptr()}
        saved.clear()
        functional.oft_linear(x, v.detach(), weight, block_size=8)
        assert {t.data_ptr() for t in saved} == {v.data_ptr()}
        saved.clear()
        functional.oft_linear(x.detach(), v.detach(), weight, block_size=8)
        assert saved == []


def test_second_derivatives_are_refused():
    v = skew_parameters(1, 4).requires_grad_()
    (grad,) = torch.autograd.grad(functional.cayley(v, 4).square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- Operators -------------------------------------------------------------------------------------------------------


def operator_arguments():
    weight = quantized_weight(16, 24, group_size=8).arguments()
    v, d = skew_parameters(3, 8), torch.randn(3, 8, 8)
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
        ("dequantize", (*weight, bf16)),
        ("dequantize_rotate", (*weight, d, f32)),
        ("linear", (x, d, *weight, bias, None)),
        ("linear", (torch.randn(24, 5).T, stacked, *weight, None, index)),
        ("linear", (x, None, *weight, bias, None)),
        ("linear_backward", (grad, x, d, *weight, None, True, True)),
        ("linear_backward", (torch.randn(16, 5).T, x, stacked, *weight, index, True, True)),
        ("linear_backward", (grad, x, d, *weight, None, False, True)),
        ("linear_backward", (grad, x, None, *weight, None, True, False)),
    ]


@pytest.mark.parametrize("case", range(20))
def test_opcheck(case):
    name, args = operator_arguments()[case]
    torch.library.opcheck(getattr(torch.ops.hqq_oft, name).default, args)


def test_compile_without_graph_breaks_forward_and_backward():
    weight, bias = quantized_weight(), torch.randn(24)
    v, w = skew_parameters(4, 8), skew_parameters(4, 8)

    def f(x, v, w):
        x = functional.rotate(x, functional.cayley(v, 8))
        return functional.oft_linear(x, w, weight, bias, block_size=8, terms=None)

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
    expected = functional.oft_linear(x, v, weight, block_size=8)
    expected.sum().backward()
    grad, v.grad = v.grad, None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = functional.oft_linear(x, v, weight, block_size=8)
        out.sum().backward()
    assert torch.equal(out, expected)
    assert torch.equal(v.grad, grad)


# --- Bad input -------------------------------------------------------------------------------------------------------

V, D, X = torch.zeros(4, 28), torch.zeros(4, 8, 8), torch.zeros(2, 32)
BAD = [
    (lambda w: functional.cayley(torch.zeros(4, 28, dtype=torch.int64), 8), TypeError, "v must be a floating point"),
    (lambda w: functional.cayley(V, 9), ValueError, r"v must have shape \[stored blocks, 36\] for block_size=9"),
    (lambda w: functional.cayley(V[0], 8), ValueError, "v must have shape"),
    (lambda w: functional.cayley(V, 0), ValueError, "block_size must be at least 1"),
    (lambda w: functional.cayley(V, 8, 0), ValueError, "terms must be at least 1, or None"),
    (lambda w: functional.cayley(V, 8, keep=torch.ones(3, dtype=torch.bool)), ValueError, "keep must be a bool tensor"),
    (lambda w: functional.cayley(V, 8, keep=torch.ones(4)), ValueError, "keep must be a bool tensor"),
    (lambda w: functional.rotate(X.long(), D), TypeError, "x must be a floating point"),
    (lambda w: functional.rotate(X, D.long()), TypeError, "d must be a floating point"),
    (lambda w: functional.rotate(torch.tensor(1.0), D), ValueError, "got a scalar"),
    (lambda w: functional.rotate(X, D[:3]), ValueError, "got 3 blocks of 8"),
    (lambda w: functional.rotate(X, D[0]), ValueError, r"d must have shape \[blocks, b, b\]"),
    (lambda w: functional.rotate(torch.zeros(2, 30), D), ValueError, "d must rotate 30 features"),
    (
        lambda w: functional.rotate(X, D, adapter_index=torch.zeros(2, dtype=torch.int64)),
        ValueError,
        "as adapter_index",
    ),
    (lambda w: functional.rotate(X, D[None], adapter_index=torch.zeros(3, dtype=torch.int64)), ValueError, r"\(2,\)"),
    (lambda w: functional.rotate(X, D[None], adapter_index=torch.zeros(2)), ValueError, "must be an int64 tensor"),
    (lambda w: functional.dequantize_rotate(w, D[:2]), ValueError, "d must rotate 32 features"),
    (lambda w: functional.linear(X[:, :31], D, w), ValueError, r"x must have shape \[..., 32\], got \(2, 31\)"),
    (lambda w: functional.linear(X.int(), D, w), TypeError, "x must be a floating point"),
    (lambda w: functional.linear(X, D, w, torch.zeros(3)), ValueError, r"bias must have shape \(24,\)"),
    (lambda w: functional.linear(X, None, w, adapter_index=torch.zeros(2).long()), ValueError, "index requires d"),
    (lambda w: functional.oft_linear(X, V[:3], w, block_size=8), ValueError, "got 3 blocks of 8"),
    (lambda w: functional.oft_linear(X, V, w, block_size=7), ValueError, "v must have shape"),
    (lambda w: functional.oft_rotate(X[:, :24], V, block_size=8), ValueError, "v must rotate 24 features"),
    (lambda w: functional.oft_rotate(torch.tensor(1.0), V, block_size=8), ValueError, "got a scalar"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_says_what_is_wrong(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(quantized_weight())


@pytest.mark.parametrize("how", ["func", "dual"])
def test_forward_mode_differentiation_is_refused_not_dropped(how):
    x, d = torch.randn(3, 32), torch.randn(4, 8, 8) * 0.05
    weight = QuantizedWeight.from_hqq(hqq_layer(16, 32, optimize=False))

    def push_forward(function):
        if how == "func":
            return torch.func.jvp(function, (x,), (x,))
        with forward_ad.dual_level():
            return function(forward_ad.make_dual(x, x))

    for function in (lambda x: functional.rotate(x, d), lambda x: functional.linear(x, None, weight)):
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp"):
            push_forward(function)
