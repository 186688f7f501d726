"""Copies, state dicts, casts and moves of a layer."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import (
    COMPILE_BACKEND,
    hqq_layer,
    oft_layer,
    packed_bytes,
    relative_error,
    same_bytes,
)
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent_and_equal(how, merged):
    layer = oft_layer().eval()  # its bias comes from a trainable layer: plain HQQ can't deepcopy that
    x, before = torch.randn(3, 96), packed_bytes(layer.base_layer)
    unmerged = layer(x)
    if merged:
        layer.merge()
    if how == "deepcopy":
        clone = copy.deepcopy(layer)
    elif how == "pickle":
        clone = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        clone = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(clone(x), layer(x))
    assert clone.merged_adapters == layer.merged_adapters
    if merged:
        clone.unmerge()
        assert same_bytes(clone.base_layer, before)
        assert torch.equal(clone(x), unmerged)
        assert layer.merged
    nn.init.zeros_(clone.oft_R["default"].weight)
    assert layer.oft_R["default"].weight.any()


def test_loading_a_base_weight_while_merged_raises():
    layer, other = oft_layer(), oft_layer()
    layer.merge()
    before = packed_bytes(layer.base_layer)
    with pytest.raises(ValueError, match=r"\['default'\] are merged into.*Unmerge first"):
        layer.load_state_dict(other.state_dict())
    assert same_bytes(layer.base_layer, before)
    adapters = {key: value for key, value in other.state_dict().items() if "oft_R" in key}
    layer.load_state_dict(adapters, strict=False)
    assert torch.equal(layer.oft_R["default"].weight, other.oft_R["default"].weight)
    layer.unmerge()
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(layer(x), other(x))


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("how", ["loaded", "merged", "unmerged"])
def test_base_tensors_are_detached_and_not_inference_tensors_after_load_and_merge(how):
    layer = oft_layer()
    if how == "loaded":
        raw = hqq_layer()
        assert not raw.bias.is_leaf
        assert raw.meta["zero"].is_inference()
        state = {**layer.state_dict(), **{f"base_layer.{key}": value for key, value in raw.state_dict().items()}}
        layer.load_state_dict(state)
    else:
        with torch.inference_mode():
            layer.merge()
            if how == "unmerged":
                layer.drop_pristine()
                layer.unmerge()
    x = torch.randn(3, 96)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert not any(t.is_inference() for t in packed_bytes(layer.base_layer).values())
    assert not layer.base_layer.W_q.is_inference()
    torch.compile(layer, backend=COMPILE_BACKEND, fullgraph=True)(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_state_dict_round_trip():
    layer, other = oft_layer(), oft_layer()
    assert not torch.equal(layer.base_layer.W_q, other.base_layer.W_q)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("cast", ["half", "float", "double", "bfloat16"])
@pytest.mark.parametrize("view_as_float", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_casting_casts_the_whole_layer_but_not_the_packed_bytes(cast, view_as_float, merged):
    layer = oft_layer(hqq_layer(dtype=torch.float16, view_as_float=view_as_float)).eval()
    base, dtype, x = layer.base_layer, getattr(torch, cast), torch.randn(3, 96)
    pristine = base.W_q.detach().view(torch.uint8).clone()
    unmerged = layer(x)
    if merged:
        layer.merge()
    packed, expected = base.W_q.detach().view(torch.uint8).clone(), layer(x)
    assert getattr(layer, cast)() is layer
    tensors = [layer.oft_R["default"].weight, base.bias, base.meta["scale"], base.meta["zero"]]
    assert {tensor.dtype for tensor in tensors} == {base.compute_dtype} == {base.meta["compute_dtype"]} == {dtype}
    assert torch.equal(base.W_q.view(torch.uint8), packed)
    assert base.W_q.dtype == (dtype if view_as_float else torch.uint8)
    assert relative_error(layer(x), expected) <= 6e-3
    assert layer(x.to(dtype)).dtype == dtype
    if merged:
        layer.unmerge()
        assert torch.equal(base.W_q.view(torch.uint8), pristine)
        assert base.meta["scale"].dtype == base.meta["compute_dtype"] == dtype
        assert relative_error(layer(x), unmerged) <= 6e-3


@pytest.mark.parametrize("merged", [False, True])
def test_moving_a_layer_moves_all_its_tensors(merged):
    layer = oft_layer()
    if merged:
        layer.merge()
    layer.to("meta")
    base = layer.base_layer
    tensors = [base.W_q, base.bias, base.meta["scale"], base.meta["zero"], layer.oft_R["default"].weight]
    assert {t.device.type for t in tensors} == {"meta"}
    assert base.device == "meta"
    assert layer(torch.empty(3, 96, device="meta")).shape == (3, 64)
    if merged:
        layer.unmerge()  # the pristine weight has moved too: nothing is copied to the new device now
        assert {base.W_q.device.type, base.meta["scale"].device.type, base.meta["zero"].device.type} == {"meta"}


@pytest.mark.parametrize("move", [lambda layer: layer.to("meta"), lambda layer: layer.half()])
def test_a_layer_made_without_a_device_moves_and_casts(move):
    config = BaseQuantizeConfig(nbits=4, group_size=32, axis=1)
    layer = oft_layer(HQQLinear(nn.Linear(96, 64), config, compute_dtype=torch.float32, device=None))
    assert layer.base_layer.device is None
    assert move(layer) is layer
    base, adapter = layer.base_layer, layer.oft_R["default"].weight
    tensors = [base.W_q, base.bias, base.meta["scale"], base.meta["zero"]]
    assert {t.device for t in tensors} == {adapter.device}
    assert base.device == str(adapter.device)
    assert base.bias.dtype == base.meta["scale"].dtype == base.compute_dtype == adapter.dtype


def test_a_new_adapter_is_created_on_the_device_of_the_packed_weight(monkeypatch):
    layer = oft_layer()
    moved = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: moved.append(device))
    layer.update_layer("second", r=4)
    assert moved == [layer.base_layer.W_q.device]
