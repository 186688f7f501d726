"""`accelerate.cpu_offload`: parameters are in host memory, and on the execution device during a forward only."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from helpers import adapted, layers, logits, randomize
from peft import OFTConfig
from torch.testing import assert_close


@pytest.fixture
def model():
    model = adapted()
    model.add_adapter("second", OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"]))
    randomize(model, adapter="second")
    return model.eval()


def offload(model):
    cpu_offload(model, execution_device=torch.device("cpu"))
    for layer in layers(model):
        assert all(isinstance(part._hf_hook, AlignDevicesHook) for part in (layer.base_layer, *layer.oft_R.values()))


def check_offloaded(model):
    assert all(parameter.is_meta for parameter in model.parameters())


def test_forwards_of_an_offloaded_model(model, tokens):
    names = ["default", "second", "__base__"]
    batch = tokens[:1].expand(3, -1)
    expected, mixed = logits(model, tokens), logits(model, batch, adapter_names=names)
    with model.disable_adapter():
        base = logits(model, tokens)
    assert (expected - base).abs().max() > 0.01
    offload(model)
    for _ in range(2):
        assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
        check_offloaded(model)
    assert_close(logits(model, batch, adapter_names=names), mixed, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert_close(logits(model, tokens), base, rtol=1e-5, atol=1e-5)
    check_offloaded(model)


def test_an_adapter_that_changed_while_offloaded_is_used(model, tokens):
    offload(model)
    before = logits(model, tokens)
    for layer in layers(model):
        layer.oft_R["default"]._hf_hook.weights_map["weight"].zero_()
    after = logits(model, tokens)
    with model.disable_adapter():
        assert_close(after, logits(model, tokens), rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 0.01


def test_parameters_are_offloaded_again_when_a_forward_fails(model, tokens):
    offload(model)
    layer = layers(model)[0]
    hook = layer.base_layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, tokens)
    hook.remove()
    assert layer.oft_R["default"].weight.is_meta


def test_merging_an_offloaded_model(model, tokens):
    before = logits(model, tokens)
    model.merge_adapter()
    expected = logits(model, tokens)
    model.unmerge_adapter()
    offload(model)
    model.merge_adapter()
    check_offloaded(model)
    assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert_close(logits(model, tokens), before, rtol=1e-5, atol=1e-5)
