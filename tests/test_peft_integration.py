"""Whole models through PEFT: the documented uses, patching, converting, saving and loading.

These tests run on every PEFT version that the project supports.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import warnings

import packaging.version
import peft
import pytest
import torch
from helpers import layers, randomize, relative_error
from hqq.core.quantize import HQQLinear
from peft import OFTConfig, PeftModel, get_peft_model
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.oft.model import OFTModel
from small_llama import VOCABULARY, quantize, quantized_llama, small_llama
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
USE_4 = {
    "r": 16,
    "oft_block_size": 0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "module_dropout": 0.05,
    "coft": True,
    "eps": 1e-4,
    "use_cayley_neumann": True,
    "num_cayley_neumann_terms": 7,
}


@pytest.fixture(autouse=True)
def _patched():
    with hqq_oft.patch_peft():
        yield
    hqq_oft.unpatch_peft()


@pytest.fixture
def tokens():
    return torch.randint(0, VOCABULARY, (3, 12))


def adapted(std: float = 0.05, model=None, **settings):
    settings = {"r": 0, "oft_block_size": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    peft_model = get_peft_model(quantized_llama() if model is None else model, OFTConfig(**settings))
    randomize(peft_model, std, "default")
    return peft_model.eval()


@torch.no_grad()
def logits(model, tokens, **kwargs):
    return model(input_ids=tokens, **kwargs).logits


def train(model, tokens, steps=8, lr=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# --- The five documented uses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [USE_1, USE_4], ids=["use 1", "use 4"])
def test_use_1_and_4_get_peft_model_and_train(settings, tokens):
    if settings is USE_4:
        settings = {**settings, "eps": 1.0}  # 1e-4 allows rotations too small to lower a loss in eight steps
    model = get_peft_model(quantized_llama(), OFTConfig(**settings)).train()
    found = layers(model)
    assert len(found) == 2 * len(settings["target_modules"])
    assert all(layer.r["default"] == settings["r"] for layer in found)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == len(found)
    assert all(name.endswith("oft_R.default.weight") for name in trainable)
    losses = train(model, tokens)
    assert losses[-1] < losses[0] - 0.02
    packed = {name: module.W_q for name, module in quantized_llama().named_modules() if isinstance(module, HQQLinear)}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, HqqOFTLinear):
            assert torch.equal(module.base_layer.W_q, packed[name])


def test_use_4_as_documented(tokens):
    model = get_peft_model(quantized_llama(), OFTConfig(**USE_4)).train()
    randomize(model, 0.1, "default")
    train(model, tokens, steps=2)
    model(input_ids=tokens)  # projects the parameters that the last step changed
    for layer in layers(model):
        norms = (2 * layer.oft_R["default"].weight.detach().square().sum(1)).sqrt()
        assert norms.max() <= 1e-4 / 4 * (1 + 1e-5)


def test_use_2_merge_infer_unmerge(tokens):
    model = adapted()
    expected = logits(model, tokens)
    model.merge_adapter()
    merged = logits(model, tokens)
    assert all(layer.merged for layer in layers(model))
    assert 0 < relative_error(merged, expected) < 0.5  # one more quantization at 4 bits
    model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)


def test_use_3_safe_merge_of_a_broken_adapter(tokens):
    model = adapted()
    expected = logits(model, tokens)
    broken = layers(model)[2]
    kept, broken.oft_R["default"].weight.data[0, 0] = broken.oft_R["default"].weight[0, 0].item(), float("nan")
    with pytest.raises(ValueError, match="the adapter 'default' seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in layers(model))  # the layers before the broken one were restored
    broken.oft_R["default"].weight.data[0, 0] = kept
    assert torch.equal(logits(model, tokens), expected)


def test_use_5_one_of_two_adapters_merged(tokens, tmp_path):
    for seed, name in enumerate(("task1", "task2")):
        torch.manual_seed(seed)
        adapted(0.1).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(quantized_llama(), tmp_path / "task1", adapter_name="task1")
    model.load_adapter(tmp_path / "task2", adapter_name="task2")
    model.eval()
    model.base_model.set_adapter(["task1", "task2"])
    both = logits(model, tokens)
    with pytest.warns(UserWarning, match=r"the active adapter\(s\) \['task2'\] are not merged"):
        model.merge_adapter(adapter_names=["task1"])
    assert all(layer.merged_adapters == ["task1"] for layer in layers(model))
    merged = logits(model, tokens)
    model.unmerge_adapter()
    model.set_adapter("task1")
    assert relative_error(merged, logits(model, tokens)) < relative_error(merged, both)
    model.base_model.set_adapter(["task1", "task2"])
    assert torch.equal(logits(model, tokens), both)


# --- Loading, saving, unloading --------------------------------------------------------------------------------------


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
    assert all(layer._all_available_adapter_names() == ["second"] for layer in layers(model))


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
    original = hqq_layer.requantize

    def fail_at_the_third(base, dense, into):
        done.append(base)
        if len(done) == 3:
            raise error
        return original(base, dense, into)

    with monkeypatch.context() as patch:
        patch.setattr(hqq_layer, "requantize", fail_at_the_third)
        with pytest.raises(error):
            getattr(model, action)()
    assert len(done) == 3
    assert len(layers(model)) == 4
    assert not any(layer.merged for layer in layers(model))
    assert torch.equal(logits(model, tokens), expected)


def test_a_model_that_mixes_quantized_and_dense_layers(tokens):
    model = quantized_llama()
    model.model.layers[1].self_attn.q_proj = small_llama().model.layers[1].self_attn.q_proj
    peft_model = adapted(model=model)
    assert len(layers(peft_model)) == 3
    expected = logits(peft_model, tokens)
    merged = peft_model.merge_and_unload()
    assert isinstance(merged.model.layers[1].self_attn.q_proj, nn.Linear)
    assert relative_error(logits(merged, tokens), expected) < 0.5
    with pytest.raises(ValueError, match=r"not HQQ-quantized \(Linear\)"):
        logits(adapted(model=merged), tokens, adapter_names=["default"] * 3)


@pytest.mark.parametrize("action", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("broken", [0, 2, 3])  # in the order of the model: HQQ, dense, HQQ, dense
def test_a_failed_merge_restores_dense_layers_too(tokens, action, broken):
    model = quantized_llama()
    for i in (0, 1):
        model.model.layers[i].self_attn.v_proj = small_llama().model.layers[i].self_attn.v_proj
    peft_model = adapted(model=model)
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


# --- Mixed batches ---------------------------------------------------------------------------------------------------


def two_tasks():
    model = adapted()
    model.add_adapter("second", OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"]))
    randomize(model, 0.1, "second")
    return model


def alone(model, tokens, name, call):
    if name == "__base__":
        with model.disable_adapter():
            return call(model, tokens)
    model.set_adapter(name)
    return call(model, tokens)


def test_adapter_names_in_forward_and_generate(tokens):
    model = two_tasks()
    names = ["second", "__base__", "default"]

    def generate(model, tokens, **kwargs):
        settings = {
            "max_new_tokens": 6,
            "do_sample": False,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(tokens),
        }
        return model.generate(input_ids=tokens, **settings, **kwargs)

    mixed = logits(model, tokens, adapter_names=names)
    generated = generate(model, tokens, adapter_names=names)
    for row, name in enumerate(names):
        assert relative_error(mixed[row : row + 1], alone(model, tokens[row : row + 1], name, logits)) <= 1e-5
        assert torch.equal(generated[row : row + 1], alone(model, tokens[row : row + 1], name, generate))
    model.set_adapter("default")
    hooks = [layer._forward_pre_hooks for layer in layers(model)]
    assert not any(hooks)


def test_adapter_names_with_beam_search(tokens):
    model = two_tasks()

    def generate(model, tokens, **kwargs):
        settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings, **kwargs)

    names = ["default", "second", "__base__"]
    generated = generate(model, tokens, adapter_names=names)
    for row, name in enumerate(names):
        expected = alone(model, tokens[row : row + 1], name, generate)
        assert torch.equal(generated[row : row + 1, : expected.shape[1]], expected)


def test_errors_of_adapter_names(tokens):
    model = two_tasks()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): typo"):
        logits(model, tokens, adapter_names=["typo", "default", "default"])
    with pytest.raises(ValueError, match="same as the number of inputs, but got 2 and 3"):
        logits(model, tokens, adapter_names=["default"] * 2)
    with pytest.raises(TypeError, match="expected a list of str"):
        logits(model, tokens, adapter_names="default")
    with pytest.raises(ValueError, match="when the model is in training mode"):
        logits(model.train(), tokens, adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        logits(model, tokens, adapter_names=["default"] * 3)
    assert not any(layer._forward_pre_hooks for layer in layers(model))


# --- Patching --------------------------------------------------------------------------------------------------------


def test_patching_is_idempotent_and_reversible():
    hqq_oft.unpatch_peft()
    before = {name: vars(OFTModel).get(name) for name in dir(OFTModel)}
    modules = set(sys.modules)
    hqq_oft.patch_peft()
    patched = {name: vars(OFTModel).get(name) for name in dir(OFTModel)}
    hqq_oft.patch_peft()
    assert {name: vars(OFTModel).get(name) for name in dir(OFTModel)} == patched != before
    hqq_oft.unpatch_peft()
    hqq_oft.unpatch_peft()
    assert {name: vars(OFTModel).get(name) for name in dir(OFTModel)} == before
    assert set(sys.modules) == modules


def test_a_patch_block_inside_a_permanent_patch_does_not_remove_it():
    with hqq_oft.patch_peft():
        pass
    assert len(layers(adapted())) == 4
    hqq_oft.unpatch_peft()
    with hqq_oft.patch_peft():
        assert len(layers(adapted())) == 4
    if PEFT_RUNS:
        assert not layers(get_peft_model(quantized_llama(), OFTConfig(**USE_1)))


def test_a_permanent_patch_outlives_an_enclosing_patch_block():
    hqq_oft.unpatch_peft()
    with hqq_oft.patch_peft():
        hqq_oft.patch_peft()
    assert len(layers(adapted())) == 4
    hqq_oft.unpatch_peft()
    with hqq_oft.patch_peft(), hqq_oft.patch_peft():
        assert len(layers(adapted())) == 4
    if PEFT_RUNS:
        assert not layers(get_peft_model(quantized_llama(), OFTConfig(**USE_1)))


@pytest.mark.parametrize("outlived", [False, True])
@pytest.mark.parametrize("action", ["unload", "merge_and_unload"])
def test_mixed_models_unload_hqq_layers(action, outlived):
    settings = {"r": 0, "oft_block_size": 8, "target_modules": ["q_proj"]}
    model = get_peft_model(quantized_llama(), OFTConfig(**settings), mixed=True)
    assert len(layers(model)) == 2
    if outlived:
        hqq_oft.unpatch_peft()
    unloaded = getattr(model, action)()
    assert isinstance(unloaded.model.layers[0].self_attn.q_proj, HQQLinear)


def test_the_old_import_path_works_while_patched():
    module = importlib.import_module("peft.tuners.oft.hqq")
    assert module.HqqOFTLinear is HqqOFTLinear
    assert module.dispatch_hqq is hqq_oft.dispatch_hqq
    assert importlib.util.find_spec("peft.tuners.oft.hqq").name == "peft.tuners.oft.hqq"
    hqq_oft.unpatch_peft()
    if PEFT_RUNS:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("peft.tuners.oft.hqq")
    else:
        assert importlib.import_module("peft.tuners.oft.hqq").HqqOFTLinear is not HqqOFTLinear


def test_a_model_outlives_the_patch(tokens):
    model = adapted()
    hqq_oft.unpatch_peft()
    expected = logits(model, tokens)
    assert relative_error(logits(copy.deepcopy(model), tokens), expected) == 0
    assert logits(model, tokens, adapter_names=["default"] * 3).shape == expected.shape
    assert isinstance(model.base_model, OFTModel)
    assert not layers(model.merge_and_unload())


def test_layers_other_than_hqq_use_pefts_layer():
    model = get_peft_model(small_llama(), OFTConfig(**USE_1))
    assert not layers(model)
    assert type(model.base_model) is OFTModel


# --- Converting ------------------------------------------------------------------------------------------------------


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


def test_convert_shares_parameters_and_revert_undoes_it(tokens):
    model = plain_peft_model()
    before = dict(model.named_parameters())
    modules = {name: type(module) for name, module in model.named_modules()}
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
    assert {name: type(module) for name, module in model.named_modules()} == modules
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
    classes = [type(module) for module in model.modules()]
    original, calls = HqqOFTLinear._take_base_layer, []

    def fail_at_the_second(self):
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError
        original(self)

    monkeypatch.setattr(HqqOFTLinear, "_take_base_layer", fail_at_the_second)
    with pytest.raises(MemoryError):
        hqq_oft.convert(model)
    assert [type(module) for module in model.modules()] == classes


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
    layers(model)[0].keep_pristine = "host"
    layers(model)[0].note = "mine"
    expected = logits(model, tokens)
    hqq_oft.revert(model)
    assert not layers(model)
    hqq_oft.convert(model)
    assert len(layers(model)) == 4
    assert all(layer.active_adapters == ["second"] for layer in layers(model))
    assert all(layer.disable_adapters is disabled for layer in layers(model))
    assert (layers(model)[0].keep_pristine, layers(model)[0].note) == ("host", "mine")
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
    with pytest.raises(TypeError, match="expected a model with OFT adapters, got LlamaForCausalLM without any"):
        hqq_oft.convert(small_llama())
    with pytest.raises(TypeError, match="expected a model with OFT adapters"):
        hqq_oft.revert(small_llama())


# --- Training the way people do --------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients(tokens):
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(module_dropout=0.5).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        model(input_ids=tokens, labels=tokens).loss.backward()
        grads.append(torch.cat([layer.oft_R["default"].weight.grad.flatten() for layer in layers(model)]))
    assert relative_error(grads[1], grads[0]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_train_and_unmerge(tokens, dtype):
    model = adapted(model=quantize(small_llama().to(dtype), dtype=dtype)).train()
    with torch.autocast("cpu", dtype=dtype):
        losses = train(model, tokens)
    assert losses[-1] < losses[0] - 0.02
    model.eval()
    expected = logits(model, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.merge_adapter()
        model.unmerge_adapter()
    assert torch.equal(logits(model, tokens), expected)
