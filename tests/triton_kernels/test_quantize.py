"""The interpreted quantizer gives the bytes of the reference, whose sums it adds in the same order."""

from __future__ import annotations

import pytest
import torch
from helpers import hqq_layer, oft_layer, packed_bytes
from hqq.core.quantize import BaseQuantizeConfig
from hqq_oft.triton_kernels import quantize

from hqq_oft import BackendError, backend, triton_kernels
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops
from hqq_oft.quant import bands, quantizer

PROGRAM = 128  # groups of an interpreted program
STOPS_EARLY = 54  # a seed, found by trying


def weight(groups, group, axis, sd, dtype=torch.float32):
    """Groups of normal weights; the first are zero, constant, almost constant, and with an outlier."""
    w = torch.randn(groups, group) * sd
    w[0], w[1], w[2], w[3, 0] = 0, 0.5, 1e-5 * torch.randn(group), 20 * sd
    return (w if axis == 1 else w.T.contiguous()).to(dtype)


def arguments(w, bits, group, axis, levels=None, iterations=20, dtype=torch.bfloat16, errors=None):
    return w, levels or 2**bits, bits, group, axis, bits == 4, iterations, dtype, errors


def assert_bytes(args):
    expected, found = reference.quantize(*args), ops.quantize(*args)
    for theirs, ours in zip(expected[:3], found[:3], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(found[3:], expected[3:], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("sd", "dtype", "iterations"),
    [(1e-5, torch.float16, 20), (0.02, torch.float32, 20), (0.02, torch.bfloat16, 2), (1.0, torch.bfloat16, 4)],
    ids=str,
)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("levels", "bits"), [(256, 8), (64, 8), (32, 8), (16, 4), (8, 3), (4, 2), (3, 2), (2, 1)])
def test_bytes(levels, bits, axis, sd, dtype, iterations):
    w = weight(24, 24, axis, sd, dtype)
    assert_bytes(arguments(w, bits, 24, axis, levels, iterations))


@pytest.mark.parametrize(("axis", "group"), [(1, g) for g in (4, 12, 64, 100, 128, 200, 544)] + [(0, 128), (0, 300)])
def test_groups_of_any_length(axis, group):
    """Lanes, vectors, runs and tails of a sum; in registers and streamed. Two iterations never stop early."""
    for sd, iterations in ((0.02, 2), (1.0, 1)):
        w = weight(32, group, axis, sd)  # PyTorch adds the last of fewer columns in another order
        assert_bytes(arguments(w, 4, group, axis, iterations=iterations, dtype=torch.float32))


def test_sums_of_runs_of_runs():
    assert_bytes(arguments(weight(32, 4128, 0, 0.02), 4, 4128, 0, iterations=1, dtype=torch.float32))


@pytest.mark.parametrize("axis", [0, 1])
def test_several_programs_of_which_one_shrinks_residuals(axis):
    """The last is not full. The solver stops by the error of them all."""
    w = weight(2 * PROGRAM + 8, 16, 1, 0.02)
    w[4:PROGRAM] *= 50
    assert_bytes(arguments(w if axis == 1 else w.T.contiguous(), 4, 16, axis, iterations=8))


@pytest.mark.parametrize("iterations", [0, 1, 3, 20])
def test_at_most_as_many_iterations(iterations):
    assert_bytes(arguments(weight(16, 16, 1, 0.02), 2, 16, 1, iterations=iterations))


def test_the_solver_stops_where_the_error_of_the_whole_weight_does_not_fall():
    """Its error rises before its zeros stay the same."""
    torch.manual_seed(STOPS_EARLY)
    args = arguments(weight(8, 16, 1, 0.02), 2, 16, 1, dtype=torch.float32)
    stopped = reference.quantize(*args)[2]
    late = solved_without_a_stop(args[0])
    assert not torch.equal(stopped, late)
    assert_bytes(args)


@pytest.mark.parametrize("falling", [0, 1, 7, 20])
def test_a_band_stops_by_the_errors_of_the_whole_weight(falling):
    errors = torch.cat([1 / torch.arange(1, falling + 1.0), torch.ones(20 - falling)]).double()
    assert_bytes(arguments(weight(24, 16, 1, 0.02), 2, 16, 1, errors=errors))
    apart = errors[:, None].expand(-1, 2).contiguous()[:, 0]
    assert_bytes(arguments(weight(24, 16, 0, 0.02), 2, 16, 0, errors=apart))


def solved_without_a_stop(w):
    """The zeros after 20 iterations at 2 bits."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    scale = torch.where(high - low <= 1e-4, 1.0, 3 / (high - low)).clamp(max=2e4)
    zero = -low * scale
    for _ in range(20):
        q = (w * scale + zero).round_().clamp_(0, 3)
        zero = (q - w * scale).mean(1, keepdim=True)
    return zero


def test_levels_in_words_that_are_not_full():
    for axis in (0, 1):
        assert_bytes(arguments(weight(24, 16, axis, 0.02), 3, 16, axis, iterations=3))


def test_weights_that_are_not_contiguous():
    assert_bytes(arguments(weight(64, 16, 1, 0.02).T[::2], 4, 16, 1))


@pytest.mark.parametrize("axis", [0, 1])
def test_repeats_give_the_same_bits(axis):
    args = arguments(weight(2 * PROGRAM, 16, axis, 0.02), 4, 16, axis)
    for first, second in zip(ops.quantize(*args), ops.quantize(*args), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_give_an_error_that_is_not(value):
    for axis in (0, 1):
        w = weight(8, 16, axis, 0.02)
        w.view(-1)[100] = value
        assert not torch.isfinite(ops.quantize(*arguments(w, 4, 16, axis, iterations=2))[3]).all()


def test_what_is_not_supported_is_refused_with_the_reason():
    with pytest.raises(BackendError, match="takes groups of at most 524288 weights, got 1048576"):
        ops.quantize(*arguments(torch.ones(2, 2**20), 4, 2**20, 1))
    with pytest.raises(BackendError, match=r"stores float32, float16 or bfloat16 scales, not torch\.float64"):
        ops.quantize(*arguments(torch.ones(2, 16), 4, 16, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="group_size must divide"):
        ops.quantize(*arguments(torch.ones(2, 16), 4, 12, 1))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_head_of_a_large_vocabulary_fits_the_grids(axis):
    w = torch.empty(1).expand(128256, 8192)
    quantize.plan_quantize(True, *arguments(w, 4, 64, axis))


@pytest.mark.parametrize(("nbits", "group_size", "axis"), [(4, 64, 1), (1.58, None, 0), (3, None, 1)])
def test_layers_are_quantized_by_the_kernels(nbits, group_size, axis, monkeypatch):
    settings = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis)
    del settings["offload_meta"]
    monkeypatch.setattr(quantizer, "_quantize_by_hqq", None)
    w = torch.randn(16, 128) * 0.02
    ours, error = quantizer.quantize(w, settings, torch.bfloat16, "cpu")
    with backend("reference"):
        theirs, expected = quantizer.quantize(w, settings, torch.bfloat16, "cpu")
    assert torch.equal(ours.packed, theirs.packed)
    for name in ("scale", "zero"):
        assert torch.equal(ours.meta[name], theirs.meta[name])
    assert error == pytest.approx(expected, rel=1e-5)
    assert "quantize" in triton_kernels.OPERATIONS


@pytest.mark.parametrize("axis", [0, 1])
def test_a_merge_by_bands_gives_the_bytes_of_the_whole(axis, monkeypatch):
    layer = oft_layer(hqq_layer(64, 32, nbits=4, axis=axis, group_size=16), std=0.1, oft_block_size=16)
    merged, sizes, original = [], [], ops.quantize
    monkeypatch.setattr(ops, "quantize", lambda w, *args: sizes.append(w.numel()) or original(w, *args))
    for elements in (bands.CPU_ELEMENTS, 512):
        monkeypatch.setattr(bands, "CPU_ELEMENTS", elements)
        layer.merge()
        merged.append(packed_bytes(layer.get_base_layer()))
        layer.unmerge()
    assert sizes[0] == 2048
    assert 512 <= max(sizes[1:]) < 2048
    whole, banded = merged
    assert all(torch.equal(whole[name], banded[name]) for name in whole)
