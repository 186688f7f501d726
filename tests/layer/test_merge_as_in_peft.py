"""Warnings and rules of merging that are those of PEFT."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import (
    oft_layer,
    packed_bytes,
    relative_error,
    same_bytes,
    two_adapters,
)
from torch import nn

from hqq_oft import HqqOFTLinear


def test_unknown_adapters_are_skipped():
    layer = two_adapters()
    before = packed_bytes(layer.base_layer)
    layer.merge(adapter_names=["nobody"])
    assert not layer.merged
    assert same_bytes(layer.base_layer, before)
    with pytest.warns(UserWarning, match=r"\['b'\] are not merged"):
        layer.merge(adapter_names=["nobody", "a", "a"])
    assert layer.merged_adapters == ["a"]


def test_merging_again_warns_and_changes_nothing():
    layer = two_adapters()
    layer.merge()
    state = packed_bytes(layer.base_layer)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        layer.merge()
    assert same_bytes(layer.base_layer, state)


def test_names_as_a_string_are_refused():
    # a ValueError in PEFT up to 0.19
    with pytest.raises((TypeError, ValueError), match="adapter_names should be a list of strings, got 'a'"):
        two_adapters().merge(adapter_names="a")


def test_leaving_out_an_active_adapter_warns_with_its_name():
    layer = two_adapters()
    with pytest.warns(UserWarning, match=r"Merged \['a'\]; the active adapter\(s\) \['b'\] are not merged"):
        layer.merge(adapter_names=["a"])
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_merging_ignores_dropout():
    layer = oft_layer(module_dropout=0.9)
    quiet = oft_layer()
    quiet.load_state_dict(layer.state_dict())
    layer.train().merge()
    quiet.merge()
    assert same_bytes(layer.base_layer, packed_bytes(quiet.base_layer))


def test_merging_below_another_tuner_layer_is_refused():
    inner = oft_layer()
    outer = HqqOFTLinear(inner, "outer", r=4)
    nn.init.normal_(outer.oft_R["outer"].weight, std=0.1)
    x = torch.randn(3, 96)
    rotated = x.double() @ oracle.rotation(outer.oft_R["outer"].weight.detach(), 24, 96, None)
    assert relative_error(outer(x), inner(rotated.float())) <= 1e-5
    with pytest.raises(ValueError, match="below a HqqOFTLinear"):
        outer.merge()
