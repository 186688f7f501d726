"""A merge that fails or is interrupted changes nothing."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from helpers import (
    packed_bytes,
    same_bytes,
    two_adapters,
)
from hqq.core.quantize import Quantizer
from torch import nn

from hqq_oft.quant import hqq_layer as quant_layer
from hqq_oft.quant import quantizer
from hqq_oft.tuner import fold


def copy_unmerged(layer):
    copied = copy.deepcopy(layer)
    if layer.merged:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copied.unmerge()
    return copied


def state_of(layer):
    """The packed weight, the merged adapters, and the packed weight that unmerging gives."""
    return packed_bytes(layer.base_layer), list(layer.merged_adapters), packed_bytes(copy_unmerged(layer).base_layer)


def assert_state(layer, state):
    assert same_bytes(layer.base_layer, state[0])
    assert layer.merged_adapters == state[1]
    assert same_bytes(copy_unmerged(layer).base_layer, state[2])


@pytest.mark.parametrize("broken", ["a", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_names_the_broken_adapter_and_changes_nothing(broken, value):
    layer = two_adapters()
    with torch.no_grad():
        layer.oft_R[broken].weight[0, 0] = value
    state = state_of(layer)
    with pytest.raises(ValueError, match=f"the adapter '{broken}' seems to be broken"):
        layer.merge(safe_merge=True)
    assert_state(layer, state)


def test_a_failed_second_merge_keeps_the_first():
    layer = two_adapters()
    with torch.no_grad():
        layer.oft_R["b"].weight[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="have no effect"):
        layer.merge(adapter_names=["a"], safe_merge=True)
    state = state_of(layer)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="'b' seems to be broken"):  # noqa: PT030
        layer.merge(safe_merge=True)
    assert_state(layer, state)


def test_safe_merge_checks_the_quantized_weight(monkeypatch):
    layer = two_adapters()
    state = state_of(layer)
    original = quantizer.requantize

    def overflowing(*args):
        return original(*args)[0], float("inf")

    monkeypatch.setattr(quantizer, "requantize", overflowing)
    with pytest.raises(ValueError, match=r"after quantizing the weight merged with \['a', 'b'\]"):
        layer.merge(safe_merge=True)
    assert_state(layer, state)


def test_safe_merge_of_a_finite_adapter_is_the_same_as_merge():
    one, other = two_adapters(), two_adapters()
    other.load_state_dict(one.state_dict())
    one.merge()
    other.merge(safe_merge=True)
    assert same_bytes(one.base_layer, packed_bytes(other.base_layer))


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError("CUDA out of memory")])
@pytest.mark.parametrize("where", ["quantizer", "rotation", "install", "after install"])
@pytest.mark.parametrize("action", ["merge", "merge more", "unmerge"])
def test_an_interrupt_anywhere_changes_nothing(monkeypatch, error, where, action):
    layer = two_adapters()
    if action != "merge":
        with pytest.warns(UserWarning, match="have no effect"):
            layer.merge(adapter_names=["a"])
    if action == "unmerge":
        layer.drop_pristine()  # so that it computes and quantizes too
    state, x = state_of(layer), torch.randn(2, 96)
    expected = layer(x)
    install = quant_layer.PackedState.install
    failures = iter([error])

    def fail(*args, **kwargs):
        raise error

    def failing_install(self, base):
        if where == "after install":
            install(self, base)
        if next(failures, None) is not None:
            base.W_q = nn.Parameter(torch.zeros(1), requires_grad=False)  # interrupted halfway
            raise error
        install(self, base)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if where == "quantizer":
            patch.setattr(Quantizer, "quantize", fail)
            patch.setattr(quantizer.ops, "quantize", fail)
        elif where == "rotation":
            patch.setattr(fold.ops, "dequantize_rotate", fail)
            patch.setattr(fold.ops, "rotate", fail)
        else:
            patch.setattr(quant_layer.PackedState, "install", failing_install)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            layer.unmerge() if action == "unmerge" else layer.merge()
    assert_state(layer, state)
    assert torch.equal(layer(x), expected)
