"""The CUDA decode kernel, emulated thread by thread, against the reference in float64: every layout that it serves."""

from __future__ import annotations

from dataclasses import replace

import calls
import pytest
import torch
from calls import widened
from gpu.cases import operations
from helpers import TOLERANCE, relative_error

from hqq_oft.ops import reference

from . import emulation

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="needs a C++ compiler")

HALF = (torch.bfloat16, torch.float16)


def check(args, dtype, **how):
    """Each emulated run within the dtype's tolerance of float64, and no further from it than twice the reference; all
    runs the same, bit for bit."""
    runs = emulation.linear(*args, **how)
    truth, own = reference.linear(*widened(args)), reference.linear(*args)
    error, own_error = relative_error(runs[0], truth), relative_error(own, truth)
    assert error <= TOLERANCE[dtype]
    assert error <= 2 * own_error + 2e-5
    for run in runs[1:]:
        assert torch.equal(run, runs[0])


def arguments(m, n, k, b, dtype, **settings):
    return operations(m, n, k, b, "cpu", dtype, **settings)["linear"]


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("group", [32, 64, 96, 128, 192, 384])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_packing(bits, group, dtype):
    n = 40 if bits == 3 else 72
    for cut in ((8, 100), (8, 1), (8, 2)):
        check(arguments(3, n, 384, 32, dtype, bits=bits, group=group), dtype, cut=cut)


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_number_of_tokens(m, bits, dtype):
    if bits == 3 and m > 8:
        pytest.skip("3 bits are served to 8 tokens")
    check(arguments(m, 160, 256, 32, dtype, bits=bits), dtype, cut=(8, 1))


@pytest.mark.parametrize("b", [16, 32, 64, 96, 128, 256, 768])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("chained", [False, True], ids=["fused", "chained"])
def test_every_block_size(b, shared, chained):
    for m in (1, 16):
        args = arguments(m, 64, 768, b, torch.bfloat16, stored=1 if shared else None)
        check(args, torch.bfloat16, cut=(8, 2), chained=chained)


@pytest.mark.parametrize("chained", [False, True], ids=["fused", "chained"])
@pytest.mark.parametrize("stored", [None, 1], ids=["own", "shared"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_an_adapter_for_each_row(dtype, stored, chained):
    for m, adapters in ((1, 2), (7, 2), (16, 5)):
        args = arguments(m, 64, 192, 48, dtype, adapters=adapters, stored=stored)
        check(args, dtype, cut=(8, 1), chained=chained)


@pytest.mark.parametrize("chained", [False, True], ids=["fused", "chained"])
def test_an_index_that_is_no_adapter_reads_no_rotation(chained):
    x, weight, d, bias, _ = arguments(5, 64, 192, 48, torch.bfloat16, adapters=2)
    index = torch.tensor([0, 2, 1, 2**40, -5])  # the reference leaves such rows as they are
    check((x, weight, d, bias, index), torch.bfloat16, cut=(8, 1), chained=chained)


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize(("n", "k", "group"), [(400, 32, 32), (1120, 96, 32), (720, 160, 160), (40, 1120, 32)], ids=str)
def test_rows_and_columns_that_fill_no_tile(bits, n, k, group):
    args = arguments(5, n, k, 16, torch.bfloat16, bits=bits, group=group)
    check(args, torch.bfloat16, cut=(8, 1))
    check(args, torch.bfloat16, cut=(16, 3))


def test_slices_that_begin_inside_a_group():
    check(arguments(2, 64, 1056, 32, torch.bfloat16, group=96), torch.bfloat16, cut=(8, 2))


def test_an_odd_number_of_groups():
    args = arguments(2, 71, 96, 32, torch.bfloat16, bits=8, group=96)
    check(args, torch.bfloat16)


@pytest.mark.parametrize("cut", [(8, 1), (8, 2), (8, 3), (8, 5), (16, 1), (16, 7), (24, 4), (64, 12)], ids=str)
@pytest.mark.parametrize("bits", [4, 3])
def test_every_tiling(bits, cut):
    """Bands of one tile and of several for each warp, slices of one stage and of all, the last ones shorter."""
    args = arguments(2, 1200, 832, 32, torch.bfloat16, bits=bits)
    check(args, torch.bfloat16, cut=cut, repeats=3)


@pytest.mark.parametrize("warps", [1, 2, 4])
def test_blocks_of_fewer_warps(warps):
    args = arguments(2, 400, 384, 32, torch.bfloat16)
    check(args, torch.bfloat16, cut=(warps, 1), warps=warps)
    check(args, torch.bfloat16, cut=(3 * warps, 2), warps=warps)


def test_without_rotation_and_bias():
    x, weight, *_ = arguments(4, 64, 192, 32, torch.float16)
    check(calls.linear(x, weight), torch.float16)


def test_rows_of_x_with_a_stride():
    x, *others = arguments(4, 64, 192, 32, torch.float16)
    x = torch.nn.functional.pad(x, (0, 24))[:, :192]
    check(calls.linear(x, *others), torch.float16)


def test_the_default_plan():
    for m in (1, 16):
        check(arguments(m, 1024, 512, 32, torch.bfloat16), torch.bfloat16)


def test_zeros_are_exact():
    """Levels equal to their zero contribute exactly 0 for any x and scale."""
    x, weight, d, _, _ = arguments(2, 64, 128, 32, torch.bfloat16)
    weight = replace(weight, packed=torch.full_like(weight.packed, 0x77), zero=torch.full_like(weight.zero, 7.0))
    assert not emulation.linear(*calls.linear(x, weight, d)).any()
