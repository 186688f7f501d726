"""The quantizer against HQQ's own, and what it refuses."""

from __future__ import annotations

import hashlib
import inspect

import pytest
import torch
from hqq.core import optimize
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from torch import nn

from hqq_oft import backend, quantize_model
from hqq_oft.ops import packing
from hqq_oft.ops import table as ops
from hqq_oft.quant import quantizer

# Of the text of HQQ's quantizer 0.2.8.
SOLVER = "2948df198658915a0d063ccc379b7ee48b99142a4a6c07c7310546d6a6c270ca"
BITS = [8, 6, 5, 4, 3, 2, 1.58, 1]
GROUPS = [(64, 1), (64, 0), (128, 1), (24, 0), (None, 1), (None, 0)]
ROWS, COLUMNS = 96, 192


def weight(sd, dtype=torch.float32):
    """Normal weights with outliers, and groups that are zero, constant, and almost constant."""
    w = torch.randn(ROWS, COLUMNS) * sd * torch.exp(0.3 * torch.randn(ROWS, 1))
    w[torch.rand_like(w) < 1e-3] *= 10
    w[3, :64], w[4, :64], w[5, :64] = 0, 0.5, 1e-5 * torch.randn(64)
    return w.to(dtype)


def config(nbits, group_size, axis, **weight_settings):
    made = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis)
    made["weight_quant_params"].update(weight_settings)
    del made["offload_meta"]
    return made


def by_hqq(w, settings, dtype=torch.float32):
    layer = HQQLinear(None, None, compute_dtype=dtype, device="cpu")
    layer.quantize(w, **settings)
    return layer


def levels(packed, meta):
    return Quantizer.unpack[meta["packing"]](packed, dtype=torch.float32)


@pytest.mark.parametrize("name", ["auto", "reference"])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
@pytest.mark.parametrize("nbits", BITS)
def test_the_state_is_hqqs(nbits, groups, name):
    """Of a language model's weights in every byte, unless the solver's last two errors differ by a rounding error."""
    settings = config(nbits, *groups)
    for sd, dtype in ((0.02, torch.float32), (0.02, torch.bfloat16), (1e-5, torch.float16)):
        w = weight(sd, dtype)
        theirs = by_hqq(w, settings, dtype)
        with backend(name):
            ours, error = quantizer.quantize(w, settings, dtype, "cpu")
        assert isinstance(ours.packed, nn.Parameter)
        assert torch.equal(ours.packed, theirs.W_q)
        assert set(ours.meta) == set(theirs.meta)
        for key, value in theirs.meta.items():
            if isinstance(value, torch.Tensor):
                assert ours.meta[key].dtype == value.dtype
                torch.testing.assert_close(ours.meta[key], value, rtol=1e-5, atol=1e-2 if sd < 1e-4 else 1e-6)
            else:
                assert ours.meta[key] == value
        dense = ops.dequantize(ours.weight(), torch.float32)
        expected = (dense - w.float()).norm() / w.float().norm()
        assert error == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("sd", [0.1, 1.0])
@pytest.mark.parametrize("nbits", BITS)
def test_where_residuals_are_shrunk_levels_equal_hqqs_but_for_ties(nbits, sd):
    settings = config(nbits, 64, 1)
    w = weight(sd)
    theirs, (ours, _) = by_hqq(w, settings), quantizer.quantize(w, settings, torch.float32, "cpu")
    differ = levels(ours.packed, ours.meta) != levels(theirs.W_q, theirs.meta)
    assert differ.float().mean() <= 1e-4
    torch.testing.assert_close(ours.meta["zero"], theirs.meta["zero"], rtol=1e-5, atol=1e-4)
    assert torch.equal(ours.meta["scale"], theirs.meta["scale"])


@pytest.mark.parametrize(
    "settings",
    [
        config(4, 64, 1, optimize=False),
        config(4, 64, 1, round_zero=False),
        config(4, 64, 1, view_as_float=True),
        config(4, 64, 1, channel_wise=False),
        {**config(4, 64, 1), "scale_quant_params": {"nbits": 8, "group_size": 32}},
    ],
    ids=["not optimized", "zero not rounded", "viewed as float", "one scale", "quantized scale"],
)
def test_other_settings_give_hqqs_state_too(settings):
    w = weight(0.02)
    theirs, (ours, error) = by_hqq(w, settings), quantizer.quantize(w, settings, torch.float32, "cpu")
    assert torch.equal(ours.packed.view(torch.uint8), theirs.W_q.view(torch.uint8))
    assert set(ours.meta) == set(theirs.meta)
    dense = ops.dequantize(ours.weight(), torch.float32)
    assert error == pytest.approx(float((dense - w).norm() / w.norm()), rel=1e-4)


def test_another_solver_of_hqq_is_used(monkeypatch):
    monkeypatch.setattr(Quantizer, "optimize_weights", optimize.optimize_weights_proximal_slow)
    w, settings = weight(1.0), config(2, 64, 1)
    ours, _ = quantizer.quantize(w, settings, torch.float32, "cpu")
    assert torch.equal(ours.packed, by_hqq(w, settings).W_q)


def test_hqqs_solver_is_the_one_that_is_restated():
    source = inspect.getsource(optimize.optimize_weights_proximal_legacy_step)
    source += inspect.getsource(optimize.optimize_weights_proximal_legacy) + inspect.getsource(Quantizer.quantize)
    source += inspect.getsource(optimize.shrink_lp_op)
    assert hashlib.sha256(source.encode()).hexdigest() == SOLVER, (
        "HQQ's quantizer has changed: compare optimize_weights_proximal_legacy, shrink_lp_op and Quantizer.quantize "
        "with hqq_oft.ops.reference.quantize, then update this hash."
    )
    assert Quantizer.optimize_weights is optimize.optimize_weights_proximal_legacy


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
def test_packing_is_the_inverse_of_unpacking(bits):
    rows = 40 if bits != 3 else 37
    values = torch.randint(0, 2**bits, (rows, 5))
    assert torch.equal(packing.unpack(packing.pack(values.float(), bits), bits, rows), values)


def test_opcheck():
    for bits, axis in ((4, 1), (3, 0)):
        args = (weight(0.02), 2**bits, bits, 64, axis, True, 20, torch.bfloat16)
        for errors in (None, torch.ones(20).double()):
            torch.library.opcheck(torch.ops.hqq_oft.quantize.default, (*args, errors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": torch.ones(4, 4, dtype=torch.int64)}, "w must be a floating point tensor"),
        ({"w": torch.ones(0, 4)}, r"w must be a matrix that is not empty, got shape \(0, 4\)"),
        ({"w": torch.ones(64)}, r"w must be a matrix that is not empty, got shape \(64,\)"),
        ({"group_size": 60}, "group_size must divide the 8x64 weights, got 60"),
        ({"group_size": 64, "bits": 1, "levels": 2, "w": torch.ones(4, 64)}, "4 rows of levels cannot be packed 8"),
        ({"bits": 5}, "bits must be one of"),
        ({"levels": 17}, "levels from 2 to 2.bits; got bits=4, levels=17"),
        ({"axis": 2}, "axis must be 0 or 1, got 2"),
        ({"iterations": -1}, "iterations must be 0 or more"),
        ({"dtype": torch.int8}, "dtype floating"),
        ({"errors": torch.ones(20)}, r"errors must be a float64 tensor of shape \(20,\), got"),
        ({"errors": torch.ones(20, device="meta").double()}, "errors is on meta"),
        ({"errors": torch.ones(19).double()}, r"errors must be a float64 tensor of shape \(20,\), got"),
    ],
)
def test_invalid_arguments_are_refused(change, message):
    valid = {"w": torch.ones(8, 64), "levels": 16, "bits": 4, "group_size": 64, "axis": 1, "round_zero": True}
    args = {**valid, "iterations": 20, "dtype": torch.float32, "errors": None, **change}
    with pytest.raises((TypeError, ValueError), match=message):
        ops.quantize(*args.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_weights_that_are_not_finite_give_an_error_that_is_not(value, name):
    for position in (0, 100, -1):
        w = weight(0.02)
        w.view(-1)[position] = value
        with backend(name):
            for axis in (0, 1):
                squares = ops.quantize(w, 16, 4, 64, axis, True, 20, torch.float32, None)[3]
                assert not torch.isfinite(squares).all()


def test_a_weight_too_large_for_its_dtype_has_no_finite_error():
    w = torch.full((8, 64), 1000.0)
    w[:, ::2] += 1e-3
    _, error = quantizer.quantize(w, config(4, 64, 1), torch.float16, "cpu")
    assert not error < float("inf")


def test_the_report_of_a_model_lists_errors():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128))
    dense = [linear.weight.detach().clone() for linear in model]
    report = quantize_model(model, nbits=2, progress=False)
    for name, before, layer in zip("01", dense, model, strict=True):
        after = layer.dequantize()
        assert report.errors[name] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert "largest relative error of a weight" in str(report)
