"""`merge_report` and `merge_and_unload(into=...)`: measurements, output of the merged model, and failures."""

from __future__ import annotations

import warnings

import helpers
import oracle
import pytest
import torch
from helpers import (
    add_adapter,
    logits,
    packed_bytes,
    relative_error,
    rotated_truth,
    same_bytes,
)
from hqq.core.quantize import HQQLinear
from peft import OFTConfig, get_peft_model
from small_llama import VOCABULARY, quantized_llama
from torch import nn

import hqq_oft
from hqq_oft import HqqOFTLinear, merge_report
from hqq_oft.quant import hqq_layer, quantizer
from hqq_oft.tuner import fold

TOKENS = torch.arange(12).reshape(2, 6) % VOCABULARY
TARGETS = ["q_proj", "down_proj"]


def adapted(std=0.1, nbits=4):
    return helpers.adapted(quantized_llama(nbits=nbits), std=std, use_cayley_neumann=True, target_modules=TARGETS)


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, HqqOFTLinear)}


# --- The report ------------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_merging_and_of_the_layers_outputs():
    model = adapted()
    inputs = {}

    def keep(name):
        def hook(layer, args):
            inputs[name] = args[0].double()

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers_of(model).items()]
    before = logits(model, TOKENS)
    for handle in handles:
        handle.remove()
    report = merge_report(model, {"input_ids": TOKENS}, alternatives=(8, 2, "dense"))
    assert torch.equal(logits(model, TOKENS), before)
    assert not any(layer.merged for layer in layers_of(model).values())
    assert report.layers.keys() == layers_of(model).keys()
    for into in (None, 8, 2):
        for layer in layers_of(model).values():
            layer.merge(into=into)
        for name, layer in layers_of(model).items():
            merged = oracle.of_layer(layer.get_base_layer())
            layer.unmerge()
            truth, x, effect = rotated_truth(layer, "default"), inputs[name], report.layers[name].merged[into]
            assert effect.weight == pytest.approx(relative_error(merged, truth), rel=1e-3)
            assert effect.output == pytest.approx(relative_error(x @ merged.T, x @ truth.T), rel=1e-3)
            base, share = oracle.of_layer(layer.get_base_layer()), report.layers[name].surviving[into]
            change = truth - base
            assert share == pytest.approx(float(((merged - base) * change).sum() / change.square().sum()), rel=1e-3)
            layer.merge(into=into)
        for layer in layers_of(model).values():
            layer.unmerge()
    for name, layer in layers_of(model).items():
        base, truth, x = oracle.of_layer(layer.get_base_layer()), rotated_truth(layer, "default"), inputs[name]
        found = report.layers[name]
        assert found.bits == 4
        assert found.adapter.weight == pytest.approx(relative_error(base, truth), rel=1e-3)
        assert found.adapter.output == pytest.approx(relative_error(x @ base.T, x @ truth.T), rel=1e-3)
        assert found.merged["dense"].weight < 1e-6
        assert found.surviving["dense"] == pytest.approx(1, abs=1e-5)
        assert found.bytes["dense"] == 4 * base.numel() > found.bytes[8] > found.bytes[None] > found.bytes[2]


def test_a_merge_that_loses_more_than_the_adapter_adds_warns_with_alternatives():
    with pytest.warns(
        UserWarning, match=r"(?s)Merging loses more than the adapter adds in 4 of 4 layers.*into='dense'"
    ):
        report = merge_report(adapted(std=0.02, nbits=2))
    assert report.losing == list(report.layers)
    assert str(report).count("loses more than it adds") == 4
    assert report.worst(8) < report.worst(None) / 10
    assert report.worst("dense") < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = merge_report(adapted(nbits=4), TOKENS)
    assert report.losing == report.erased == []
    for part in ("keep it unmerged", "merge_and_unload()", "merge_and_unload(into=8)", "kB"):
        assert part in str(report)


def test_the_solver_of_the_report_is_that_of_the_merge():
    model = adapted(nbits=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        reports = {solver: merge_report(model, alternatives=(3,), solver=solver) for solver in ("hqq", "search")}
    for solver, report in reports.items():
        model.merge_adapter(solver=solver)
        for name, error in model.merge_errors().items():
            assert report.layers[f"base_model.model.{name}"].merged[None].weight == pytest.approx(error)
        model.unmerge_adapter()
    for name in reports["hqq"].layers:
        ours, theirs = (reports[solver].layers[name].merged for solver in ("search", "hqq"))
        assert all(ours[into].weight < theirs[into].weight for into in (None, 3))


def test_a_small_change_that_is_rounded_away_warns():
    with pytest.warns(UserWarning, match="Less than half of the adapter's change survives a merge in 4 of 4 layers"):
        report = merge_report(adapted(std=0.003))
    assert report.erased == list(report.layers)
    assert report.least_surviving(None) < 0.2 < 0.9 < report.least_surviving("dense")
    assert "surviving at least" in str(report)


def test_all_of_no_change_survives():
    report = merge_report(adapted(std=0), alternatives=("dense",))
    assert all(layer.surviving == {None: 1, "dense": 1} for layer in report.layers.values())


def test_layers_with_nan_weights_are_reported_as_losing():
    model = adapted()
    next(iter(layers_of(model).values())).oft_R["default"].weight.data.fill_(float("nan"))
    with pytest.warns(UserWarning, match="adds in 1 of 4 layers.*survives a merge in 1 of 4 layers"):
        report = merge_report(model)
    assert report.erased == report.losing == [next(iter(layers_of(model)))]


def test_a_sample_may_miss_layers_or_be_a_tensor_and_the_training_mode_is_kept():
    model = adapted().train()
    report = merge_report(model, (TOKENS,), alternatives=())
    assert all(layer.merged[None].output is not None for layer in report.layers.values())
    assert all(module.training for module in model.modules() if not isinstance(module, HQQLinear))
    alone = nn.ModuleList(list(layers_of(adapted()).values()))
    alone.forward = lambda x: alone[0](x)
    report = merge_report(alone, torch.randn(3, 32), alternatives=())
    assert [layer.merged[None].output is None for layer in report.layers.values()] == [False, True, True, True]
    assert "-" in str(report)


@pytest.mark.parametrize(
    ("prepare", "settings", "error", "message"),
    [
        (lambda model: model.merge_adapter(), {}, ValueError, "q_proj is merged: unmerge first"),
        (lambda model: None, {"alternatives": [7]}, ValueError, r"into must be None, 'dense' or one of \[8, 6"),
        (lambda model: None, {"alternatives": ["thin"]}, ValueError, "got 'thin'"),
        (lambda model: None, {"solver": "best"}, ValueError, "solver must be .* got 'best'"),
        (lambda model: None, {"adapter_names": ["other"]}, ValueError, "no layer has an active adapter to merge"),
        (lambda model: hqq_oft.revert(model), {}, ValueError, "has no HqqOFTLinear to merge"),
    ],
)
def test_merge_report_raises_for_merged_models_and_invalid_arguments(prepare, settings, error, message):
    model = adapted()
    prepare(model)
    with pytest.raises(error, match=message):
        merge_report(model, **settings)


# --- Merging into other layers ---------------------------------------------------------------------------------------


def test_into_dense_gives_linear_layers_that_compute_the_adapted_model():
    model = adapted()
    expected, biases = logits(model, TOKENS), {n: layer.get_base_layer().bias for n, layer in layers_of(model).items()}
    merged = model.merge_and_unload(into="dense", safe_merge=True)
    assert relative_error(logits(merged, TOKENS), expected) < 1e-5
    for name, bias in biases.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear
        assert not layer.weight.requires_grad
        assert layer.bias is bias or torch.equal(layer.bias, bias)
    assert isinstance(merged.model.layers[0].self_attn.k_proj, HQQLinear)
    assert merged.hqq_quantized
    assert len(model.merge_errors()) == 4
    assert max(model.merge_errors().values()) < 1e-6


def test_a_model_without_hqq_layers_no_longer_says_that_it_is_quantized():
    config = OFTConfig(r=0, oft_block_size=8, target_modules=r".*_proj")
    merged = get_peft_model(quantized_llama(), config).merge_and_unload(into="dense")
    assert not any(isinstance(module, HQQLinear) for module in merged.modules())
    assert not hasattr(merged, "hqq_quantized")


@pytest.mark.parametrize("first", [False, True])
def test_into_more_bits_loses_less_whether_merged_before_or_not(first):
    model, plain = adapted(nbits=2), adapted(nbits=2)
    expected = logits(model, TOKENS)
    if first:
        model.merge_adapter()
    merged = model.merge_and_unload(into=8)
    assert merged.model.layers[0].mlp.down_proj.meta["nbits"] == 8
    settings = hqq_layer.quantization_settings(merged.model.layers[0].mlp.down_proj)["weight_quant_params"]
    assert (settings["nbits"], settings["round_zero"]) == (8, False)
    assert merged.model.layers[0].mlp.up_proj.meta["nbits"] == 2
    assert (
        relative_error(logits(merged, TOKENS), expected)
        < relative_error(logits(plain.merge_and_unload(), TOKENS), expected) / 10
    )


def test_a_layer_merged_into_other_bits_unmerges_to_the_same_bytes():
    layer = next(iter(layers_of(adapted(nbits=3)).values()))
    add_adapter(layer, "more", std=0.1)
    before = packed_bytes(layer.get_base_layer())
    layer.merge(into=8)
    assert layer.get_base_layer().meta["nbits"] == 8
    layer.merge(into=4)  # from the pristine weight, not from eight bits
    four = packed_bytes(layer.get_base_layer())
    layer.unmerge()
    assert same_bytes(layer.get_base_layer(), before)
    layer.merge(into=4)
    assert same_bytes(layer.get_base_layer(), four)
    layer.unmerge()
    assert same_bytes(layer.get_base_layer(), before)


@pytest.mark.parametrize("into", [7, "thin", 0])
def test_merging_into_an_unsupported_target_raises(into):
    model = adapted()
    with pytest.raises(ValueError, match="into must be None, 'dense' or one of"):
        model.merge_and_unload(into=into)
    assert len(layers_of(model)) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@pytest.mark.parametrize("into", [None, 8, "dense"])
def test_a_merge_interrupted_at_any_layer_changes_nothing(monkeypatch, error, nth, into):
    model = adapted()
    expected, layers, done = logits(model, TOKENS), layers_of(model), []
    bytes_before = {name: packed_bytes(layer.get_base_layer()) for name, layer in layers.items()}
    module, function = (fold, "rotate_weight") if into == "dense" else (quantizer, "requantize")
    original = getattr(module, function)

    def failing(*args):
        done.append(args)
        if len(done) == nth:
            raise error
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, function, failing)
        with pytest.raises(error):
            model.merge_and_unload(into=into)
    assert layers_of(model) == layers
    assert all(same_bytes(layer.get_base_layer(), bytes_before[name]) for name, layer in layers.items())
    assert torch.equal(logits(model, TOKENS), expected)
    model.merge_and_unload(into=into)
    assert not layers_of(model)


def test_a_failure_while_layers_are_swapped_changes_nothing(monkeypatch):
    model = adapted()
    expected, layers = logits(model, TOKENS), layers_of(model)
    monkeypatch.setattr(type(model.base_model), "_replace_module", None)
    with pytest.raises(TypeError):
        model.merge_and_unload()
    assert layers_of(model) == layers
    assert torch.equal(logits(model, TOKENS), expected)
