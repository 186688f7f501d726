"""Merging and unloading a model's adapters: results, reports, failures."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from helpers import adapted, layers, logits, relative_error
from hqq.core.quantize import HQQLinear
from peft import OFTConfig, get_peft_model
from peft.tuners.oft.layer import OFTLayer
from small_llama import quantized_llama, small_llama
from torch import nn

import hqq_oft
from hqq_oft import HqqOFTLinear
from hqq_oft.quant import quantizer


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload(tokens, safe_merge):
    model = adapted()
    bias = layers(model)[0].base_layer.bias.clone()
    reference = copy.deepcopy(model)
    reference.merge_adapter()
    merged = model.merge_and_unload(safe_merge=safe_merge, progressbar=True)
    assert not layers(merged)
    projection = merged.model.layers[0].self_attn.q_proj
    assert isinstance(projection, HQQLinear)
    assert torch.equal(projection.bias, bias)
    assert torch.equal(logits(merged, tokens), logits(reference, tokens))
    again = get_peft_model(merged, OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]))
    assert len(layers(again)) == 2


def test_unload(tokens):
    model = adapted()
    unloaded = model.unload()
    assert not layers(unloaded)
    assert relative_error(logits(unloaded, tokens), logits(quantized_llama(), tokens)) <= 1e-6


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
def test_merging_a_model_is_atomic(tokens, monkeypatch, error, action):
    model = adapted()
    expected, done = logits(model, tokens), []
    original = quantizer.requantize

    def fail_at_the_third(base, *args):
        done.append(base)
        if len(done) == 3:
            raise error
        return original(base, *args)

    with monkeypatch.context() as patch:
        patch.setattr(quantizer, "requantize", fail_at_the_third)
        with pytest.raises(error):
            getattr(model, action)()
    assert len(done) == 3
    assert len(layers(model)) == 4
    assert not any(layer.merged for layer in layers(model))
    assert torch.equal(logits(model, tokens), expected)


def test_a_model_that_mixes_quantized_and_dense_layers(tokens):
    model = quantized_llama()
    model.model.layers[1].self_attn.q_proj = small_llama().model.layers[1].self_attn.q_proj
    peft_model = adapted(model)
    assert len(layers(peft_model)) == 3
    expected = logits(peft_model, tokens)
    merged = peft_model.merge_and_unload()
    assert isinstance(merged.model.layers[1].self_attn.q_proj, nn.Linear)
    assert relative_error(logits(merged, tokens), expected) < 0.5


@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("broken", [0, 2, 3])  # in the order of the model: HQQ, dense, HQQ, dense
def test_a_failed_merge_restores_dense_layers_too(tokens, action, broken):
    model = quantized_llama()
    for i in (0, 1):
        model.model.layers[i].self_attn.v_proj = small_llama().model.layers[i].self_attn.v_proj
    peft_model = adapted(model)
    adapters = [m for m in peft_model.modules() if isinstance(m, OFTLayer)]
    assert [isinstance(m, HqqOFTLinear) for m in adapters] == [True, False, True, False]
    for layer in adapters:
        nn.init.normal_(layer.oft_R["default"].weight, std=0.05)
    expected = logits(peft_model, tokens)
    weight = adapters[broken].oft_R["default"].weight
    kept, weight.data[0, 0] = weight[0, 0].item(), float("nan")
    with pytest.raises(ValueError, match="seems to be broken"):
        getattr(peft_model, action)(safe_merge=True)
    weight.data[0, 0] = kept
    assert [m for m in peft_model.modules() if isinstance(m, OFTLayer)] == adapters
    assert not any(layer.merged for layer in adapters)
    assert torch.equal(logits(peft_model, tokens), expected)


def test_merging_reports_the_error_of_each_layer(caplog):
    model = adapted()
    assert model.merge_errors() == {}
    with caplog.at_level("INFO", logger="hqq_oft"):
        model.merge_adapter()
    errors = {
        f"model.layers.{i}.self_attn.{name}_proj": getattr(model.model.model.layers[i].self_attn, f"{name}_proj")
        for i in (0, 1)
        for name in "qv"
    }
    errors = {name: layer.merge_error for name, layer in errors.items()}
    assert len(errors) == 4
    assert all(0 < error < 0.5 for error in errors.values())
    assert model.merge_errors() == errors
    expected = [f"{name}: quantizing the merged weight changed it by {error:.2e}" for name, error in errors.items()]
    assert [record.getMessage() for record in caplog.records if record.name == "hqq_oft"] == expected
    model.unmerge_adapter()
    assert model.merge_errors() == {}
    model.merge_and_unload()
    assert model.merge_errors() == errors


def test_unloading_without_a_merge_reports_no_errors():
    model = adapted()
    model.unload()
    assert model.merge_errors() == {}


def test_the_progress_bar_shows_the_errors(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    model = adapted()
    layers(model)[0].oft_R["default"].weight.data[0, 0] = float("nan")
    model.merge_adapter()
    last = list(model.merge_errors().values())[-1]
    assert f"error={last:.1e}, worst=nan]" in capsys.readouterr().err.split("\r")[-1]
    model.unmerge_adapter()
    with torch.no_grad():
        layers(model)[0].oft_R["default"].weight.zero_()
    model.merge_and_unload(progressbar=True)
    assert f"worst={max(model.merge_errors().values()):.1e}" in capsys.readouterr().err


def test_a_merge_into_another_format_updates_the_quantization_config():
    model = small_llama()
    hqq_oft.quantize_model(model, group_size=16, skip_modules=["lm_head"], progress=False)
    use = {"r": 0, "oft_block_size": 8}
    merged = get_peft_model(model, OFTConfig(**use, target_modules=r".*_proj")).merge_and_unload(into=8)
    assert merged.config.quantization_config["quant_config"]["weight_quant_params"]["nbits"] == 8
    merged = get_peft_model(merged, OFTConfig(**use, target_modules=["q_proj"])).merge_and_unload(into="dense")
    dense = {f"model.layers.{index}.self_attn.q_proj" for index in range(2)}
    assert set(merged.config.quantization_config["skip_modules"]) == {"lm_head", *dense}
    targets = ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    merged = get_peft_model(merged, OFTConfig(**use, target_modules=targets)).merge_and_unload(into="dense")
    assert not hasattr(merged.config, "quantization_config")
    assert not hasattr(merged, "hqq_quantized")
