"""Module dropout: whole blocks are replaced by the identity."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    add_adapter,
    hqq_layer,
    oft_layer,
    relative_error,
)

from hqq_oft import QuantizedWeight, functional


def dropped_blocks(layer, adapter="default"):
    """Which blocks one forward leaves unrotated, read from the output for an identity input."""
    x = torch.eye(layer.in_features)
    weight = functional.dequantize(QuantizedWeight.from_hqq(layer.base_layer))
    rotated = torch.linalg.lstsq(
        weight, (layer(x) - (layer.base_layer.bias if layer.base_layer.bias is not None else 0)).T
    )
    block = layer.oft_block_size[adapter]
    same = (rotated.solution.T - x).reshape(-1, block, layer.in_features).abs().amax(dim=(1, 2)) < 1e-3
    return set(same.nonzero().flatten().tolist())


@pytest.mark.parametrize("block_share", [False, True])
def test_dropout_replaces_a_share_of_blocks_rounded_down_by_the_identity(block_share):
    base = hqq_layer(192, 96, nbits=8)  # more outputs than inputs, so that the rotated input can be read off
    layer = oft_layer(base, module_dropout=0.3, block_share=block_share, std=0.1)
    seen = [dropped_blocks(layer) for _ in range(12)]
    assert {len(blocks) for blocks in seen} == {3}  # floor(0.3 * 12)
    assert len(set().union(*seen)) > 6  # and not always the same
    layer.eval()
    assert dropped_blocks(layer) == set()


def test_dropout_is_per_adapter_and_reproducible():
    layer = oft_layer(hqq_layer(192, 96, nbits=8), module_dropout=0.5)
    add_adapter(layer, "other")
    layer.set_adapter("other")
    assert dropped_blocks(layer, "other") == set()
    layer.set_adapter("default")
    x = torch.randn(2, 96)
    torch.manual_seed(3)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize(("p", "dropped"), [(0.29, 29), (0.57, 57), (0.5, 50), (0.999, 99)])
def test_the_dropped_share_is_rounded_down_without_float_error(p, dropped):
    layer = oft_layer(hqq_layer(16, 400, group_size=16), oft_block_size=4, module_dropout=p)
    layer(torch.randn(1, 400)).square().sum().backward()
    assert (layer.oft_R["default"].weight.grad == 0).all(dim=1).sum() == dropped


def test_dropped_blocks_get_no_gradient():
    layer = oft_layer(module_dropout=0.5)
    layer(torch.randn(9, 96)).square().sum().backward()
    without = (layer.oft_R["default"].weight.grad.abs().amax(dim=1) == 0).sum().item()
    assert without == 6


def test_dropping_every_block_gives_the_base_output():
    layer = oft_layer(module_dropout=1.0)
    x = torch.randn(3, 96)
    assert relative_error(layer(x), layer.base_layer(x)) <= 1e-6


def test_checkpointing_repeats_the_same_dropout():
    layer = oft_layer(module_dropout=0.5, coft=True, eps=0.5)
    x = torch.randn(5, 96, requires_grad=True)
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        layer.zero_grad()
        out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        out.square().sum().backward()
        grads.append(layer.oft_R["default"].weight.grad.clone())
    assert torch.equal(*grads)
