"""Each fault of OFT on HQQ in PEFT 0.21.2: reproduced in plain PEFT, and absent in this package.

Each check is run on both kinds of layer: on PEFT's it must fail, in the way that is written beside it.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import peft
import pytest
import torch
from helpers import hqq_layer, relative_error
from peft import LoraConfig, OFTConfig, get_peft_model
from peft.tuners.oft.layer import Linear as PeftLinear
from small_llama import quantized_llama
from torch import nn

import hqq_oft
from hqq_oft import HqqOFTLinear

pytestmark = pytest.mark.skipif(peft.__version__ != "0.21.2", reason="the faults are those of PEFT 0.21.2")


@pytest.fixture(autouse=True)
def _patched():
    """Instead of that of this folder: PEFT is patched only where a check says so."""


def make(kind, base, *adapters, **settings):
    """A layer of either kind with random adapters, all active, in evaluation mode."""
    config = OFTConfig(r=0, oft_block_size=8, **settings)
    cls = PeftLinear if kind == "peft" else HqqOFTLinear
    layer = cls(base, adapters[0], config=config, r=0)
    for adapter in adapters[1:]:
        layer.update_layer(adapter, r=0, config=config)
    for adapter in adapters:
        nn.init.normal_(layer.oft_R[adapter].weight, std=0.1)
    layer.set_adapter(list(adapters))
    return layer.eval()


def bias_survives_a_merge(kind):
    layer = make(kind, hqq_layer(nbits=8, group_size=8), "a")
    bias = layer.get_base_layer().bias.clone()
    layer.merge()
    assert layer.get_base_layer().bias is not None
    assert torch.equal(layer.get_base_layer().bias, bias)


def two_adapters_merge_in_the_order_of_the_forward(kind):
    layer = make(kind, hqq_layer(nbits=8, group_size=8, bias=False), "a", "b")
    x = torch.randn(5, 96)
    expected = layer(x)
    layer.merge()
    assert relative_error(layer(x), expected) <= 2e-2


def unmerging_restores_the_weight(kind):
    layer = make(kind, hqq_layer(bias=False), "a")
    weight = layer.get_base_layer().dequantize()
    layer.merge()
    layer.unmerge()
    assert relative_error(layer.get_base_layer().dequantize(), weight) <= 1e-6


def model(kind, base=None, mixed=False, **settings):
    settings = {"target_modules": ["q_proj", "v_proj"], "init_weights": False, **settings}
    with hqq_oft.patch_peft() if kind == "ours" else nullcontext():
        config = OFTConfig(r=0, oft_block_size=8, **settings)
        return get_peft_model(quantized_llama() if base is None else base, config, mixed=mixed)


def merge_and_unload_gives_an_hqq_model(kind):
    merged = model(kind).merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj).__name__ == "HQQLinear"


def unload_gives_an_hqq_model(kind):
    assert type(model(kind).unload().model.layers[0].self_attn.q_proj).__name__ == "HQQLinear"


def module_dropout_has_an_effect(kind):
    layer = make(kind, hqq_layer(), "a", module_dropout=0.5).train()
    x = torch.randn(3, 96)
    assert not torch.equal(layer(x), layer(x))


def adapter_names_choose_per_sample(kind):
    layer = make(kind, hqq_layer(), "a", "b")
    x = torch.randn(2, 96)
    layer.set_adapter("b")
    expected = layer(x)[:1]
    layer.set_adapter("a")
    assert relative_error(layer(x, adapter_names=["b", "a"])[:1], expected) <= 1e-6


def adapter_names_of_a_model_choose_per_sample(kind):
    adapted = model(kind)
    adapted.add_adapter("other", OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "v_proj"]))
    adapted.eval()
    tokens = torch.randint(0, 64, (2, 5))
    with torch.no_grad():
        adapted.set_adapter("other")  # the identity
        expected = adapted(input_ids=tokens).logits[0]
        adapted.set_adapter("default")
        mixed = adapted(input_ids=tokens, adapter_names=["other", "default"]).logits[0]
    assert relative_error(mixed, expected) <= 1e-5


def float32_input_into_a_half_precision_layer(kind):
    layer = make(kind, hqq_layer(dtype=torch.float16), "a")
    assert layer(torch.randn(3, 96)).dtype == torch.float32


def a_bias_can_be_deep_copied(kind):
    layer = make(kind, hqq_layer(), "a")
    assert copy.deepcopy(layer).get_base_layer().bias is not None


def disabling_while_merged_gives_the_base(kind):
    layer = make(kind, hqq_layer(bias=False), "a")
    x = torch.randn(3, 96)
    expected = layer.get_base_layer()(x)
    layer.merge()
    layer.enable_adapters(False)
    assert relative_error(layer(x), expected) <= 1e-6


def coft_leaves_the_parameter_alone_in_evaluation(kind):
    layer = make(kind, hqq_layer(), "a", coft=True, eps=1e-3)
    before = layer.oft_R["a"].weight.clone()
    layer(torch.randn(3, 96))
    assert torch.equal(layer.oft_R["a"].weight, before)


def layers_without_adapters_follow_autocast(kind):
    adapted, tokens = model(kind), torch.randint(0, 64, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapted(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)


def layers_without_adapters_follow_casts(kind):
    adapted = model(kind).to(torch.bfloat16)
    assert adapted(input_ids=torch.randint(0, 64, (2, 5))).logits.dtype == torch.bfloat16


def all_linear_adapts_hqq_layers(kind):
    adapted = model(kind, target_modules="all-linear")
    assert hasattr(adapted.base_model.model.model.layers[1].mlp.down_proj, "oft_R")


def packed_integers_are_not_trained(kind):
    """Viewed as floats PyTorch would let them."""
    base = quantized_llama()
    base.lm_head = hqq_layer(64, 32, bias=False, group_size=16, view_as_float=True)
    with pytest.raises(ValueError, match="packed integers can't be trained"):
        model(kind, base, modules_to_save=["lm_head"])


def lora_on_an_adapted_layer_keeps_oft(kind):
    adapted = model(kind, mixed=True)
    with hqq_oft.patch_peft() if kind == "ours" else nullcontext():
        adapted.add_adapter("lora", LoraConfig(target_modules=["q_proj"]))
    assert any("oft_R" in name for name, _ in adapted.base_model.model.model.layers[0].self_attn.q_proj.named_modules())


# check -> how it fails on plain PEFT
FAULTS = {
    bias_survives_a_merge: (AssertionError, "is not None"),
    two_adapters_merge_in_the_order_of_the_forward: (AssertionError, r"<= 0\.02"),
    unmerging_restores_the_weight: (AssertionError, "<= 1e-06"),
    merge_and_unload_gives_an_hqq_model: (AttributeError, "'HQQLinear' object has no attribute 'weight'"),
    unload_gives_an_hqq_model: (AttributeError, "'HQQLinear' object has no attribute 'weight'"),
    module_dropout_has_an_effect: (AssertionError, "torch.equal"),
    adapter_names_choose_per_sample: (TypeError, "unexpected keyword argument 'adapter_names'"),
    adapter_names_of_a_model_choose_per_sample: (AssertionError, "<= 1e-05"),
    float32_input_into_a_half_precision_layer: (RuntimeError, "same dtype"),
    a_bias_can_be_deep_copied: (RuntimeError, "graph leaves"),
    disabling_while_merged_gives_the_base: (AssertionError, "<= 1e-06"),
    coft_leaves_the_parameter_alone_in_evaluation: (AssertionError, "torch.equal"),
    layers_without_adapters_follow_autocast: (RuntimeError, "expected m1 and m2 to have the same dtype"),
    layers_without_adapters_follow_casts: (RuntimeError, "expected m1 and m2 to have the same dtype"),
    all_linear_adapts_hqq_layers: (ValueError, "No `target_modules` passed"),
    packed_integers_are_not_trained: (pytest.fail.Exception, "DID NOT RAISE"),
    lora_on_an_adapted_layer_keeps_oft: (AssertionError, "any"),
}


@pytest.mark.parametrize("check", FAULTS, ids=lambda check: check.__name__)
def test_plain_peft_fails_this_check(check):
    error, message = FAULTS[check]
    with pytest.raises(error, match=message):
        check("peft")


@pytest.mark.parametrize("check", FAULTS, ids=lambda check: check.__name__)
def test_this_package_passes_this_check(check):
    check("ours")
