"""Saving, loading, adding, switching and disabling the adapters of a model."""

from __future__ import annotations

import re
import warnings

import packaging.version
import peft
import pytest
import torch
from helpers import adapted, layers, logits, randomize, relative_error
from peft import OFTConfig, PeftModel, get_peft_model
from small_llama import quantized_llama

import hqq_oft

# Up to 0.20 PEFT has a layer of its own for HQQ, which raises in forward.
PEFT_RUNS = packaging.version.parse(peft.__version__).release >= (0, 21)


peft_runs = pytest.mark.skipif(not PEFT_RUNS, reason="PEFT's own layer over HQQ does not run")


def test_save_and_load_round_trip(tokens, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized_llama(), tmp_path).eval()
    assert len(layers(loaded)) == len(layers(model)) == 4
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_loading_through_the_meta_device(tokens, tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized_llama(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@peft_runs
@pytest.mark.parametrize("settings", [{}, {"block_share": True, "oft_block_size": 4}, {"use_cayley_neumann": False}])
def test_adapters_saved_by_either_load_in_the_other(tokens, tmp_path, settings):
    ours = adapted(**settings)
    ours.save_pretrained(tmp_path / "ours")
    hqq_oft.unpatch_peft()
    theirs = PeftModel.from_pretrained(quantized_llama(), tmp_path / "ours").eval()
    assert not layers(theirs)
    assert relative_error(logits(theirs, tokens), logits(ours, tokens)) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    with hqq_oft.patch_peft():
        back = PeftModel.from_pretrained(quantized_llama(), tmp_path / "theirs").eval()
    assert len(layers(back)) == 4
    assert torch.equal(logits(back, tokens), logits(ours, tokens))


def test_add_switch_and_delete_an_adapter(tokens):
    model = adapted()
    first = logits(model, tokens)
    model.add_adapter("second", OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj", "v_proj"]))
    randomize(model, adapter="second")
    assert torch.equal(logits(model, tokens), first)
    model.set_adapter("second")
    second = logits(model, tokens)
    assert relative_error(second, first) > 1e-3
    model.delete_adapter("default")
    assert torch.equal(logits(model, tokens), second)
    assert all(list(layer.oft_R) == ["second"] for layer in layers(model))


def test_an_adapter_on_other_modules_of_the_model(tokens):
    model = adapted()
    model.add_adapter("mlp", OFTConfig(r=0, oft_block_size=8, target_modules=["up_proj", "q_proj"]))
    randomize(model, adapter="mlp")
    model.set_adapter("mlp")
    changed = logits(model, tokens)
    model.merge_adapter()
    assert sum(layer.merged for layer in layers(model)) == 4  # v_proj has no such adapter
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already unmerged")
        model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), changed)


def test_disable_adapter(tokens):
    model = adapted()
    base = logits(quantized_llama(), tokens)
    expected = logits(model, tokens)
    with model.disable_adapter():
        assert relative_error(logits(model, tokens), base) <= 1e-6
    assert torch.equal(logits(model, tokens), expected)
    model.merge_adapter()
    with model.disable_adapter():
        assert relative_error(logits(model, tokens), base) <= 1e-6
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("name", ["mlp", "weight", "default", "base_model"])
def test_only_parameters_of_the_adapter_are_gathered_whatever_its_name(name):
    config = OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "gate_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(quantized_llama(), config, adapter_name=name)
    model.add_adapter("other", OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]))
    state = hqq_oft.full_adapter_state_dict(model, name)
    places = {re.sub(r"base_model\.model\.(model\.layers\.\d+\.)?", "", key) for key in state}
    assert places == {
        f"self_attn.q_proj.oft_R.{name}.weight",
        f"mlp.gate_proj.oft_R.{name}.weight",
        f"lm_head.modules_to_save.{name}.weight",
    }
    parameters = dict(model.named_parameters())
    assert all(torch.equal(tensor, parameters[key]) for key, tensor in state.items())
    trainable = {key for key, parameter in parameters.items() if parameter.requires_grad}
    assert trainable <= state.keys()
    with pytest.raises(ValueError, match="the model has no adapter 'self_attn'"):
        hqq_oft.full_adapter_state_dict(model, "self_attn")
