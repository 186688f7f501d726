"""`patch_peft` and `unpatch_peft`."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import warnings

import packaging.version
import peft
import pytest
from helpers import adapted, layers, logits, relative_error
from hqq.core.quantize import HQQLinear
from peft import OFTConfig, get_peft_model
from peft.tuners.oft.layer import Linear as PeftLinear
from peft.tuners.oft.layer import OFTLayer
from peft.tuners.oft.model import OFTModel
from small_llama import quantized_llama, small_llama
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig

import hqq_oft
from hqq_oft import HqqOFTLinear
from hqq_oft.tuner import distributed, unpatched
from hqq_oft.tuner.model import HqqOFTModel

# Up to 0.20 PEFT has a layer of its own for HQQ, which raises in forward.
PEFT_RUNS = packaging.version.parse(peft.__version__).release >= (0, 21)


USE_1 = {"r": 8, "oft_block_size": 0, "target_modules": ["q_proj", "v_proj"], "module_dropout": 0.1}


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


def test_the_patch_puts_the_layer_for_any_linear_layer_on_dense_ones():
    def classes():
        model = get_peft_model(small_llama(), OFTConfig(**USE_1))
        return {type(module) for module in model.modules() if isinstance(module, OFTLayer)}, type(model.base_model)

    assert classes() == ({hqq_oft.OFTLinear}, HqqOFTModel)
    hqq_oft.unpatch_peft()
    assert classes() == ({PeftLinear}, OFTModel)


@pytest.mark.skipif(peft.__version__.startswith("0.20."), reason="PEFT 0.20 fails before it wraps the layer")
def test_forgetting_the_patch_warns_once():
    hqq_oft.unpatch_peft()
    unpatched._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            get_peft_model(quantized_llama(), OFTConfig(**USE_1))
    messages = [str(warning.message) for warning in caught if "hqq_oft" in str(warning.message)]
    assert len(messages) == 1
    assert "hqq_oft.patch_peft() before adding adapters, or hqq_oft.convert(model)" in messages[0]


def test_our_layers_and_dense_ones_do_not_warn():
    unpatched._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hqq_oft")
        adapted()
        hqq_oft.unpatch_peft()
        get_peft_model(small_llama(), OFTConfig(**USE_1))


def test_a_patch_that_fails_halfway_is_undone_and_can_be_applied_again(monkeypatch):
    hqq_oft.unpatch_peft()
    before = vars(OFTModel).copy(), dict(AUTO_QUANTIZER_MAPPING), AutoQuantizationConfig.from_dict
    with monkeypatch.context() as broken:
        broken.setattr(distributed, "patches", lambda: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                hqq_oft.patch_peft()
            assert before == (vars(OFTModel).copy(), dict(AUTO_QUANTIZER_MAPPING), AutoQuantizationConfig.from_dict)
    hqq_oft.patch_peft()
    assert len(layers(adapted())) == 4


def test_patch_peft_applies_patch_transformers_each_time():
    original = unpatched_from_dict()
    hqq_oft.patch_peft()
    hqq_oft.unpatch_transformers()
    assert AutoQuantizationConfig.from_dict == original
    with hqq_oft.patch_transformers():
        hqq_oft.patch_peft()
    assert AutoQuantizationConfig.from_dict != original
    hqq_oft.unpatch_peft()
    assert AutoQuantizationConfig.from_dict == original


def test_patch_transformers_outlives_patch_peft():
    original = unpatched_from_dict()
    with hqq_oft.patch_transformers():
        with hqq_oft.patch_peft():
            pass
        assert AutoQuantizationConfig.from_dict != original
    assert AutoQuantizationConfig.from_dict == original


def unpatched_from_dict():
    hqq_oft.unpatch_peft()
    hqq_oft.unpatch_transformers()
    return AutoQuantizationConfig.from_dict
