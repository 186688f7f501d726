"""The native quantizer gives the reference's bytes, whatever the instruction set and the number of threads."""

from __future__ import annotations

import pytest
import torch

from hqq_oft.ops import quantizer, reference
from hqq_oft.ops import table as ops
from hqq_oft.ops.native import cpu

pytestmark = pytest.mark.usefixtures("instruction_set")


def assert_bytes(args):
    expected, found = reference.quantize(*args), ops.quantize(*args)
    for theirs, ours in zip(expected[:3], found[:3], strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(found[3:], expected[3:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("sd", [1e-5, 0.02, 1.0])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("levels", "bits"), [(256, 8), (64, 8), (16, 4), (8, 3), (4, 2), (3, 2), (2, 1)])
def test_bytes(levels, bits, axis, sd):
    """A last block of groups that is not full; groups shorter and longer than what is added at a time."""
    for shape, group in (((72, 192), 64), ((40, 136), 8), ((16, 2080), 520)):
        for dtype in (torch.float32, torch.bfloat16):
            w = (torch.randn(shape) * sd).to(dtype)
            assert_bytes((w, levels, bits, group, axis, bits == 4, 20, torch.bfloat16, None))


@pytest.mark.parametrize("shape", [(72, 192), (64, 256)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("falling", [0, 1, 7, 20])
def test_a_band_stops_by_the_errors_of_the_whole_weight(falling, axis, shape):
    """At the first that does not fall, whatever the band's own are."""
    errors = torch.cat([1 / torch.arange(1, falling + 1.0), torch.ones(20 - falling)]).double()
    args = (torch.randn(shape) * 0.02, 4, 2, 64, axis, False, 20, torch.bfloat16, errors)
    assert_bytes(args)
    assert_bytes((*args[:-1], errors[:, None].expand(-1, 2).contiguous()[:, 0]))  # not contiguous
    assert quantizer.iterations_taken(errors) == min(max(falling, 1) + 1, 20)


def test_errors_do_not_depend_on_the_instruction_set(instruction_set):
    args = (torch.randn(40, 320), 4, 2, 64, 1, False, 20, torch.float32, None)
    found = ops.quantize(*args)
    cpu.use_instruction_set("portable")
    for ours, portable in zip(found, ops.quantize(*args), strict=True):
        assert torch.equal(ours, portable)


def test_any_number_of_threads(threads):
    torch.manual_seed(0)
    args = (torch.randn(256, 512) * 0.02, 16, 4, 64, 1, True, 20, torch.float32, None)
    assert_bytes(args)


def test_weights_that_are_not_contiguous():
    w = (torch.randn(192, 2 * 72) * 0.02).T[::2]
    assert_bytes((w, 16, 4, 64, 1, True, 20, torch.float16, None))


def test_the_first_zero_without_iterations():
    assert_bytes((torch.randn(64, 128), 16, 4, 64, 1, True, 0, torch.float32, None))
