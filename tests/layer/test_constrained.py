"""Constrained OFT: blocks are projected onto a ball around the identity."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    around_operations,
    oft_layer,
    relative_error,
    truth,
)


@pytest.mark.parametrize("block_share", [False, True])
def test_coft_uses_projected_blocks_and_keeps_the_parameter_out_of_training(block_share):
    layer = oft_layer(coft=True, eps=0.2, block_share=block_share, std=0.5)
    weight, x = layer.oft_R["default"].weight, torch.randn(3, 96)
    stored, before = weight.shape[0], weight.detach().clone()
    layer.eval()
    expected = truth(layer, x, "default")  # the oracle projects
    assert relative_error(layer(x), expected) <= 1e-5
    layer.merge()
    layer.unmerge()
    layer.get_delta_weight("default")
    assert torch.equal(weight, before)
    layer.train()
    assert relative_error(layer(x), expected) <= 1e-5
    norms = (2 * weight.detach().square().sum(1)).sqrt()
    assert not torch.equal(weight, before)
    assert norms.max() <= 0.2 / stored**0.5 * (1 + 1e-5)


def test_coft_does_not_project_a_frozen_parameter_in_training_mode():
    layer = oft_layer(coft=True, eps=0.2, std=0.5)
    weight = layer.oft_R["default"].weight.requires_grad_(False)
    before, x = weight.clone(), torch.randn(3, 96)
    assert relative_error(layer(x), truth(layer, x, "default")) <= 1e-5
    assert torch.equal(weight, before)


def test_coft_allows_two_forwards_before_one_backward():
    layer = oft_layer(coft=True, eps=0.2, std=0.5)
    x = torch.randn(3, 96)
    (layer(x).sum() + layer(2 * x).sum()).backward()
    assert torch.isfinite(layer.oft_R["default"].weight.grad).all()


def test_coft_projects_by_one_operation_a_forward():
    layer, called = oft_layer(coft=True, eps=0.2, std=0.5), []

    def counted(name, function, args):
        called.append(name)
        return function(*args)

    with around_operations(counted):
        layer(torch.randn(3, 96))
    assert called == ["project_", "cayley", "linear"]
