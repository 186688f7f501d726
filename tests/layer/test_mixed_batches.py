"""`adapter_names`: each sample of a batch with its own adapter."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    add_adapter,
    oft_layer,
    relative_error,
    truth,
)


@pytest.mark.parametrize("shape", [(5, 96), (5, 3, 96)])
def test_each_sample_gets_its_own_adapter(shape):
    layer = oft_layer(adapter="a").eval()
    add_adapter(layer, "b")
    add_adapter(layer, "c", oft_block_size=3)
    add_adapter(layer, "d", block_share=True)
    names = ["b", "__base__", "c", "a", "d"]
    x = torch.randn(shape)
    out = layer(x, adapter_names=names)
    for row, name in enumerate(names):
        expected = truth(layer, x[row], *([] if name == "__base__" else [name]))
        assert relative_error(out[row], expected) <= 1e-5
    assert torch.equal(layer(x, adapter_names=["__base__"] * 5), layer.base_layer(x))
    assert relative_error(layer(x, adapter_names=["elsewhere"] * 5), layer.base_layer(x)) <= 1e-6


def test_mixed_batches_on_a_base_layer_with_hooks():
    layer = oft_layer(adapter="a").eval()
    add_adapter(layer, "b", oft_block_size=3)
    x, names = torch.randn(3, 96), ["b", "a", "__base__"]
    expected = layer(x, adapter_names=names)
    layer.base_layer.register_forward_pre_hook(lambda module, args: None)
    assert relative_error(layer(x, adapter_names=names), expected) <= 1e-6


def test_errors_of_adapter_names_are_those_of_pefts_lora():
    layer = oft_layer().eval()
    x = torch.randn(3, 96)
    with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 2 and 3 respectively"):
        layer(x, adapter_names=["default", "default"])
    layer.merge()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
        layer(x, adapter_names=["default"] * 3)


def test_adapter_names_with_disabled_adapters_give_the_base():
    layer = oft_layer().eval()
    layer.enable_adapters(False)
    x = torch.randn(2, 96)
    assert torch.equal(layer(x, adapter_names=["default"] * 2), layer.base_layer(x))
