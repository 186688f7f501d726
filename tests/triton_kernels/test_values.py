"""Each kernel, interpreted, against the reference in float64: values, every layout, every way to run an operation."""

from __future__ import annotations

import math
from dataclasses import replace

import calls
import pytest
import torch
from calls import first_dtype, widened
from helpers import TOLERANCE, hqq_layer, relative_error

from hqq_oft import QuantizedWeight, backend, functional, triton_kernels
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops

BLOCKS = (1, 2, 3, 8, 16, 32, 64, 96, 112, 128, 130)
HALF = (torch.float16, torch.bfloat16)


def skew_parameters(blocks, b, dtype=torch.float32):
    return (torch.randn(blocks, b * (b - 1) // 2) * (0.3 / math.sqrt(b))).to(dtype)


def rotations(blocks, b, dtype=torch.float32):
    return (torch.randn(blocks, b, b) * (0.2 / math.sqrt(b))).to(dtype)


def quantized_weight(n=40, k=96, **settings):
    settings = {"group_size": 32, "optimize": False, **settings}
    return QuantizedWeight.from_hqq(hqq_layer(n, k, **settings))


def check(name, *arguments, tolerance=None):
    """Run an operator on Triton; each result within tolerance of the reference in float64, and no further from it than
    twice the reference in the same dtype."""
    out = getattr(ops, name)(*arguments)
    truth = getattr(reference, name)(*widened(arguments))
    plain = getattr(reference, name)(*arguments)
    for result, expected, ours in zip(*(x if isinstance(x, tuple) else (x,) for x in (out, truth, plain)), strict=True):
        assert result.shape == expected.shape
        assert result.dtype == ours.dtype
        limit = tolerance or TOLERANCE[first_dtype(arguments)]
        error = relative_error(result, expected)
        assert error <= limit
        assert error <= 2 * relative_error(ours, expected) + 1e-6
    return out


# --- Cayley ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", BLOCKS)
@pytest.mark.parametrize("terms", [1, 2, 4, 5, None])
def test_cayley(b, terms):
    v = skew_parameters(2, b)
    check("cayley", v, b, terms, None, None, torch.float32, tolerance=1e-6)
    check("cayley_backward", torch.randn(2, b, b), v, b, terms, None, None)


@pytest.mark.parametrize("b", [3, 32, 96, 130])
@pytest.mark.parametrize("terms", [5, None])
@pytest.mark.parametrize("stored", [3, 1])
def test_cayley_with_dropped_and_bounded_blocks(b, terms, stored):
    v, keep = skew_parameters(stored, b), torch.tensor([True, False, True])
    check("cayley", v, b, terms, keep, 0.2, torch.float32, tolerance=1e-6)
    check("cayley_backward", torch.randn(3, b, b), v, b, terms, keep, 0.2)
    if stored == 3:
        v[1] = float("nan")  # a dropped block may hold anything
        assert torch.isfinite(ops.cayley(v, b, terms, keep, None, torch.float32)).all()


@pytest.mark.parametrize("b", [32, 96])
@pytest.mark.parametrize("dtype", HALF)
def test_cayley_computes_in_float32_and_rounds_once(b, dtype):
    v = skew_parameters(2, b, dtype)
    truth = reference.cayley(v.double(), b, 5, None, None, torch.float64)
    assert relative_error(ops.cayley(v, b, 5, None, None, torch.float32), truth) <= 1e-6
    assert relative_error(ops.cayley(v, b, 5, None, None, dtype), truth) <= 1.02 * relative_error(
        truth.to(dtype), truth
    )


@pytest.mark.parametrize("b", [8, 130])
def test_projecting_is_bit_for_bit_that_of_the_reference(b):
    v = skew_parameters(4, b) * torch.tensor([[0.01], [1.0], [3.0], [0.0]])
    projected = reference.project(v, 0.3)
    expected = ops.cayley(projected, b, 2, None, None, torch.float32)
    assert torch.equal(ops.cayley(v, b, 2, None, 0.3, torch.float32), expected)


# --- Rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b", BLOCKS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_rotate(b, shared, transpose):
    k = b * max(3, 70 // b)
    d, x, grad = rotations(1 if shared else k // b, b), torch.randn(k, 37).T, torch.randn(37, k)
    check("rotate", x, d, None, transpose)
    for need_x, need_d in ((True, True), (False, True), (True, False)):
        check("rotate_backward", grad, x, d, None, transpose, need_x, need_d)


@pytest.mark.parametrize("b", [8, 32, 160])
@pytest.mark.parametrize("dtype", HALF)
def test_rotate_in_half_precision(b, dtype):
    d, x, grad = rotations(2, b, dtype), torch.randn(70, 2 * b).to(dtype), torch.randn(70, 2 * b).to(dtype)
    check("rotate", x, d, None, False)
    check("rotate", x, d.float(), None, True)  # D wider than x
    check("rotate_backward", grad, x, d, None, False, True, True)


@pytest.mark.parametrize("b", [3, 32, 130])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
def test_rotate_by_an_index_per_row(b, shared, transpose):
    d = torch.stack([rotations(1 if shared else 2, b) for _ in range(3)])
    x, grad = torch.randn(21, 2 * b), torch.randn(21, 2 * b)
    index = torch.tensor([-1, 0, 2])[torch.arange(21) % 3]  # no row uses adapter 1
    check("rotate", x, d, index, transpose)
    _, dd = check("rotate_backward", grad, x, d, index, transpose, True, True)
    assert not dd[1].any()


def test_token_splits_cover_every_row_once():
    d, x, grad = rotations(1, 32), torch.randn(1000, 32), torch.randn(1000, 32)
    check("rotate_backward", grad, x, d, None, False, True, True)


def test_memory_after_the_last_block_is_not_read():
    behind = torch.full((8, 8, 8), float("nan"))
    behind[:5] = rotations(5, 8)
    x, grad, weight = torch.randn(9, 40), torch.randn(9, 40), quantized_weight(16, 40, group_size=8)
    check("rotate", x, behind[:5], None, False)
    check("rotate_backward", grad, x, behind[:5], None, False, True, True)
    check("dequantize_rotate", weight, behind[:5], torch.float32)
    check("linear", *calls.linear(x, weight, behind[:5]))


# --- Weights ---------------------------------------------------------------------------------------------------------

LAYOUTS = [
    {"nbits": nbits, "axis": axis, "group_size": group_size, "n": n, "k": k}
    for nbits in (8, 4, 3, 2, 1)
    for axis in (0, 1)
    for n, k, group_size in ((40, 96, 8), (40, 96, 32), (40, 96, None), (24, 128, 64), (20, 96, 64), (32, 72, 96))
    if n * k % ((group_size or 1) * 8) == 0
]


# Besides groups of 64 along the rows: bits, axis and group of weights that are decoded field by field.
FIELDWISE = [(4, 1, 128), (4, 1, 32), (4, 1, None), (2, 1, 8), (4, 0, 64), (8, 0, 64), (1, 0, 16), (2, 0, None)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())))
def test_every_layout(layout):
    try:
        weight = quantized_weight(**layout)
    except ValueError:
        pytest.skip("HQQ cannot pack it")
    k = layout["k"]
    check("dequantize", weight, torch.float32, tolerance=1e-6)
    check("dequantize_rotate", weight, rotations(k // 8, 8), torch.float32)
    x, d, grad = torch.randn(19, k), rotations(k // 8, 8), torch.randn(19, layout["n"])
    check("linear", *calls.linear(x, weight, d, torch.randn(layout["n"])))
    check("linear_backward", *calls.linear_backward(grad, x, weight, d))


@pytest.mark.parametrize("b", [1, 2, 3, 16, 32, 64, 96, 128, 192])
@pytest.mark.parametrize("shared", [False, True])
def test_dequantize_rotate_at_every_block_size(b, shared):
    k = 384
    weight = quantized_weight(16, k, group_size=64)
    check("dequantize_rotate", weight, rotations(1 if shared else k // b, b), torch.float32)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("nbits", [4, 3])
def test_half_precision_weights(dtype, nbits):
    weight = quantized_weight(nbits=nbits, dtype=dtype)
    check("dequantize", weight, dtype, tolerance=TOLERANCE[dtype])
    check(
        "dequantize_rotate",
        weight,
        rotations(12, 8, dtype),
        dtype,
        tolerance=TOLERANCE[dtype],
    )


@pytest.fixture
def launched(monkeypatch):
    """Name and constants of every kernel that is launched."""
    found, interpreted = [], type(triton_kernels.linear.linear_fwd_kernel)
    original = interpreted.run

    def run(self, *args, **constants):
        found.append((self.fn.__name__, constants))
        return original(self, *args, **constants)

    monkeypatch.setattr(interpreted, "run", run)
    return found


def launched_once(launched):
    assert len(launched) == 1
    return launched.pop()


def no_further_than_reference(result, name, *arguments):
    """A kernel that sums in float32 is as close to float64 as the reference in the same dtype, up to chance."""
    truth = getattr(reference, name)(*widened(arguments))
    assert relative_error(result, truth) <= 1.02 * relative_error(getattr(reference, name)(*arguments), truth) + 1e-7


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(("nbits", "axis", "group"), [(8, 1, 64), (4, 1, 64), (2, 1, 64), (1, 1, 64), *FIELDWISE])
def test_bands_are_decoded_field_by_field(dtype, nbits, axis, group, launched):
    weight = quantized_weight(64, 256, nbits=nbits, axis=axis, group_size=group, dtype=dtype)
    out = ops.dequantize(weight, dtype)
    assert launched_once(launched)[0] == "dequantize_bands_kernel"
    assert torch.equal(out, weight.dense(torch.float32).to(dtype))  # one rounding
    for b in (16, 32, 64):
        d = rotations(256 // b, b, dtype)
        out = check("dequantize_rotate", weight, d, dtype)
        no_further_than_reference(out, "dequantize_rotate", weight, d, dtype)
        assert torch.equal(ops.dequantize_rotate(weight, d, dtype), out)
        name, constants = launched.pop()
        assert name == "dequantize_bands_kernel"
        precise = dtype == torch.bfloat16 or (dtype == torch.float16 and nbits >= 4)
        assert constants["EXACT"] == (precise and axis == 1 and (group or 256) >= b)


def test_dropped_and_shared_blocks_in_the_exact_product():
    weight = quantized_weight(64, 256, group_size=64, dtype=torch.bfloat16)
    d = rotations(8, 32, torch.bfloat16)
    d[3] = 0
    out = check("dequantize_rotate", weight, d, torch.bfloat16)
    assert torch.equal(out[:, 96:128], weight.dense(torch.float32)[:, 96:128].to(torch.bfloat16))
    check("dequantize_rotate", weight, d[:1], torch.bfloat16)


@pytest.mark.parametrize(("nbits", "axis", "group"), [(4, 1, 64), (2, 0, 64), (1, 1, 128), (4, 1, 24)])
def test_ranges_of_rows_and_columns(nbits, axis, group):
    """As the products take them into their scratch: band after band, in every dtype of the scratch."""
    weight = quantized_weight(192, 384, nbits=nbits, axis=axis, group_size=group)
    dense, fields = weight.dense(torch.float32), 8 // nbits
    for (first, end), (left, right) in (((3, 17), (0, 384)), ((0, 192 // fields), (128, 300)), ((5, 6), (256, 384))):
        out = torch.full((fields * (end - first), right - left), float("nan"))
        triton_kernels.dequantize.dequantize_into(out, weight, rows=(first, end), columns=(left, right))
        bands = dense.view(fields, 192 // fields, 384)[:, first:end, left:right]
        assert torch.equal(out, bands.reshape(out.shape))


def test_poisoned_padding_does_not_leak():
    """A slice of 22 columns is decoded in a tile of 32, whose last ten are padding: infinite scales here."""
    weight = quantized_weight(8, 88, group_size=8)
    scale = weight.scale.clone().reshape(8, 11)
    scale[:, 3] = float("inf")  # columns 24 to 31
    weight = replace(weight, scale=scale.reshape(-1))
    out = ops.dequantize_rotate(weight, rotations(4, 22), torch.float32)
    assert torch.isfinite(out[:, :22]).all()
    assert not torch.isfinite(out[:, 22:44]).any()


# --- Products --------------------------------------------------------------------------------------------------------

MS = (1, 16, 17, 33, 70, 260)  # each tile of the table, and the scratch


@pytest.mark.parametrize("m", MS)
@pytest.mark.parametrize("b", [8, 32, 48, 96, None])
def test_linear_at_every_m(m, b):
    weight = quantized_weight()
    d = None if b is None else rotations(96 // b, b)
    x, grad = torch.randn(96, m).T, torch.randn(40, m).T
    check("linear", *calls.linear(x, weight, d, torch.randn(40)))
    check("linear_backward", *calls.linear_backward(grad, x, weight, d, need_d=b is not None))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("m", [1, 33, 260])
def test_linear_in_half_precision(dtype, m):
    weight = quantized_weight(nbits=4, dtype=dtype, k=192, group_size=64)
    d, x, grad = rotations(6, 32, dtype), torch.randn(m, 192).to(dtype), torch.randn(m, 40).to(dtype)
    check("linear", *calls.linear(x, weight, d, torch.randn(40).to(dtype)))
    check("linear_backward", *calls.linear_backward(grad, x, weight, d))


# Bits, group and columns of weights whose gradient multiplies exact levels; every group is half of a pair.
PAIRED = [(8, 64, 128), (4, 64, 256), (2, 64, 128), (1, 64, 128), (4, 128, 256), (2, 256, 512)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("nbits", "group", "k"), PAIRED)
def test_the_gradient_multiplies_exact_levels(dtype, nbits, group, k, launched):
    n = 8 // nbits * 70  # a step and a part of one
    weight = quantized_weight(n, k, nbits=nbits, group_size=group, dtype=dtype)
    for m in (3, 40):
        grad = torch.randn(m, n).to(dtype)
        arguments = calls.linear_backward(grad, torch.randn(m, k).to(dtype), weight, need_d=False)
        dx, _ = check("linear_backward", *arguments)
        assert launched_once(launched)[0] == "linear_bwd_bands_kernel"
    truth, plain = reference.linear_backward(*widened(arguments))[0], reference.linear_backward(*arguments)[0]
    assert relative_error(dx, truth) <= 1.05 * relative_error(plain, truth)


@pytest.mark.parametrize("dtype", HALF)
def test_the_gradient_by_exact_levels_splits_its_sums(dtype, launched):
    weight = quantized_weight(1090, 128, group_size=64, dtype=dtype)
    arguments = calls.linear_backward(
        torch.randn(9, 1090).to(dtype), torch.randn(9, 128).to(dtype), weight, need_d=False
    )
    dx, _ = check("linear_backward", *arguments)
    name, constants = launched_once(launched)
    assert name == "linear_bwd_bands_kernel"
    assert constants["SPLITS"] > 1
    assert torch.equal(ops.linear_backward(*arguments)[0], dx)


def test_small_float16_gradients_keep_their_precision():
    """dy * scale would be below the normal numbers of float16."""
    weight = quantized_weight(64, 128, group_size=64, dtype=torch.float16)
    weight = replace(weight, scale=weight.scale / 64)
    grad = (torch.randn(5, 64) / 16).half()
    arguments = calls.linear_backward(grad, torch.randn(5, 128).half(), weight, need_d=False)
    assert float((grad.abs() * weight.scale.max()).max()) < 6e-5
    wide = weight.dense(torch.float64)
    dx, _ = ops.linear_backward(*arguments)
    assert relative_error(dx * 1024.0, (grad.double() @ wide).half() * 1024.0) <= 2e-3


@pytest.mark.parametrize("steps", [4, 9, 33])
def test_split_sums(steps, monkeypatch):
    """K, and N in the backward, in 1 to 8 parts; each part is added once and in the same order."""
    kernel, seen = triton_kernels.linear.linear_fwd_kernel, []
    original = type(kernel).run

    def run(self, *args, **kwargs):
        seen.append(kwargs["SPLITS"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(kernel), "run", run)
    weight = quantized_weight(16, 64 * steps, group_size=64)
    x, bias = torch.randn(5, 64 * steps), torch.randn(16)
    once = check("linear", *calls.linear(x, weight, None, bias))
    assert seen == [{4: 2, 9: 4, 33: 16}[steps]]
    assert torch.equal(ops.linear(*calls.linear(x, weight, None, bias)), once)
    weight = quantized_weight(128 * steps, 32, group_size=32)
    seen.clear()
    check(
        "linear_backward", *calls.linear_backward(torch.randn(5, 128 * steps), torch.randn(5, 32), weight, need_d=False)
    )
    assert max(seen) > 1


@pytest.mark.parametrize("m", [21, 260])
@pytest.mark.parametrize("b", [8, 48])
@pytest.mark.parametrize("shared", [False, True])
def test_linear_by_an_index_per_row(m, b, shared):
    weight = quantized_weight()
    d = torch.stack([rotations(1 if shared else 96 // b, b) for _ in range(3)])
    x, index = torch.randn(m, 96), torch.tensor([-1, 0, 2])[torch.arange(m) % 3]
    check("linear", *calls.linear(x, weight, d, torch.randn(40), index))
    check("linear_backward", *calls.linear_backward(torch.randn(m, 40), x, weight, d, index))


@pytest.mark.parametrize("nbits", [4, 3])
@pytest.mark.parametrize("b", [8, 192])
@pytest.mark.parametrize("kib", [1, 9, 60])
def test_a_scratch_in_chunks(nbits, b, kib, monkeypatch):
    for module in (triton_kernels.linear, triton_kernels.linear_backward):
        monkeypatch.setattr(module, "scratch_bytes", lambda: kib * 1024)
    weight = quantized_weight(nbits=nbits, k=192)
    d, x, bias = rotations(192 // b, b), torch.randn(260, 192), torch.randn(40)
    check("linear", *calls.linear(x, weight, d, bias))
    check("linear_backward", *calls.linear_backward(torch.randn(260, 40), x, weight, d))


def test_empty_batches():
    weight, d, x, grad = quantized_weight(), rotations(12, 8), torch.randn(0, 96), torch.randn(0, 40)
    assert ops.linear(*calls.linear(x, weight, d)).shape == (0, 40)
    dx, dd = ops.linear_backward(*calls.linear_backward(grad, x, weight, d))
    assert dx.shape == (0, 96)
    assert torch.equal(dd, torch.zeros(12, 8, 8))
    assert ops.rotate(x, d, None, False).shape == (0, 96)


def test_the_callers_gradient_is_not_modified():
    weight, d, x = quantized_weight(), rotations(12, 8), torch.randn(5, 96)
    grad, g = torch.randn(5, 40), torch.randn(5, 96)
    before, g_before = grad.clone(), g.clone()
    ops.linear_backward(*calls.linear_backward(grad, x, weight, d))
    ops.rotate_backward(g, x, d, None, False, True, True)
    assert torch.equal(grad, before)
    assert torch.equal(g, g_before)


@pytest.mark.parametrize("block", [8, 96])
def test_stacked_rotations_need_not_be_contiguous(block):
    weight, x = calls.quantized_weight(64, 96, group_size=32), torch.randn(6, 96)
    stacked = torch.randn(2, 96 // block + 1, block, block).mul(0.05)[:, :-1]
    index = torch.tensor([0, 1, -1, 1, 0, 1])
    out = functional.linear(x, weight, d=stacked, adapter_index=index)
    with backend("reference"):
        assert relative_error(out, functional.linear(x, weight, d=stacked, adapter_index=index)) <= 1e-5
