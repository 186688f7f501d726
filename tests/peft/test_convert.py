"""`convert` and `revert`: existing models, their optimizers, hooks and tuners."""

from __future__ import annotations

import copy
import pickle

import packaging.version
import peft
import pytest
import torch
from helpers import adapted, layers, logits, randomize, relative_error
from hqq.core.quantize import HQQLinear
from peft import OFTConfig, get_peft_model
from peft.tuners.oft.model import OFTModel
from small_llama import quantized_llama, small_llama
from torch import nn

import hqq_oft
from hqq_oft import HqqOFTLinear
from hqq_oft.quant import hqq_layer

# Up to 0.20 PEFT has a layer of its own for HQQ, which raises in forward.
PEFT_RUNS = packaging.version.parse(peft.__version__).release >= (0, 21)


# In 0.20 it can't even be built.
PEFT_BUILDS = packaging.version.parse(peft.__version__).release[:2] != (0, 20)


peft_runs = pytest.mark.skipif(not PEFT_RUNS, reason="PEFT's own layer over HQQ does not run")
USE_1 = {"r": 8, "oft_block_size": 0, "target_modules": ["q_proj", "v_proj"], "module_dropout": 0.1}


def plain_peft_model(mixed=False, **settings):
    settings = {"r": 0, "oft_block_size": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    if not PEFT_BUILDS:
        model = get_peft_model(quantized_llama(), OFTConfig(**settings), mixed=mixed)
        hqq_oft.revert(model)
    hqq_oft.unpatch_peft()
    if PEFT_BUILDS:
        model = get_peft_model(quantized_llama(), OFTConfig(**settings), mixed=mixed)
    assert not layers(model)
    for name, parameter in model.named_parameters():
        if "oft_R" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def classes(model):
    """Of all modules but HQQ's, which keep the class that they are given."""
    return {name: type(module) for name, module in model.named_modules() if not isinstance(module, HQQLinear)}


def test_convert_shares_parameters_and_revert_undoes_it(tokens):
    model = plain_peft_model()
    before = dict(model.named_parameters())
    modules = classes(model)
    report = hqq_oft.convert(model)
    assert sorted(report.replaced) == sorted(
        f"base_model.model.model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"
    )
    assert report.kept == {}
    assert "4 layer(s) replaced, 0 kept" in str(report)
    assert len(layers(model)) == 4
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert not any(layer.training for layer in layers(model))
    converted = logits(model, tokens)
    report = hqq_oft.revert(model)
    assert len(report.replaced) == 4
    assert classes(model) == modules
    assert all(p is before[name] for name, p in model.named_parameters())
    hqq_oft.convert(model)
    assert torch.equal(logits(model, tokens), converted)
    assert not layers(model.unload())


@pytest.mark.parametrize("action", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("given", ["model", "tuner", "a module around it"])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_tuner_is_converted_and_reverted_anywhere_in_the_model(mixed, given, action):
    model = plain_peft_model(mixed)
    tuner = model.base_model
    given = {"model": model, "tuner": tuner, "a module around it": nn.ModuleList([model])}[given]
    original = type(tuner)
    hqq_oft.convert(given)
    hqq_oft.revert(given)
    assert type(tuner) is original
    hqq_oft.convert(given)
    assert len(layers(tuner)) == 4
    unloaded = getattr(tuner, action)()
    assert isinstance(unloaded.model.layers[0].self_attn.q_proj, HQQLinear)


@peft_runs
def test_a_converted_model_computes_the_same_and_trains_on_with_its_optimizer(tokens):
    model = plain_peft_model().train()
    expected = logits(model, tokens)
    twin = copy.deepcopy(model)
    results = []
    for candidate, switch in ((model, True), (twin, False)):
        optimizer = torch.optim.AdamW([p for p in candidate.parameters() if p.requires_grad], lr=1e-2)
        for step in range(4):
            if switch and step == 2:
                hqq_oft.convert(candidate)
            candidate(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(logits(candidate, tokens))
    assert relative_error(results[0], expected) > 1e-3
    assert relative_error(*results) <= 1e-4


@peft_runs
def test_layers_that_are_not_converted_are_reported_with_the_reason():
    model = plain_peft_model(target_modules=["q_proj", "v_proj", "lm_head"])
    first = model.base_model.model.model.layers[0].self_attn.q_proj
    first.merge()
    report = hqq_oft.convert(model)
    assert len(report.replaced) == 3
    prefix = "base_model.model."
    assert report.kept == {
        f"{prefix}model.layers.0.self_attn.q_proj": (
            "['default'] are merged into it, and its pristine weight is lost: unmerge first"
        ),
        f"{prefix}lm_head": "its base layer is a Linear, not an HQQLinear",
    }
    assert f"  kept {prefix}lm_head: its base layer is a Linear" in str(report)
    assert "already" in hqq_oft.convert(model).kept[f"{prefix}model.layers.0.self_attn.v_proj"]


def test_merged_layers_are_not_reverted(tokens):
    model = adapted()
    model.merge_adapter()
    expected = logits(model, tokens)
    report = hqq_oft.revert(model)
    assert report.replaced == []
    assert all("unmerge first" in reason for reason in report.kept.values())
    assert torch.equal(logits(model, tokens), expected)


def test_hooks_survive_conversion(tokens):
    model = plain_peft_model()
    layer, seen = model.base_model.model.model.layers[0].self_attn.q_proj, []
    layer.register_forward_hook(lambda module, args, kwargs, out: seen.append(type(module)), with_kwargs=True)
    hqq_oft.convert(model)
    logits(model, tokens)
    assert seen == [HqqOFTLinear]


def test_hook_handles_remove_their_hooks_after_conversion(tokens):
    model = plain_peft_model()
    layer, seen = model.base_model.model.model.layers[0].self_attn.q_proj, []

    def note(*args):
        seen.append(args)

    handles = [
        layer.register_forward_hook(note),
        layer.register_forward_pre_hook(note),
        layer.register_forward_hook(lambda *args, **kwargs: note(args, kwargs), with_kwargs=True, always_call=True),
        layer.register_state_dict_post_hook(note),
        layer.register_load_state_dict_pre_hook(note),
        layer.register_load_state_dict_post_hook(note),
    ]

    def use():
        seen.clear()
        logits(model, tokens)
        layer.load_state_dict(layer.state_dict())
        return len(seen)

    for switch in (hqq_oft.convert, hqq_oft.revert, hqq_oft.convert):
        switch(model)
    assert use() == len(handles)
    for handle in handles:
        handle.remove()
    assert use() == 0


@peft_runs
def test_a_compiled_layer_is_recompiled_after_conversion():
    torch._dynamo.reset()
    holder = nn.ModuleList([plain_peft_model().base_model.model.model.layers[0].self_attn.q_proj])
    holder[0].compile(backend="eager")
    x = torch.randn(2, holder[0].in_features)
    expected = holder[0](x)
    hqq_oft.convert(holder)
    assert relative_error(holder[0](x), expected) <= 1e-5
    assert holder[0](x.half()).dtype == torch.float16  # PEFT's layer refuses another dtype than the base's


def test_a_conversion_that_fails_changes_no_layer(monkeypatch):
    model = plain_peft_model()
    before = classes(model)
    original, calls = hqq_layer.take_over, []

    def fail_at_the_second(base):
        calls.append(base)
        if len(calls) == 2:
            raise MemoryError
        original(base)

    monkeypatch.setattr(hqq_layer, "take_over", fail_at_the_second)
    with pytest.raises(MemoryError):
        hqq_oft.convert(model)
    assert classes(model) == before


def test_a_layer_used_in_two_places_stays_shared():
    model = plain_peft_model()
    attention = [model.base_model.model.model.layers[i].self_attn for i in (0, 1)]
    attention[1].q_proj = attention[0].q_proj
    hqq_oft.convert(model)
    assert attention[1].q_proj is attention[0].q_proj
    assert isinstance(attention[0].q_proj, HqqOFTLinear)


def test_a_layer_with_two_names_in_one_parent_stays_shared():
    model = plain_peft_model()
    attention = model.base_model.model.model.layers[0].self_attn
    attention.alias = attention.q_proj
    hqq_oft.convert(model)
    assert isinstance(attention.q_proj, HqqOFTLinear)
    assert attention.alias is attention.q_proj


@pytest.mark.parametrize("disabled", [False, True])
def test_conversion_keeps_adapters_switches_and_attributes(tokens, disabled):
    model = adapted()
    model.add_adapter("second", OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"]))
    randomize(model, 0.1, "second")
    model.set_adapter("second")
    if disabled:
        model.base_model.disable_adapter_layers()
    layers(model)[0].keep_pristine = "cpu"
    layers(model)[0].note = "mine"
    expected = logits(model, tokens)
    hqq_oft.revert(model)
    assert not layers(model)
    hqq_oft.convert(model)
    assert len(layers(model)) == 4
    assert all(layer.active_adapters == ["second"] for layer in layers(model))
    assert all(layer.disable_adapters is disabled for layer in layers(model))
    assert (layers(model)[0].keep_pristine, layers(model)[0].note) == ("cpu", "mine")
    assert torch.equal(logits(model, tokens), expected)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)


def test_layers_whose_forward_was_replaced_are_kept():
    model = plain_peft_model()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.forward = layer.forward
    report = hqq_oft.convert(model)
    assert len(report.replaced) == 3
    assert list(report.kept.values()) == ["its forward was replaced (accelerate does that): remove the hook first"]


@peft_runs
def test_models_of_transformers_own_integration_convert(tokens):
    hqq_oft.unpatch_peft()
    model = quantized_llama()
    model.add_adapter(OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"], init_weights=False))
    expected = logits(model.eval(), tokens)
    assert len(hqq_oft.convert(model).replaced) == 2
    assert relative_error(logits(model, tokens), expected) <= 1e-5


def test_converting_a_model_without_hqq_layers_changes_nothing():
    model = get_peft_model(small_llama(), OFTConfig(**USE_1))
    report = hqq_oft.convert(model)
    assert report.replaced == []
    assert len(report.kept) == 4
    assert type(model.base_model) is OFTModel


def test_only_models_with_oft_are_converted():
    with pytest.raises(ValueError, match="expected a model with OFT adapters, got LlamaForCausalLM without any"):
        hqq_oft.convert(small_llama())
    with pytest.raises(ValueError, match="expected a model with OFT adapters"):
        hqq_oft.revert(small_llama())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_reverted_models_are_copied_and_converted_again(tokens, how):
    if how == "pickle" and packaging.version.parse(peft.__version__).release < (0, 21):
        pytest.skip("the patch replaces this PEFT's class in its module, where pickle looks for it")
    model = adapted()
    expected = logits(model, tokens)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not hqq_oft.revert(model).kept
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    for each in (copied, model):
        assert len(hqq_oft.convert(each).replaced) == 4
        assert torch.equal(logits(each, tokens), expected)
        assert all(layer.merged_adapters == [] for layer in layers(each))
    copied.merge_adapter()
    assert all(layer.merged_adapters == ["default"] for layer in layers(copied))
    assert torch.equal(logits(model, tokens), expected)
    assert not any(layer.merged for layer in layers(model))
    copied.unmerge_adapter()
    assert torch.equal(logits(copied, tokens), expected)


def test_a_failed_conversion_leaves_layers_of_peft_that_can_be_copied(tokens, monkeypatch):
    model = adapted()
    assert not hqq_oft.revert(model).kept
    taken = []

    def failing(layer):
        taken.append(layer)
        if len(taken) == 3:
            raise MemoryError
        original(layer)

    original = hqq_oft.HqqOFTLinear._take_base_layer
    with monkeypatch.context() as patch:
        patch.setattr(hqq_oft.HqqOFTLinear, "_take_base_layer", failing)
        with pytest.raises(MemoryError):
            hqq_oft.convert(model)
    assert not layers(model)
    copied = copy.deepcopy(model)
    assert len(hqq_oft.convert(copied).replaced) == 4
