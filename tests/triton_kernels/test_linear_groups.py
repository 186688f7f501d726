"""The product of unscaled levels: values of every format that it serves, and which kernel serves which call."""

from __future__ import annotations

from dataclasses import replace

import calls
import pytest
import torch
from helpers import TOLERANCE, relative_error
from hqq_oft.triton_kernels import _launch, linear, linear_groups

from hqq_oft import QuantizedWeight, backend
from hqq_oft.ops import backends, reference
from hqq_oft.ops import table as ops

HALF = (torch.bfloat16, torch.float16)
GROUPS, GENERAL, ROTATE = "linear_groups_fwd_kernel", "linear_fwd_kernel", "rotate_fwd_kernel"


@pytest.fixture
def launched(monkeypatch):
    """Name and constants of every kernel that is launched."""
    found = []
    original = _launch.Launch.__call__

    def call(self, *args):
        found.append((self._kernel.fn.__name__, self._constants))
        original(self, *args)

    monkeypatch.setattr(_launch.Launch, "__call__", call)
    return found


def rotations(k, b, dtype):
    return (torch.randn(k // b, b, b) * (0.2 / b**0.5)).to(dtype)


def example(m=5, n=64, k=512, b=None, dtype=torch.bfloat16, bias=True, **settings):
    weight = calls.quantized_weight(n, k, dtype=dtype, **{"group_size": 64, **settings})
    d = None if b is None else rotations(k, b, dtype)
    return calls.linear(torch.randn(m, k).to(dtype), weight, d, torch.randn(n).to(dtype) if bias else None)


def check(arguments):
    """As accurate as required, and no further from float64 than the reference in the same dtype."""
    out = ops.linear(*arguments)
    truth = reference.linear(*calls.widened(arguments))
    error = relative_error(out, truth)
    assert error <= TOLERANCE[out.dtype]
    assert error <= 1.02 * relative_error(reference.linear(*arguments), truth)
    assert torch.equal(ops.linear(*arguments), out)
    return out


FORMATS = [(8, 64), (4, 64), (2, 64), (1, 64), (4, 32), (4, 128), (8, 256), (2, 32)]


@pytest.mark.parametrize(("bits", "group"), FORMATS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "b"), [(3, None), (3, 32), (13, 32)])
def test_every_format(bits, group, dtype, m, b, launched):
    check(example(m, b=b, dtype=dtype, bits=bits, group_size=group))
    alone = b is None or bits > 1
    assert [name for name, _ in launched] == ([GROUPS] if alone else [ROTATE, GROUPS]) * 2


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 128), (4, 32)])
def test_many_rows_multiply_scaled_weights(bits, group, dtype, launched):
    for m in (20, 70):
        check(example(m, bits=bits, group_size=group, dtype=dtype))
    assert [(name, constants["SCALED"]) for name, constants in launched] == [(GROUPS, True)] * 4


@pytest.mark.parametrize("m", [5, 16])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("b", [2, 8, 16, 32, 64])
def test_every_block_that_fits_is_rotated_in_the_same_launch(m, b, shared, launched):
    x, weight, d, bias, index = example(m, k=256, b=b)
    check((x, weight, d[:1] if shared else d, bias, index))
    assert {name for name, _ in launched} == {GROUPS}


@pytest.mark.parametrize(("m", "b"), [(5, 128), (5, 256), (20, 32)])
def test_other_rotations_have_a_launch_of_their_own(m, b, launched):
    check(example(m, b=b))
    assert [name for name, _ in launched] == [ROTATE, GROUPS] * 2


@pytest.mark.parametrize("settings", [{}, {"group_size": 8}])
def test_rows_of_several_adapters_are_rotated_first(settings, launched):
    x, weight, d, bias, _ = example(9, b=32, **settings)
    index = torch.tensor([-1, 0, 2])[torch.arange(9) % 3]
    check((x, weight, torch.stack([d, -d, d / 2]), bias, index))
    assert [name for name, _ in launched] == [ROTATE, GENERAL if settings else GROUPS] * 2


def test_a_permuted_tile_multiplies_the_same_columns(monkeypatch, launched):
    monkeypatch.setattr(linear_groups, "has_wgmma", lambda x: True)
    check(example(40, n=256, k=256))
    assert launched[0][1]["PERMUTED"]


@pytest.mark.parametrize(
    "settings",
    [
        {"k": 320},  # an odd number of groups to a row
        {"k": 192, "group_size": 32},  # no whole number of steps
        {"group_size": 8},
        {"group_size": None},
        {"axis": 0},
        {"bits": 3},
        {"bits": 1, "m": 20},
        {"bits": 2, "m": 40},
        {"n": 68, "bits": 1, "group_size": 32},  # bands of no whole rows
        {"dtype": torch.float32},
    ],
)
def test_other_weights_are_served_by_the_general_kernel(settings, launched):
    arguments = example(**{"m": 3, **settings})
    out = ops.linear(*arguments)
    assert relative_error(out, reference.linear(*calls.widened(arguments))) <= TOLERANCE[out.dtype]
    assert [name for name, _ in launched] == [GENERAL]


def test_scales_of_another_dtype_are_served_by_the_general_kernel(launched):
    x, weight, *rest = example()
    weight = replace(weight, scale=weight.scale.float(), zero=weight.zero.float())
    ops.linear(x, weight, *rest)
    assert [name for name, _ in launched] == [GENERAL]


def test_scales_that_begin_within_a_word_are_not_read_as_words(launched):
    x, weight, *rest = example()
    scale = torch.cat([weight.scale[:1], weight.scale])[1:]
    assert scale.data_ptr() % 4
    shifted = QuantizedWeight(weight.packed, scale, *weight.arguments()[2:])
    assert relative_error(ops.linear(x, shifted, *rest), ops.linear(x, weight, *rest)) <= TOLERANCE[x.dtype]
    assert [name for name, _ in launched] == [GENERAL, GROUPS]


@pytest.mark.parametrize("arguments", [{"m": 1, "k": 1024}, {"m": 20, "k": 2048}, {"m": 3, "k": 1024, "axis": 0}])
def test_split_sums_need_no_cleared_memory(arguments, monkeypatch, launched):
    """Tickets hold anything before a launch: what another launch left, or another stamp."""
    module = linear if "axis" in arguments else linear_groups
    arguments, seen = example(**arguments), []
    expected = check(arguments)
    assert launched[-1][1]["SPLITS"] > 1

    def used_before(like, splits, shape, tiles):
        part, stamp = _launch.split_buffers(like, splits, shape, tiles)
        size = splits * shape[0] * shape[1]
        if seen:
            part.copy_(seen[-1][0])
        else:
            part[size:].view(torch.int64).fill_((1 << 40) + 3)
        seen.append((part, size))
        return part, stamp

    monkeypatch.setattr(module, "split_buffers", used_before)
    backends.forget_plans()
    for _ in range(3):
        assert torch.equal(ops.linear(*arguments), expected)
    assert len(seen) == 3
    for part, size in seen:
        assert not part[size:].view(torch.int64).any()


def test_columns_of_x_need_not_be_contiguous():
    x, *rest = example(k=256, b=32)
    with backend("triton"):
        assert torch.equal(ops.linear(x.T.contiguous().T, *rest), ops.linear(x, *rest))
