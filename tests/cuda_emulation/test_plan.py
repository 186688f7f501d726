"""Tiling of products: covers each output and column once, fits in shared memory, and uses every multiprocessor."""

from __future__ import annotations

import itertools

import pytest

from . import emulation
from .emulation import A100, H200, L4, Problem, planned

pytestmark = pytest.mark.skipif(emulation.COMPILER is None, reason="needs a C++ compiler")

DEVICES = {"a100": A100, "l4": L4, "h200": H200}
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (80, 32), (8, 96), (151936, 896)]
FIELDS = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
TILE_ROWS, WARPS = 16, 8


def problems():
    for (n, k), bits, m, b in itertools.product(SHAPES, FIELDS, (1, 8, 16), (0, 32, 128)):
        for group in (32, 64, 128, k):
            served = k % group == 0 and group % 32 == 0 and k % max(b, 1) == 0 and not (bits == 3 and m > 8)
            if served and n % FIELDS[bits] == 0:
                yield Problem(m, n, k, bits, group, b, 1)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_plans_cover_the_product_within_shared_memory(device):
    for problem in problems():
        result = planned(problem, device)
        plan = result.plan
        rows = problem.out_features // FIELDS[problem.bits]
        assert (plan.tiles - 1) * TILE_ROWS < rows <= plan.tiles * TILE_ROWS
        assert (plan.bands - 1) * plan.band_tiles < plan.tiles <= plan.bands * plan.band_tiles
        assert (plan.splits - 1) * plan.slice < problem.in_features <= plan.splits * plan.slice
        assert plan.slice % (64 if problem.bits == 3 else 128) == 0
        assert plan.span == (64 if problem.group_size % 64 == 0 else 32)
        assert plan.token_tiles == -(-problem.tokens // 8)
        assert result.shared_bytes <= device.shared_per_block
        assert plan.resident * (result.shared_bytes + 1024) <= device.shared_per_multiprocessor
        assert result.shared_bytes % 4 == 0
        assert plan.splits < 2**16  # a ticket counts to that
        split = plan.splits > 1
        assert result.tickets == split * plan.tiles
        sums = plan.tiles * TILE_ROWS * FIELDS[problem.bits] * problem.tokens
        assert result.partial_elements == split * plan.splits * sums


@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)], ids=str)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_large_products_use_all_multiprocessors(device, shape, m):
    """Load balance: the mean work per multiprocessor is at least 70% of the maximum."""
    n, k = shape
    plan = planned(Problem(m, n, k, 4, 64, 32, 1), device).plan
    waves = -(-plan.bands * plan.splits // (plan.resident * device.multiprocessors))
    of_the_busiest = waves * plan.band_tiles * plan.slice
    share = plan.tiles * k / (plan.resident * device.multiprocessors)
    assert share / of_the_busiest >= 0.7


@pytest.mark.parametrize("shape", [(14336, 4096), (28672, 8192)], ids=str)
def test_traffic_other_than_the_weight_is_small(shape):
    """Bytes of D and of partial sums through the L2 cache, relative to the bytes of the weight read from memory."""
    n, k = shape
    for m, limit in ((1, 0.15), (16, 0.7)):
        result = planned(Problem(m, n, k, 4, 64, 32, 1), H200)
        d = 2 * k * 32 * (1 if result.plan.chained else result.plan.bands)
        assert d + 2 * 4 * result.partial_elements <= limit * n * k * 0.5625


def test_large_rotations_are_chained():
    def chained(b):
        return planned(Problem(1, 14336, 14336, 4, 64, b, 1), H200).plan.chained

    assert not chained(0)
    assert chained(256)


def test_an_adapter_for_each_row_counts_as_more_of_d():
    def chained(adapters):
        return planned(Problem(16, 4096, 4096, 4, 64, 32, adapters), H200).plan.chained

    assert not chained(1)
    assert chained(16)


@pytest.mark.parametrize(("bits", "span"), [(8, 64), (8, 32), (3, 64)])
def test_levels_are_read_without_bank_conflicts(bits, span):
    assert emulation.library().level_conflicts(bits, span) == 1
