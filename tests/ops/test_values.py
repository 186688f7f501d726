"""Each operation against the float64 oracle."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from helpers import TOLERANCE, hqq_layer, relative_error

import hqq_oft.ops.table  # noqa: F401  (registers the operators)
from hqq_oft import QuantizedWeight, functional

TERMS = [1, 2, 3, 4, 5, 6, 7, 8, None]
HALF = [torch.float16, torch.bfloat16]


def skew_parameters(blocks, b, dtype=torch.float32, std=0.1):
    return (torch.randn(blocks, b * (b - 1) // 2) * std).to(dtype)


def quantized_weight(out_features=24, in_features=32, **settings):
    settings = {"group_size": 16, **settings}
    return QuantizedWeight.from_hqq(hqq_layer(out_features, in_features, **settings))


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


@pytest.mark.parametrize("terms", [5, None])
def test_dropped_blocks_are_the_identity(terms):
    v = skew_parameters(4, 8)
    keep = torch.tensor([True, False, True, False])
    d = functional.cayley(v, 8, terms, keep=keep)
    assert torch.equal(d[~keep], torch.zeros(2, 8, 8))
    assert torch.equal(d[keep], functional.cayley(v, 8, terms)[keep])
    shared = functional.cayley(v[:1], 8, terms, keep=keep)
    assert shared.shape == (4, 8, 8)
    assert torch.equal(shared[2], functional.cayley(v[:1], 8, terms)[0])
    broken = v.clone()
    broken[1] = float("nan")
    assert torch.isfinite(functional.cayley(broken, 8, terms, keep=keep)).all()


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
    out = functional.linear(x, weight, b, d=d)
    assert (out.dtype, out.shape) == (dtype, (2, 7, 24))
    assert relative_error(out, truth) <= TOLERANCE[dtype]


def test_linear_by_an_index_per_row():
    weight = quantized_weight()
    d = torch.stack([functional.cayley(skew_parameters(4, 8), 8) for _ in range(2)])
    x, index = torch.randn(3, 2, 32), torch.tensor([0, 1, -1, 0, 1, 1])
    out = functional.linear(x, weight, d=d, adapter_index=index).reshape(6, 24)
    for row, adapter in enumerate(index.tolist()):
        single = functional.linear(x.reshape(6, 32)[row : row + 1], weight, d=None if adapter < 0 else d[adapter])
        assert relative_error(out[row : row + 1], single) <= 1e-6


@pytest.mark.parametrize("terms", [5, None])
def test_oft_linear_is_linear_of_cayley(terms):
    weight, v, x = quantized_weight(), skew_parameters(4, 8), torch.randn(5, 32)
    keep = torch.tensor([True, True, False, True])
    fused = functional.oft_linear(x, weight, v=v, block_size=8, terms=terms, keep=keep, max_norm=0.2)
    parts = functional.linear(x, weight, d=functional.cayley(v, 8, terms, keep=keep, max_norm=0.2))
    assert torch.equal(fused, parts)


def test_the_exact_map_is_the_default():
    weight, v, x = quantized_weight(), skew_parameters(4, 8), torch.randn(5, 32)
    exact = functional.cayley(v, 8, None)
    assert torch.equal(functional.cayley(v, 8), exact)
    assert torch.equal(functional.cayley_many([v], 8)[0], exact)
    assert torch.equal(functional.oft_rotate(x, v, block_size=8), functional.rotate(x, exact))
    assert torch.equal(functional.oft_linear(x, weight, v=v, block_size=8), functional.linear(x, weight, d=exact))


@pytest.mark.parametrize("x", [torch.randn(32), torch.randn(0, 32), torch.randn(2, 0, 32), torch.randn(32, 6).T])
def test_any_leading_dimensions_and_strides(x):
    weight, v = quantized_weight(), skew_parameters(4, 8)
    out = functional.oft_linear(x, weight, v=v, block_size=8, terms=5)
    truth = x.double() @ oracle.rotation(v, 8, 32, 5) @ functional.dequantize(weight, torch.float64).T
    assert out.shape == (*x.shape[:-1], 24)
    assert relative_error(out, truth) <= 1e-5
