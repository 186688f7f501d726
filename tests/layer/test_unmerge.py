"""Unmerging: bit-exact with the pristine weight, by the inverse rotation without it."""

from __future__ import annotations

import warnings

import oracle
import pytest
import torch
from helpers import (
    hqq_layer,
    live_bytes,
    oft_layer,
    packed_bytes,
    relative_error,
    rotated_truth,
    same_bytes,
    two_adapters,
)

from hqq_oft.quant import hqq_layer as quant_layer


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_unmerging_is_bit_exact_after_any_number_of_cycles(keep):
    layer = two_adapters()
    layer.keep_pristine = keep
    before, x = packed_bytes(layer.base_layer), torch.randn(3, 96)
    expected, held = layer(x).detach(), live_bytes()  # a graph would hold the packed weight it began with
    for names in (["a"], ["b"], None, ["a", "b"], ["b"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge(adapter_names=names)
            layer.merge()
        layer.unmerge()
        assert layer.merged_adapters == []
        assert same_bytes(layer.base_layer, before)
        assert torch.equal(layer(x), expected)
    assert live_bytes() == held  # the pristine weight is not kept any longer


@pytest.mark.parametrize(("keep", "moves"), [("device", []), ("cpu", ["cpu"]), ("none", [])])
def test_the_pristine_weight_is_kept_in_the_selected_place(monkeypatch, keep, moves):
    layer, moved = oft_layer(), []
    layer.keep_pristine = keep
    to = quant_layer.PackedState.to

    def noted(self, device):
        moved.append(device)
        return to(self, device)

    monkeypatch.setattr(quant_layer.PackedState, "to", noted)
    layer.merge()
    assert [device for device in moved if isinstance(device, str)] == moves
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer.unmerge()
    assert any("without the pristine weight" in str(each.message) for each in caught) is (keep == "none")


def test_an_unknown_place_for_the_pristine_weight_raises():
    layer = oft_layer()
    with pytest.raises(ValueError, match=r"keep_pristine must be one of \('device', 'cpu', 'none'\), got 'host'"):
        layer.keep_pristine = "host"
    assert layer.keep_pristine == "device"


def test_the_error_of_a_merge_is_reported():
    layer = oft_layer(hqq_layer(nbits=4))
    assert layer.merge_error is None
    truth = rotated_truth(layer, "default")
    layer.merge()
    assert abs(layer.merge_error - relative_error(oracle.of_layer(layer.base_layer), truth)) <= 1e-5
    layer.unmerge()
    assert layer.merge_error is None


def test_the_environment_sets_what_is_kept(monkeypatch):
    monkeypatch.setenv("HQQ_OFT_KEEP_PRISTINE", "none")
    assert oft_layer().keep_pristine == "none"
    monkeypatch.setenv("HQQ_OFT_KEEP_PRISTINE", "disk")
    with pytest.raises(ValueError, match="HQQ_OFT_KEEP_PRISTINE='disk' is not understood"):
        oft_layer()


@pytest.mark.parametrize("give_up", ["setting", "drop"])
@pytest.mark.parametrize("exact", [False, True])
def test_without_the_pristine_weight_unmerging_inverts_with_a_warning(give_up, exact):
    layer = two_adapters(hqq_layer(nbits=8, group_size=8), use_cayley_neumann=not exact)
    weight = oracle.of_layer(layer.base_layer)
    if give_up == "setting":
        layer.keep_pristine = "none"
    layer.merge()
    if give_up == "drop":
        layer.drop_pristine()
    with pytest.warns(UserWarning, match="Unmerging without the pristine weight"):
        layer.unmerge()
    assert not layer.merged
    # two roundings at 8 bits; the series' transpose instead of its inverse would be tens of percent off
    assert relative_error(oracle.of_layer(layer.base_layer), weight) <= 2e-2


def test_merging_a_second_adapter_without_the_pristine_weight_keeps_the_order():
    layer = two_adapters(hqq_layer(nbits=8, group_size=8))
    x = torch.randn(5, 96)
    expected = layer(x)
    layer.keep_pristine = "none"
    with pytest.warns(UserWarning, match="have no effect until"):
        layer.merge(adapter_names=["b"])
    with pytest.warns(UserWarning, match="Merging more adapters without the pristine weight"):
        layer.merge(adapter_names=["a"])
    assert layer.merged_adapters == ["a", "b"]
    assert relative_error(layer(x), expected) <= 3e-2


def test_unmerging_when_nothing_is_merged_warns():
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do."):
        oft_layer().unmerge()
