"""Rotations of bfloat16 rows and weights, and the gradient of D: blocks of whole vectors have kernels of their own."""

from __future__ import annotations

import pytest
import torch
from gpu.cases import check, operations, run, run_reference

BF16 = torch.bfloat16
NAMES = ("rotate", "rotate_backward", "dequantize_rotate", "linear_backward")

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.mark.parametrize("b", [8, 16, 24, 32, 48, 96, 256])
@pytest.mark.parametrize("settings", [{}, {"stored": 1}, {"transpose": True}, {"adapters": 3}], ids=str)
def test_every_block_and_number_of_rows(b, settings):
    """Single rows, whole and short tiles; blocks in one step and in several; several slices, the last short."""
    k = b * max(3, 288 // b)
    for m in (1, 2, 7, 8, 33, 70):
        cases = operations(m, 24, k, b, "cpu", BF16, group=k, **settings)
        for name in NAMES:
            check(name, cases[name], BF16, on="native")


def test_rows_in_several_chunks():
    cases = operations(1100, 16, 64, 32, "cpu", BF16)
    for name in NAMES:
        check(name, cases[name], BF16, on="native")


@pytest.mark.parametrize("b", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("stored", [None, 1])
def test_products_rotate_as_they_rearrange_their_rows(b, stored):
    """Chunks of columns that are short, vectors of rows that are, and more rows than a task takes."""
    for m in (9, 33, 150):
        args = operations(m, 16, 320 if b <= 64 else 512, b, "cpu", BF16, stored=stored)["linear"]
        check("linear", args, BF16, on="native")


@pytest.mark.parametrize("b", [16, 32, 64])
def test_rows_that_are_not_adjacent(b):
    def window(rows):
        wide = torch.full((rows.shape[0], rows.shape[1] + 40), float("nan"), dtype=BF16)
        wide[:, 8:-32] = rows
        return wide[:, 8:-32]

    for adapters in (0, 3):
        cases = operations(45, 16, 192, b, "cpu", BF16, adapters=adapters)
        x, *rotation = cases["rotate"]
        g, x, *gradient = cases["rotate_backward"]
        check("rotate", (window(x), *rotation), BF16, on="native")
        check("rotate_backward", (window(g), window(x), *gradient), BF16, on="native")


@pytest.mark.parametrize("b", [16, 32, 96])
def test_repeated_calls_are_bitwise_equal_for_any_scratch(b, threads):
    """Scratch holds what the calls before left in it, NaN here; rows past a call's last one must not be summed."""
    cases = operations(21, 16, 6 * b, b, "cpu", BF16)
    d = cases["rotate"][1]
    first = [run(name, cases[name], on="native") for name in NAMES]
    for _ in range(2):
        nan = torch.full((64, 6 * b), float("nan"), dtype=BF16)
        run("rotate_backward", (nan, nan, d, None, False, True, True), on="native")
        again = [run(name, cases[name], on="native") for name in NAMES]
        for one, two in zip(first, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
            assert not any(a.isnan().any() for a in one)


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_layout_of_the_weight(bits, axis):
    args = operations(1, 48, 192, 32, "cpu", BF16, bits=bits, axis=axis)["dequantize_rotate"]
    check("dequantize_rotate", args, BF16, on="native")


@pytest.mark.parametrize("b", [8, 32, 48, 96])
@pytest.mark.parametrize("indexed", [False, True])
def test_both_gradients_in_place(b, indexed):
    """dx overwrites g: no block and no step of a block may read what another has overwritten."""
    g, x = torch.randn(2, 70, 2 * b).to(BF16)
    d = (torch.randn(*([3] if indexed else []), 2, b, b) * 0.1).to(BF16)
    index = torch.arange(70) % 4 - 1 if indexed else None
    expected = run("rotate_backward", (g, x, d, index, False, True, True), on="native")
    dd = torch.ops.hqq_oft_native.rotate_backward_in_place(g, x, d, index)
    for actual, wanted in zip((g, dd), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_mixed_dtypes_fall_back_to_float32():
    x, d = torch.randn(9, 64), torch.randn(2, 32, 32) * 0.1
    for rows, blocks in ((x.to(BF16), d), (x, d.to(BF16)), (x.half(), d.to(BF16)), (x.to(BF16), d.half())):
        (out,), (expected,) = (
            run("rotate", (rows, blocks, None, False), on="native"),
            run_reference("rotate", (rows.double(), blocks.double(), None, False)),
        )
        assert out.dtype == rows.dtype
        assert (out - expected).norm() / expected.norm() <= {torch.float32: 1e-6, torch.half: 1e-3}.get(out.dtype, 4e-3)


def test_nan_affects_only_its_own_row():
    d = (torch.randn(6, 32, 32) * 0.1).to(BF16)
    for m in (3, 20):
        x = torch.randn(m, 192).to(BF16)
        bad = x.clone()
        bad[1, 40] = float("nan")
        (out,), (expected,) = (run("rotate", (each, d, None, False), on="native") for each in (bad, x))
        others = [row for row in range(m) if row != 1]
        assert torch.equal(out[others], expected[others])
        assert out[1, 32:64].isnan().all()
        assert torch.equal(out[1, :32], expected[1, :32])
