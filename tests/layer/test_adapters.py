"""Adding, replacing, switching and deleting the adapters of a layer."""

from __future__ import annotations

import warnings

import oracle
import pytest
import torch
from helpers import (
    TOLERANCE,
    add_adapter,
    around_operations,
    oft_layer,
    relative_error,
)
from peft import OFTConfig


def test_adding_replacing_switching_and_deleting():
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b", oft_block_size=3)
    assert layer.active_adapters == ["a"]
    assert layer.oft_R["a"].weight.requires_grad
    assert not layer.oft_R["b"].weight.requires_grad
    layer.set_adapter("b")
    assert (layer.oft_R["a"].weight.requires_grad, layer.oft_R["b"].weight.requires_grad) == (False, True)
    layer.set_adapter("b", inference_mode=True)
    assert not layer.oft_R["b"].weight.requires_grad
    layer.update_layer("b", r=4)
    assert (layer.r["b"], layer.oft_R["b"].weight.any().item()) == (4, False)
    with pytest.warns(UserWarning, match="Adapter b was active which is now deleted. Setting active adapter to a"):
        layer.delete_adapter("b")
    assert layer.active_adapters == ["a"]
    assert list(layer.oft_R) == ["a"]
    layer.delete_adapter("a")
    assert layer.active_adapters == []
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_merged_adapters_are_neither_deleted_nor_replaced():
    layer = oft_layer()
    layer.merge()
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they are merged"):
        layer.delete_adapter("default")
    with pytest.raises(ValueError, match="Cannot replace the adapter 'default' while it is merged"):
        layer.update_layer("default", r=4)
    layer.unmerge()
    layer.delete_adapter("default")


@pytest.mark.parametrize("form", ["keyword", "oft_config", "positional"])
def test_update_layer_takes_a_config_in_every_form_of_peft(form):
    layer, config = oft_layer(), OFTConfig(r=4, oft_block_size=0)
    if form == "positional":
        layer.update_layer("b", 8, config)
    else:
        layer.update_layer("b", 8, **{"config" if form == "keyword" else "oft_config": config})
    assert layer.r["b"] == 4


def test_scaling_is_refused_with_pefts_warning():
    layer = oft_layer()
    x = torch.randn(2, 96)
    expected = layer(x)
    with pytest.warns(UserWarning, match="Scaling operation for OFT not supported"):
        layer.scale_layer(2.0)
    with pytest.warns(UserWarning, match="Unscaling operation for OFT not supported"):
        layer.unscale_layer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.scale_layer(1)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("block_share", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_delta_weight_is_the_dense_rotation(block_share, exact, dtype):
    layer = oft_layer(block_share=block_share, use_cayley_neumann=not exact)
    layer.oft_R["default"].to(dtype)
    delta = layer.get_delta_weight("default")
    rotation = oracle.rotation(layer.oft_R["default"].weight.detach(), 8, 96, None if exact else 5)
    assert (delta.shape, delta.dtype) == ((96, 96), dtype)
    assert relative_error(delta, rotation) <= TOLERANCE[dtype]


def test_only_get_delta_weight_builds_the_dense_rotation(monkeypatch):
    monkeypatch.setattr(torch, "block_diag", None)
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b")
    layer.set_adapter(["a", "b"])
    seen = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.update(
                tuple(t.shape[-2:]) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
            )
            return out

    def watched(operation, function, args):  # a custom operator hides its inner calls from an enclosing mode
        with Watch():
            return function(*args)

    with around_operations(watched), Watch():
        layer(torch.randn(3, 96)).sum().backward()
        layer.merge()
        layer.unmerge()
        layer.merge()
        layer.drop_pristine()
        layer.unmerge()
    assert (64, 96) in seen  # the weight: shows that the mode sees inside the operators
    assert (96, 96) not in seen


def test_requires_grad_skips_the_packed_weight():
    layer = oft_layer()
    assert layer.requires_grad_(False) is layer
    assert not any(p.requires_grad for p in layer.parameters())
    layer.requires_grad_(True)
    assert layer.oft_R["default"].weight.requires_grad
    assert not layer.base_layer.W_q.requires_grad
