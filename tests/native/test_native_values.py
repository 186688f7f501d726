"""Compiled kernels against float64: every layout, block size, dtype, number of rows, instruction set."""

from __future__ import annotations

import math
from dataclasses import replace

import calls
import oracle
import pytest
import torch
from gpu import cases
from gpu.cases import operations, quantized_weight, relative_error, skew_parameters

from hqq_oft.ops import native as _native
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCKS = (1, 2, 3, 8, 16, 24, 31, 32, 48, 96, 256)
# out-features, in-features, group size: whole bands and rows; whole vectors; groups across rows; bands across rows;
# groups of eight; of whole rows.
SHAPES = [(40, 96, 32), (64, 256, 64), (24, 320, 128), (32, 72, 96), (20, 96, 64), (44, 24, 8), (48, 80, 80)]


def check(name, args, dtype=torch.float32):
    cases.check(name, args, dtype, on="native")


def layout(n, k, group, bits, axis, **settings):
    """A random weight of the layout, or a skipped test where HQQ cannot pack it."""
    try:
        return quantized_weight(n, k, "cpu", bits=bits, group=group, axis=axis, **settings)
    except ValueError:
        pytest.skip("HQQ cannot pack it")


def rotations(*shape, dtype=torch.float32):
    return (torch.randn(shape) * (0.2 / math.sqrt(shape[-1]))).to(dtype)


def dense_rotation(d, k):
    """blockdiag(I + D) in float64."""
    blocks = d.double() + torch.eye(d.shape[-1], dtype=torch.float64)
    return torch.block_diag(*(blocks if len(blocks) > 1 else blocks.repeat(k // d.shape[-1], 1, 1)))


# --- Layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_layout_against_the_oracle(shape, bits, axis):
    n, k, group = shape
    for dtype in DTYPES:
        weight = layout(n, k, group, bits, axis, dtype=dtype)
        truth = oracle.weight(weight.packed, weight.scale, weight.zero, (n, k), bits, group, axis)
        exact = (weight, torch.float32)
        assert torch.equal(ops.dequantize(*exact), reference.dequantize(*exact))
        assert relative_error(ops.dequantize(weight, dtype), truth) <= cases.TOLERANCE[dtype]
        d, bias = rotations(k // 8, 8, 8, dtype=dtype), torch.randn(n).to(dtype)
        r = dense_rotation(d, k)
        assert relative_error(ops.dequantize_rotate(weight, d, dtype), truth @ r.T) <= cases.TOLERANCE[dtype]
        for m in (3, 18):
            x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
            expected = x.double() @ r @ truth.T + bias.double()
            assert relative_error(ops.linear(*calls.linear(x, weight, d, bias)), expected) <= cases.TOLERANCE[dtype]
            dx, dd = ops.linear_backward(*calls.linear_backward(dy, x, weight, d))
            g = dy.double() @ truth
            expected_dd = torch.einsum("mbi,mbj->bij", x.double().view(m, -1, 8), g.view(m, -1, 8))
            assert relative_error(dx, g @ r.T) <= cases.TOLERANCE[dtype]
            assert relative_error(dd, expected_dd) <= cases.TOLERANCE[dtype]


@pytest.mark.usefixtures("instruction_set", "threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 7, 16, 17, 100])
def test_every_operation_at_every_m(m, dtype):
    for bits, axis, b, settings in (
        (4, 1, 32, {}),
        (4, 0, 16, {}),
        (2, 1, 64, {"stored": 1}),
        (1, 1, 128, {"terms": None}),
        (8, 1, 4, {"adapters": 3}),
        (3, 0, 32, {"adapters": 2, "stored": 1, "transpose": True}),
    ):
        for name, args in operations(m, 64, 256, b, "cpu", dtype, bits=bits, axis=axis, **settings).items():
            check(name, args, dtype)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("b", BLOCKS)
@pytest.mark.parametrize("stored", [None, 1])
def test_every_block_size(b, stored):
    k = b * max(2, 96 // b)
    for m in (5, 40):
        for name, args in operations(m, 24, k, b, "cpu", torch.float32, group=k, stored=stored).items():
            check(name, args)


@pytest.mark.usefixtures("instruction_set")
def test_more_rows_than_outputs_and_several_chunks_of_rows():
    """Rotates W instead of x, and distributes the rows among tasks."""
    for name, args in operations(1100, 64, 96, 24, "cpu", torch.float32, group=32).items():
        check(name, args)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_with_long_rows(dtype):
    """Rows of several slices, the last one short, of the products in float32."""
    for m in (1, 6, 16):
        args = operations(m, 32, 4160, 32, "cpu", dtype, group=64)["linear"]
        check("linear", args, dtype)


@pytest.mark.usefixtures("instruction_set")
def test_scale_and_zero_of_other_dtypes():
    weight = quantized_weight(64, 128, "cpu")
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    scale, zero = weight.scale, weight.zero
    for s, z in ((scale.float(), zero.float()), (scale.half(), zero), (scale[:1].expand(128), zero[:1].expand(128))):
        other = replace(weight, scale=s, zero=z)
        check("linear", calls.linear(x, other), torch.bfloat16)
        check("dequantize", (other, torch.float32))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("b", [8, 96])
def test_a_scratch_in_chunks(bits, b, monkeypatch):
    for size in (1, 9000, 40000):
        monkeypatch.setattr(_native.cpu, "_CHUNK_BYTES", size)
        for m in (30, 200):
            cases_of = operations(m, 80, 192, b, "cpu", torch.float32, bits=bits)
            for name in ("linear", "linear_backward"):
                check(name, cases_of[name])


# --- Strides, and what lies around -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("m", [6, 33])
def test_strided_inputs(m):
    def strided(t):
        """The same values as a transposed view, with rows apart, and with columns apart."""
        rows = torch.full((t.shape[0], t.shape[1] + 3), float("nan"))
        rows[:, 1:-2] = t
        columns = torch.full((t.shape[0], 2 * t.shape[1]), float("nan"))
        columns[:, ::2] = t
        return t.t().contiguous().t(), rows[:, 1:-2], columns[:, ::2]

    weight = quantized_weight(40, 96, "cpu", group=32, dtype=torch.float32)
    x, g, dy = torch.randn(m, 96), torch.randn(m, 96), torch.randn(m, 40)
    blocks = rotations(12, 8, 8)
    d = blocks.mT.contiguous().mT
    bias = torch.randn(80)[::2]
    for x_view, g_view, dy_view in zip(strided(x), strided(g), strided(dy), strict=True):
        check("rotate", (x_view, d, None, True))
        check("rotate_backward", (g_view, x_view, d, None, False, True, True))
        check("linear", calls.linear(x_view, weight, d, bias))
        check("linear_backward", calls.linear_backward(dy_view, x_view, weight, d))
    v = skew_parameters(12, 8, "cpu").t().contiguous().t()
    check("cayley", (v, 8, 5, torch.tensor([True, False] * 12)[::2], None, torch.float32))
    check("cayley_backward", (d, v, 8, 5, None, None))


@pytest.mark.usefixtures("instruction_set")
def test_only_the_window_is_written():
    """Windows of the weight into the middle of a larger tensor, at the edges of bands and groups."""
    weight = quantized_weight(40, 96, "cpu", group=32, dtype=torch.float32)
    dense = reference.dequantize(weight, torch.float32)
    d = rotations(12, 8, 8)
    rotated = reference.dequantize_rotate(weight, d, torch.float32)
    for first_row, rows, first_column, columns in ((0, 40, 0, 96), (19, 3, 8, 40), (0, 1, 88, 8), (39, 1, 0, 96)):
        for blocks, whole in ((None, dense), (d, rotated)):
            around = torch.full((rows + 2, columns + 5), -7.0)
            inside = around[1:-1, 2:-3]
            torch.ops.hqq_oft_native.dequantize_into(inside, *weight.arguments(), blocks, first_row, first_column)
            expected = whole[first_row : first_row + rows, first_column : first_column + columns]
            assert relative_error(inside, expected) <= 1e-6
            inside.fill_(-7.0)
            assert bool((around == -7.0).all())


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batches(dtype):
    args = operations(0, 40, 96, 8, "cpu", dtype, group=32)
    assert cases.run("linear", args["linear"], "native")[0].shape == (0, 40)
    assert cases.run("rotate", args["rotate"], "native")[0].shape == (0, 96)
    dx, dd = cases.run("linear_backward", args["linear_backward"], "native")
    assert dx.shape == (0, 96)
    assert torch.equal(dd, torch.zeros(12, 8, 8))


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("m", [5, 40])
def test_gradients_that_are_not_needed_are_not_computed(m):
    x, weight, d, _, _ = operations(m, 40, 96, 8, "cpu", torch.float32, group=32)["linear"]
    dy = torch.randn(m, 40)
    # x is not read, so dy is passed in its place
    dx, dd = ops.linear_backward(*calls.linear_backward(dy, dy, weight, d, need_d=False))
    assert dx.shape == (m, 96)
    assert dd.numel() == 0
    dx, dd = ops.linear_backward(*calls.linear_backward(dy, x, weight, d, need_x=False))
    assert dx.numel() == 0
    assert dd.shape == d.shape
    check("linear_backward", calls.linear_backward(dy, x, weight, need_d=False))


def test_the_callers_tensors_are_not_modified():
    args = operations(40, 40, 96, 8, "cpu", torch.bfloat16, group=32)
    for name in ("rotate", "rotate_backward", "linear", "linear_backward", "cayley_backward"):
        before = [t.clone() if isinstance(t, torch.Tensor) else t for t in calls.parts(args[name])]
        cases.run(name, args[name], "native")
        for now, then in zip(calls.parts(args[name]), before, strict=True):
            assert not isinstance(now, torch.Tensor) or torch.equal(now, then)


# --- Numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("instruction_set")
def test_every_16_bit_number_survives_and_rounding_is_to_nearest_even():
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    nothing = torch.zeros(1, 1, 1)
    for dtype in (torch.float16, torch.bfloat16):
        x = patterns.view(dtype)
        x = x[x.isfinite() & (x.float().abs() > 1.2e-38)]  # bfloat16's denormals may be flushed to zero
        x = x[: len(x) // 32 * 32 - 5][None]
        assert torch.equal(ops.rotate(x, nothing, None, False), x)
        # halfway to the next number and beside it, by a rotation that adds 2^-9, 2^-12 of the number or a little more
        for step in (2.0**-9, 2.0**-12, 2.0**-9 * 1.01, 2.0**-12 * 1.01, 2.0**-12 * 0.99):
            d = torch.full((1, 1, 1), step)
            assert torch.equal(ops.rotate(x, d, None, False), reference.rotate(x, d, None, False))
        special = torch.tensor([[float("nan"), float("inf"), -float("inf")] * 11], dtype=dtype)
        assert torch.equal(ops.rotate(special, nothing, None, False).isnan(), torch.ones_like(special).bool())


@pytest.mark.usefixtures("instruction_set")
def test_nan_affects_only_its_own_rows_and_outputs():
    x, weight, *rest = operations(5, 64, 256, 32, "cpu", torch.bfloat16)["linear"]
    x, scale = x.clone(), weight.scale.clone()
    x[2, 7] = float("nan")
    scale[4 * 9 + 1] = float("nan")  # output 9
    y = ops.linear(x, replace(weight, scale=scale), *rest)
    bad = torch.zeros(5, 64, dtype=torch.bool)
    bad[2] = bad[:, 9] = True
    assert torch.equal(y.isnan(), bad)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("b", [1, 2, 3, 8, 32, 96, 130])
@pytest.mark.parametrize("terms", [1, 2, 3, 5, 8, None])
def test_cayley(b, terms):
    for dtype in DTYPES:
        v, keep = skew_parameters(3, b, "cpu", dtype), torch.tensor([True, False, True])
        grad = torch.randn(3, b, b)
        for stored, kept, max_norm in ((3, None, None), (3, keep, 0.2), (1, keep, None), (1, keep, 0.2)):
            check("cayley", (v[:stored], b, terms, kept, max_norm, torch.float32))
            check("cayley", (v[:stored], b, terms, kept, max_norm, dtype), dtype)
            count = stored if kept is None else 3
            check("cayley_backward", (grad[:count], v[:stored], b, terms, kept, max_norm), dtype)


def test_a_dropped_block_may_hold_anything():
    v, keep = skew_parameters(3, 8, "cpu"), torch.tensor([True, False, True])
    v[1] = float("nan")
    assert torch.isfinite(ops.cayley(v, 8, 5, keep, None, torch.float32)).all()
    assert torch.isfinite(ops.cayley_backward(torch.randn(3, 8, 8), v, 8, 5, keep, None)).all()


def test_large_skew_blocks_have_an_exact_map():
    """I + Q needs no pivoting, however large Q is."""
    v = torch.randn(2, 64 * 63 // 2) * 10
    check("cayley", (v, 64, None, None, None, torch.float32))
    truth = torch.stack([oracle.block(row, 64, None) for row in v]) - torch.eye(64)
    assert relative_error(ops.cayley(v, 64, None, None, None, torch.float32), truth) <= 1e-5


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("settings", [{}, {"stored": 1}, {"adapters": 3}], ids=str)
def test_results_are_bitwise_equal_for_every_number_of_threads(settings):
    args = operations(1100, 128, 512, 32, "cpu", torch.bfloat16, **settings)
    x, weight, _, bias, _ = args["linear"]
    few = {"linear": calls.linear(x[:9], weight, None, bias)}
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([cases.run(name, each[name], "native") for each in (args, few) for name in each
                        if each is few or not name.startswith("linear")])  # fmt: skip
    torch.set_num_threads(1)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
