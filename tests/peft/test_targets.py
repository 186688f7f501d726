"""What a configuration may name on a model with HQQ layers: `target_modules="all-linear"` and `modules_to_save`."""

from __future__ import annotations

import pytest
import torch
from helpers import hqq_layer, layers, logits, relative_error
from hqq.core.quantize import HQQLinear
from peft import LoraConfig, OFTConfig, PeftModel, TaskType, get_peft_model
from small_llama import VOCABULARY, quantized_llama, small_llama
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification

import hqq_oft
from hqq_oft import HqqOFTLinear, OFTLinear

USE = {"r": 0, "oft_block_size": 8}
PROJECTIONS = 14  # of both layers


def classifier(labels=8):
    """With everything quantized, its head too."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=labels,
        pad_token_id=0,
    )
    model = LlamaForSequenceClassification(config)
    hqq_oft.quantize_model(model, group_size=16, progress=False)
    if not isinstance(model.score, HQQLinear):
        model.score = hqq_layer(labels, 32, bias=False, group_size=16)
    return model


@pytest.mark.parametrize("mixed", [False, True])
def test_all_linear_adapts_every_hqq_layer_but_the_output_layer(mixed, tokens):
    base = quantized_llama()
    base.lm_head = hqq_layer(VOCABULARY, 32, bias=False, group_size=16)
    projections = {name for name, module in base.named_modules() if isinstance(module, HQQLinear)} - {"lm_head"}
    model = get_peft_model(base, OFTConfig(**USE, target_modules="all-linear"), mixed=mixed)
    assert len(projections) == PROJECTIONS
    assert {name for name, module in base.named_modules() if isinstance(module, HqqOFTLinear)} == projections
    assert isinstance(base.lm_head, HQQLinear)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.oft_R["default"].weight.grad is not None for layer in layers(model))


def test_all_linear_adapts_dense_layers_with_the_others():
    base = small_llama()
    hqq_oft.quantize_model(base, group_size=16, skip_modules=["lm_head", "k_proj"], progress=False)
    model = get_peft_model(base, OFTConfig(**USE, target_modules="ALL-LINEAR"))
    found = sum(hasattr(module, "oft_R") for module in model.modules())
    assert found == PROJECTIONS
    assert not hasattr(base.lm_head, "oft_R")


def test_a_second_adapter_may_be_all_linear_too(tmp_path):
    model = get_peft_model(quantized_llama(), OFTConfig(**USE, target_modules=["q_proj"]))
    model.add_adapter("second", OFTConfig(**USE, target_modules="all-linear"))
    assert sum("second" in layer.oft_R for layer in layers(model)) == PROJECTIONS
    assert len(layers(model)) == PROJECTIONS
    model.save_pretrained(tmp_path)
    assert len(layers(PeftModel.from_pretrained(quantized_llama(), tmp_path / "second"))) == PROJECTIONS


def test_without_the_patch_pefts_all_linear_is_as_before():
    hqq_oft.unpatch_peft()
    base = quantized_llama().model
    with pytest.raises(ValueError, match=r"not found in the base model|No `target_modules` passed"):
        get_peft_model(base, OFTConfig(**USE, target_modules="all-linear"))


def test_all_linear_of_a_classifier_leaves_its_head_to_be_trained():
    base = classifier()
    base.score = nn.Linear(32, 8, bias=False)
    model = get_peft_model(base, OFTConfig(**USE, target_modules="all-linear", task_type=TaskType.SEQ_CLS))
    assert len(layers(model)) == 7
    trained = {name.rpartition("modules_to_save")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert ".default.weight" in trained
    model(input_ids=torch.ones(2, 5, dtype=torch.int64), labels=torch.tensor([0, 7])).loss.backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_type": TaskType.SEQ_CLS}, r"task_type='SEQ_CLS' would train score.*skip_modules=\['score'\]"),
        ({"task_type": "TOKEN_CLS"}, r"task_type='TOKEN_CLS' would train score"),
        ({"modules_to_save": ["score"]}, r"modules_to_save would train score.*adapt it with target_modules"),
        ({"modules_to_save": ["mlp"]}, r"modules_to_save would train model.layers.0.mlp, whose weight"),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_training_an_hqq_layer_is_refused_before_anything_changes(settings, message, mixed):
    base = classifier()
    before = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, OFTConfig(**USE, target_modules=["q_proj"], **settings), mixed=mixed)
    assert [type(module) for module in base.modules()] == before
    model = get_peft_model(base, OFTConfig(**USE, target_modules=["q_proj"]), mixed=mixed)
    with pytest.raises(ValueError, match="packed integers can't be trained"):
        model.add_adapter("second", OFTConfig(**USE, target_modules=["q_proj"], modules_to_save=["score"]))


def lora(model, name="lora", **settings):
    """Adds a random LoRA adapter to the same layers."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    model.add_adapter(name, config)
    model.set_adapter(["default", name])


def test_lora_on_an_adapted_layer_keeps_the_rotation(tokens):
    config = OFTConfig(**USE, target_modules=["q_proj", "v_proj"], init_weights=False)
    model = get_peft_model(quantized_llama(nbits=8), config, mixed=True).eval()
    base, rotated = logits(model.base_model.model, tokens), len(layers(model))
    lora(model)
    assert len(layers(model)) == rotated == 4
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    inner, x = layer.base_layer, torch.randn(3, 32)
    expected = inner(x) + layer.lora_B["lora"](layer.lora_A["lora"](x)) * layer.scaling["lora"]
    assert relative_error(layer(x), expected) <= 1e-5
    model.set_adapter("default")
    assert relative_error(logits(model, tokens), base) <= 1e-5  # of OFT without LoRA
    model.set_adapter(["default", "lora"])
    both = logits(model, tokens)
    assert relative_error(both, base) > 1e-3
    merged = model.merge_and_unload()
    assert relative_error(logits(merged, tokens), both) <= 3e-2


def test_lora_around_a_model_with_oft_keeps_the_rotation_and_is_not_merged_below_it(tokens):
    model = get_peft_model(
        quantized_llama(), OFTConfig(**USE, target_modules=["q_proj", "v_proj"], init_weights=False)
    ).eval()
    expected = logits(model, tokens)
    stacked = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"])).eval()
    assert len(layers(stacked)) == 4
    assert relative_error(logits(stacked, tokens), expected) <= 1e-5
    with pytest.raises(ValueError, match="Cannot merge LoRA into the HQQ weight below a HqqOFTLinear"):
        stacked.merge_adapter()


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.argmax(-1)


class FalconLinear(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Relabelled(nn.Linear):
    """Only its name differs."""


def test_all_linear_leaves_subclasses_with_another_function():
    base = quantized_llama()
    block = base.model.layers[0]
    block.router, block.falcon, block.other = Router(32, 8), FalconLinear(32, 8), Relabelled(32, 8)
    block.attention = nn.MultiheadAttention(32, 4)
    block.quantized_elsewhere = type("Linear4bit", (Router,), {"__module__": "bitsandbytes.nn"})(32, 8)
    targets = OFTConfig(**USE, target_modules="all-linear")
    get_peft_model(base, targets)
    adapted = {name for name in ("router", "falcon", "other") if isinstance(getattr(block, name), OFTLinear)}
    assert adapted == {"falcon", "other"}
    assert type(block.router) is Router
    assert not hasattr(block.attention.out_proj, "oft_R")
    assert "model.layers.0.quantized_elsewhere" in targets.target_modules
