"""`solver="search"`: no group worse than HQQ, unbiased, exact where nothing changes; what it refuses."""

from __future__ import annotations

import pytest
import torch
from helpers import adapted, hqq_layer, layers, oft_layer
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st
from small_llama import small_llama
from torch import nn

from hqq_oft import backend, patch_peft, quantize_model
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops
from hqq_oft.quant import quantizer
from hqq_oft.quant import search as searching
from hqq_oft.quant.hqq_layer import PackedState

BITS = [8, 6, 5, 4, 3, 2, 1.58, 1]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def patched():
    with patch_peft():
        yield


def config(nbits, group_size, axis, **weight_settings):
    made = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis)
    made["weight_quant_params"].update(weight_settings)
    del made["offload_meta"]
    return made


def quantized(w, solver, settings, dtype=torch.float32, **kwargs):
    state, error = quantizer.quantize(w, settings, dtype, "cpu", solver, **kwargs)
    return reference.dequantize(state.weight(), torch.float64), error, state


def groups_of(matrix, group_size, axis):
    """`[groups, group_size]`."""
    return matrix.reshape(-1, group_size) if axis == 1 else matrix.reshape(group_size, -1).t()


def weight(sd, dtype=torch.float32, rows=96, columns=192):
    """Normal weights with outliers, and groups that are zero, constant, and almost constant."""
    w = torch.randn(rows, columns) * sd * torch.exp(0.3 * torch.randn(rows, 1))
    w[torch.rand_like(w) < 1e-2] *= 10
    w[3, :64], w[4, :64], w[5, :64], w[6, :63] = 0, 0.5, 1e-5 * torch.randn(64), 0
    w[:, 7], w[:, 8] = 0, -0.3
    return w.to(dtype)


@settings(deadline=None, max_examples=150)
@given(
    nbits=st.sampled_from(BITS),
    groups=st.sampled_from([(64, 1), (64, 0), (32, 1), (24, 0), (None, 1), (None, 0)]),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from(DTYPES),
    sd=st.sampled_from([1e-5, 5e-4, 0.02, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_no_group_is_worse_than_with_hqq(nbits, groups, dtype, stored, sd, seed):
    torch.manual_seed(seed)
    (group_size, axis), w = groups, weight(sd, dtype)
    settings = config(nbits, group_size, axis)
    size = group_size or w.shape[axis]
    (theirs, their_error, _), (ours, error, _) = (quantized(w, s, settings, stored) for s in ("hqq", "search"))
    exact = w.double()
    worst, found = (groups_of(x - exact, size, axis).norm(dim=1) for x in (theirs, ours))
    tolerance = 2e-6 * groups_of(exact, size, axis).norm(dim=1)
    assert (~(found > worst * (1 + 1e-5) + tolerance)).all()
    assert error <= their_error * (1 + 1e-5) or not torch.isfinite(theirs).all()
    if torch.isfinite(ours).all():
        assert error == pytest.approx(float((ours - exact).norm() / exact.norm()), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("nbits", "share"), [(4, 0.985), (3, 0.92), (2, 0.82), (1, 0.75)])
def test_the_error_of_normal_weights_is_smaller(nbits, share, axis):
    w = torch.randn(256, 512) * 0.02
    settings = config(nbits, 64, axis)
    (_, theirs, _), (_, ours, _) = (quantized(w, solver, settings, torch.bfloat16) for solver in ("hqq", "search"))
    assert ours < share * theirs


def test_small_weights_and_8_bits_in_bfloat16_gain_too():
    """HQQ limits scales to 5e-5 and more, and rounds scale and zero after it has chosen levels."""
    for sd, share in ((5e-4, 0.3), (0.02, 0.9)):
        w = torch.randn(128, 256) * sd
        (_, theirs, _), (_, ours, _) = (quantized(w, s, config(8, 64, 1), torch.bfloat16) for s in ("hqq", "search"))
        assert ours < share * theirs


@pytest.mark.parametrize(("nbits", "tolerance"), [(8, 1e-4), (4, 3e-3), (3, 1.5e-2), (2, 6e-2)])
def test_the_weights_are_not_shortened(nbits, tolerance):
    """The coefficient of W_q on W, which least squares makes .993, .973, .898 at 4, 3, 2 bits."""
    w = (torch.randn(256, 512) * 0.02).double()
    found, _, _ = quantized(w.float(), "search", config(nbits, 64, 1))
    assert float((found * w).sum() / w.square().sum()) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("nbits", [4, 3])
def test_outliers_are_not_clipped(nbits):
    """By more than one step of the range and rounding; the least squared error clips them by two to three steps."""
    w = torch.randn(64, 512) * 0.02
    w[:, ::256] = 0.1
    found, error, _ = quantized(w, "search", config(nbits, 256, 1))
    step = (groups_of(w, 256, 1).amax(1) - groups_of(w, 256, 1).amin(1)) / (2**nbits - 1)
    assert (groups_of(found - w, 256, 1).abs().amax(1) <= 1.1 * step).all()
    assert error < 0.99 * quantized(w, "hqq", config(nbits, 256, 1))[1]


def test_the_zero_is_an_integer_where_hqq_rounds_it():
    w = torch.randn(64, 256) * 0.02
    for round_zero in (False, True):
        _, _, state = quantized(w, "search", config(4, 64, 1, round_zero=round_zero))
        zero = state.meta["zero"]
        share = float((zero == zero.round()).float().mean())  # the others are HQQ's, which moves its rounded zero
        assert share > 0.4 if round_zero else share < 0.1


def test_groups_are_independent_and_the_size_of_chunks_does_not_matter(monkeypatch):
    w = weight(0.02)
    expected = searching.search(w, 8, 3, 64, 1, False, 0, torch.bfloat16)
    for elements in (1, 640, 3000):
        monkeypatch.setattr(searching, "_CPU_CHUNK", elements)
        for a, b in zip(expected[:3], searching.search(w, 8, 3, 64, 1, False, 0, torch.bfloat16)[:3], strict=True):
            assert torch.equal(a, b)
    band = searching.search(w[:40], 8, 3, 64, 1, False, 0, torch.bfloat16)
    assert torch.equal(band[1], expected[1][:120])
    assert torch.equal(band[2], expected[2][:120])


@pytest.mark.parametrize("view_as_float", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", BITS)
def test_a_weight_on_its_old_grid_is_reproduced_bit_for_bit(nbits, axis, view_as_float):
    w = weight(0.02)
    for dtype in DTYPES:
        settings = config(nbits, 64, axis, view_as_float=view_as_float)
        _, _, old = quantized(w, "hqq", settings, dtype)
        dense = ops.dequantize(old.weight(), torch.float32)
        view = old.weight()
        _, error, again = quantized(dense, "search", settings, dtype, old=(view.scale, view.zero))
        assert torch.equal(again.packed.view(torch.uint8), old.packed.view(torch.uint8))
        assert torch.equal(again.meta["scale"], old.meta["scale"])
        assert torch.equal(again.meta["zero"], old.meta["zero"])
        assert error < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_give_an_error_that_is_not_and_do_not_affect_other_groups(value):
    w = weight(0.02)
    w[0, 0] = value
    found, error, _ = quantized(w, "search", config(4, 64, 1))
    assert not error < float("inf")
    assert torch.isfinite(found[1:]).all()


SERVED = r"it accepts float32, float16 and bfloat16, BaseQuantizeConfig\(nbits=..., group_size=..., axis=...\)"


@pytest.mark.parametrize(
    "settings",
    [
        config(4, 64, 1, optimize=False),
        config(4, 64, 1, channel_wise=False),
        config(4, 64, 1, other=1),
        {**config(4, 64, 1), "scale_quant_params": {"nbits": 8, "group_size": 32}},
        {**config(4, 64, 1), "zero_quant_params": {"nbits": 8, "group_size": 32}},
    ],
    ids=["not optimized", "one scale", "unknown", "quantized scale", "quantized zero"],
)
def test_settings_that_it_does_not_serve_are_refused(settings):
    with pytest.raises(ValueError, match=f"solver='search' does not serve a weight in torch.float32 .*{SERVED}"):
        quantized(weight(0.02), "search", settings)


def test_a_replaced_solver_of_hqq_is_refused(monkeypatch):
    monkeypatch.setattr(Quantizer, "optimize_weights", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="HQQ's default solver"):
        quantized(weight(0.02), "search", config(4, 64, 1))


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_quantize_model(name):
    by_hqq, searched = small_llama(), small_llama()
    with backend(name):
        theirs = quantize_model(by_hqq, nbits=2, group_size=16, progress=False)
        ours = quantize_model(searched, nbits=2, group_size=16, progress=False, solver="search")
    assert ours.quantized == theirs.quantized
    for layer_name, error in ours.errors.items():
        assert error < 0.9 * theirs.errors[layer_name]
        layer, other = (model.get_submodule(layer_name) for model in (searched, by_hqq))
        assert layer.W_q.shape == other.W_q.shape
        assert set(layer.meta) == set(other.meta)


@pytest.mark.parametrize(
    ("model", "solver", "message"),
    [
        (nn.Sequential(nn.Linear(64, 64)), "best", r"solver must be one of \('hqq', 'search'\), got 'best'"),
        (nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).double()), "search", f"in torch.float64 with .*{SERVED}"),
    ],
    ids=["unknown", "float64"],
)
def test_quantize_model_refuses_before_it_changes_anything(model, solver, message):
    before = list(model)
    with pytest.raises(ValueError, match=message):
        quantize_model(model, solver=solver, progress=False)
    assert list(model) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nbits", BITS)
def test_merging_an_adapter_that_does_nothing_changes_no_bit(nbits, dtype):
    for axis in (0, 1):
        layer = oft_layer(hqq_layer(nbits=nbits, axis=axis, dtype=dtype), std=0.0)
        base = layer.get_base_layer()
        before = PackedState.of(base)
        layer.merge(solver="search")
        assert layer.merged
        assert torch.equal(base.W_q, before.packed)
        assert torch.equal(base.meta["scale"], before.meta["scale"])
        assert torch.equal(base.meta["zero"], before.meta["zero"])


def test_merging_a_second_adapter_tries_the_pristine_grid():
    """The first merge leaves the pristine grid; the second takes the rotation back."""
    layer = oft_layer(hqq_layer(nbits=4), "a", std=0.2, oft_block_size=8)
    base = layer.get_base_layer()
    before = PackedState.of(base)
    layer.merge(solver="search")
    assert not torch.equal(base.meta["scale"], before.meta["scale"])
    nn.init.zeros_(layer.oft_R["a"].weight)
    layer.update_layer("b", r=0, oft_block_size=8)
    layer.set_adapter(["a", "b"])
    layer.merge(solver="search")
    assert torch.equal(base.W_q, before.packed)
    assert torch.equal(base.meta["scale"], before.meta["scale"])


@pytest.mark.parametrize("into", [None, 4, 3])
def test_a_merge_has_a_smaller_error(into):
    layer = oft_layer(hqq_layer(256, 128, nbits=4), std=0.1)
    layer.merge(into=into)
    theirs = layer.merge_error
    layer.unmerge()
    layer.merge(into=into, solver="search")
    assert layer.merge_error < 0.985 * theirs


def test_merging_a_model(patched):
    model = adapted(std=0.1)
    model.merge_adapter()
    theirs = model.merge_errors()
    model.unmerge_adapter()
    model.merge_adapter(solver="search")
    assert all(error < theirs[name] for name, error in model.merge_errors().items())
    model.unmerge_adapter()
    model.merge_and_unload(solver="search")
    assert all(error < theirs[name] for name, error in model.base_model.merge_errors().items())


def test_a_merge_that_is_refused_changes_nothing(patched):
    model = adapted(std=0.1)
    *_, last = layers(model)
    last.get_base_layer().quant_config["weight_quant_params"]["optimize"] = False
    before = [layer.get_base_layer().W_q for layer in layers(model)]
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=SERVED):
            merge(solver="search")
        with pytest.raises(ValueError, match=r"solver must be one of \('hqq', 'search'\), got 'best'"):
            merge(solver="best")
    with pytest.raises(ValueError, match="solver must be one of"):
        layers(model)[0].merge(solver="best")
    assert not any(layer.merged for layer in layers(model))
    assert all(layer.get_base_layer().W_q is w for layer, w in zip(layers(model), before, strict=True))


def test_a_merged_layer_is_merged_again_by_a_search_and_not_back():
    layer = oft_layer(hqq_layer(64, 128, nbits=2), std=0.1)
    layer.merge(solver="search")
    searched, error = layer.get_base_layer().W_q, layer.merge_error
    layer.unmerge()
    layer.merge()
    assert layer.merge_error > error
    for solver in ("search", "hqq"):
        layer.merge(solver=solver)
        assert layer.merge_error == error
        assert torch.equal(layer.get_base_layer().W_q, searched)
