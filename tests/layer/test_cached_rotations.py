"""Rotations are cached in inference, and never stale; frozen ones keep their addresses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from calls import rotations_of
from helpers import (
    around_operations,
    live_bytes,
    oft_layer,
    relative_error,
    truth,
    two_adapters,
)
from torch import nn

from hqq_oft import frozen_rotations


@torch.no_grad()
def test_rotations_are_computed_once_in_inference(cayleys):
    layer, x = two_adapters(std=0.05, second={"block_share": True}), torch.randn(2, 96)
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert relative_error(first, truth(layer, x, "a", "b")) <= 1e-5
    assert cayleys == [12, 1]
    mixed = layer(x, adapter_names=["b", "a"])
    assert cayleys == [12, 1]  # the same rotations
    assert relative_error(mixed[1], truth(layer, x, "a")[1]) <= 1e-5


CHANGES = {
    "in place": lambda layer: layer.oft_R["a"].weight.mul_(2),
    "new data": lambda layer: setattr(layer.oft_R["a"].weight, "data", layer.oft_R["a"].weight * 2),
    "new parameter": lambda layer: setattr(layer.oft_R["a"], "weight", nn.Parameter(layer.oft_R["a"].weight * 2)),
    "loaded": lambda layer: layer.oft_R["a"].load_state_dict({"weight": layer.oft_R["a"].weight * 2}),
    "replaced": lambda layer: layer.update_layer("a", 0, oft_block_size=16, init_weights=False),
    "cast": lambda layer: layer.half().float(),
    "told": lambda layer: (layer.oft_R["a"].weight.data.mul_(2), layer.clear_rotations()),
    "trained and back": lambda layer: (layer.train(), layer.oft_R["a"].weight.data.mul_(2), layer.eval()),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_rotation_is_never_used(change):
    layer, x = two_adapters(std=0.05, second={"block_share": True}), torch.randn(2, 96)
    layer(x)
    CHANGES[change](layer)
    assert relative_error(layer(x), truth(layer, x, "a", "b")) <= 1e-5


def test_rotations_are_not_cached_when_gradients_are_recorded(cayleys):
    layer, x = two_adapters(std=0.05, second={"block_share": True}), torch.randn(2, 96, requires_grad=True)
    layer(x).sum().backward()
    step = list(cayleys)
    layer(x).sum().backward()
    assert cayleys == step * 2
    with torch.no_grad():
        layer(x)
    assert cayleys == [*step * 2, 12, 1]  # nor are they found later
    assert x.grad is not None
    assert layer.oft_R["a"].weight.grad is not None


@torch.no_grad()
def test_cached_rotations_are_not_copied(cayleys):
    layer, x = two_adapters(std=0.05, second={"block_share": True}), torch.randn(2, 96)
    pickled = len(pickle.dumps(layer))
    expected = layer(x)
    assert len(pickle.dumps(layer)) == pickled
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        cayleys.clear()
        assert torch.equal(copied(x), expected)
        assert cayleys == [12, 1]
    cayleys.clear()
    layer(x)
    assert cayleys == []


@torch.no_grad()
@pytest.mark.parametrize("mixed", [False, True])
def test_cached_rotations_are_freed(mixed):
    layer, x = two_adapters(std=0.05, second={"block_share": True}), torch.randn(2, 96)
    names = {"adapter_names": ["a", "b"]} if mixed else {}
    layer(x, adapter_names=["__base__"] * 2)  # views of the packed weight are kept too, but are no copies
    before, d = live_bytes(), 8 * 8 * 4
    layer(x, **names)
    assert live_bytes() - before >= 13 * d
    layer.train()
    assert live_bytes() == before
    layer.eval()
    layer(x, **names)
    layer.delete_adapter("b")
    held = live_bytes()
    layer.train()
    assert held - live_bytes() == 12 * d  # only what is cached for the other adapter


def test_rotations_cached_in_inference_mode_work_in_training(cayleys):
    layer, x = two_adapters(std=0.05, second={"block_share": True}), torch.randn(2, 96)
    with torch.inference_mode():
        expected = layer(x)
        layer(x)
    assert cayleys == [12, 1]
    for name in ("a", "b"):
        layer.oft_R[name].weight.requires_grad_(False)
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(y, expected)


@torch.no_grad()
def test_a_mixed_batch_builds_its_stack_and_index_once(monkeypatch):
    layer, x = two_adapters(std=0.05, second={"block_share": True}), torch.randn(4, 3, 96)
    stacked, stack = [], torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: stacked.append(len(tensors)) or stack(tensors))
    batches = [["b", "a", "__base__", "a"], ["a", "a", "b", "b"]]
    for names in batches * 2:
        y = layer(x, adapter_names=names)
        for sample, name in enumerate(names):
            alone = layer.base_layer(x) if name == "__base__" else truth(layer, x.reshape(-1, 96), name).view(4, 3, -1)
            assert relative_error(y[sample], alone[sample]) <= 1e-5
    before = len(stacked)
    layer(x, adapter_names=batches[1])
    layer(x[:, :1], adapter_names=batches[1])
    assert len(stacked) == before
    layer.oft_R["a"].weight.mul_(0.5)
    y = layer(x, adapter_names=batches[1])
    assert len(stacked) == before + 1
    assert relative_error(y[0], truth(layer, x.reshape(-1, 96), "a").view(4, 3, -1)[0]) <= 1e-5


@pytest.fixture
def used():
    """The rotations, and the index of a mixed batch, that each `rotate` and `linear` uses; kept alive."""
    seen = []

    def recorded(operation, function, args):
        if operation in ("rotate", "linear"):
            seen.append(rotations_of(operation, args))
        return function(*args)

    with around_operations(recorded):
        yield seen


def addresses(tensors):
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@torch.no_grad()
def test_frozen_rotations_keep_their_memory_addresses(used):
    layer, x = two_adapters(std=0.05, second={"block_share": True}), torch.randn(2, 96)
    model = nn.ModuleList([layer])
    with frozen_rotations(model):
        expected = layer(x), layer(x, adapter_names=["a", "b"])
        assert len(used) == 3  # a forward of two adapters, and one of a mixed batch
        layer(x, adapter_names=["b", "b"])
        model.eval()
        first = used[:3]
        del used[:]
        assert torch.equal(layer(x), expected[0])
        assert torch.equal(layer(x, adapter_names=["a", "b"]), expected[1])
        assert [addresses(d) for d in used] == [addresses(d) for d in first]
        for forbidden in (model.train, layer.clear_rotations, lambda: layer.delete_adapter("a"), layer.half):
            with pytest.raises(RuntimeError, match="rotations are frozen"):
                forbidden()
        with pytest.raises(RuntimeError, match="rotations are frozen"):
            layer.update_layer("a", 0, oft_block_size=16)
        assert list(layer.oft_R) == ["a", "b"]
        assert torch.equal(layer(x), expected[0])
        with pytest.raises(ValueError, match="already frozen"), frozen_rotations(model):
            pass
        layer.oft_R["a"].weight.mul_(2)
        with pytest.raises(RuntimeError, match="'a' has changed while its rotations were frozen"):
            layer(x)
    assert relative_error(layer(x), truth(layer, x, "a", "b")) <= 1e-5
    model.train()


def test_freezing_a_training_layer_or_a_model_without_layers_raises():
    with pytest.raises(ValueError, match="no HqqOFTLinear layer"), frozen_rotations(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"call `model.eval\(\)` first"), frozen_rotations(oft_layer()):
        pass
