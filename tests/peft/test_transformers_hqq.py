"""Models that transformers itself quantizes with `HqqConfig`: versions 4 on their own, version 5 when it is patched."""

from __future__ import annotations

import pytest
import torch
from helpers import logits, randomize
from hqq.core.quantize import HQQLinear
from peft import AutoPeftModelForCausalLM, OFTConfig, PeftModel, get_peft_model
from small_llama import VOCABULARY, small_llama
from transformers import AutoModelForCausalLM, HqqConfig

from hqq_oft import HqqOFTLinear, load_quantized, quantize_model, save_quantized

TOKENS = torch.arange(12).reshape(2, 6) % VOCABULARY


@pytest.fixture
def dense(tmp_path):
    small_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def from_transformers(dense, **settings):
    config = HqqConfig(**{"nbits": 4, "group_size": 16, "axis": 1, **settings})
    return AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, quantization_config=config, device_map="cpu"
    ).eval()


def train(model, steps):
    """The loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("settings", [{}, {"nbits": 3}, {"axis": 0}, {"nbits": 8, "view_as_float": True}])
def test_a_model_that_transformers_stored_loads(dense, tmp_path, settings):
    model = from_transformers(dense, **settings)
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_quantized(tmp_path / "theirs", progress=False)
    assert sum(isinstance(module, HQQLinear) for module in loaded.modules()) == 14
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))


def test_models_quantized_by_transformers_and_by_this_package_are_stored_alike(dense, tmp_path):
    model, ours = from_transformers(dense), small_llama()
    quantize_model(ours, group_size=16, progress=False)
    save_quantized(model, tmp_path / "theirs")
    save_quantized(ours, tmp_path / "ours")
    for name in ("model.safetensors", "hqq_oft.json"):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


def test_transformers_loads_a_saved_model(tmp_path):
    model = small_llama()
    overrides = {"down_proj": {"nbits": 8}, "model.layers.0.mlp.up_proj": None}
    quantize_model(model, group_size=16, overrides=overrides, progress=False)
    save_quantized(model, tmp_path / "ours", max_shard_size="8KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))


def test_from_pretrained_then_get_peft_model(dense, tmp_path):
    model = from_transformers(dense)
    config = OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=True, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(model, config)
    layers = [module for module in adapted.modules() if isinstance(module, HqqOFTLinear)]
    assert len(layers) == 4
    losses = train(adapted, steps=5)
    assert losses[-1] < losses[0]
    expected = logits(adapted.eval(), TOKENS)
    adapted.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(from_transformers(dense), tmp_path / "adapter").eval()
    assert torch.equal(logits(reloaded, TOKENS), expected)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert torch.equal(logits(adapted, TOKENS), expected)
    merged = adapted.merge_and_unload(into=8)
    assert (logits(merged, TOKENS) - expected).norm() < 0.05 * expected.norm()
    save_quantized(merged, tmp_path / "merged")
    assert torch.equal(logits(load_quantized(tmp_path / "merged"), TOKENS), logits(merged, TOKENS))


def test_the_documented_flow(dense):
    """OFT on HQQ as its users find it documented: nothing of this package is named after `patch_peft`."""
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=HqqConfig(nbits=4, group_size=16))
    config = OFTConfig(
        r=8, oft_block_size=0, target_modules=["q_proj", "v_proj"], module_dropout=0.1, task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(model, config)
    assert sum(isinstance(module, HqqOFTLinear) for module in peft_model.modules()) == 4
    peft_model.train()
    losses = train(peft_model, steps=8)
    assert losses[-1] < losses[0]
    peft_model.eval()
    adapted = logits(peft_model, TOKENS)
    peft_model.merge_adapter()
    merged = logits(peft_model, TOKENS)
    assert 0 < (merged - adapted).norm() < 0.3 * adapted.norm()
    peft_model.unmerge_adapter()
    assert torch.equal(logits(peft_model, TOKENS), adapted)


@pytest.mark.parametrize("source", ["HqqConfig", "quantize_model", "load_quantized"])
def test_a_merged_model_loads_from_where_save_pretrained_wrote_it(dense, tmp_path, source):
    if source == "HqqConfig":
        model = from_transformers(dense)
    else:
        model = AutoModelForCausalLM.from_pretrained(dense)
        quantize_model(model, group_size=16, overrides={"o_proj": None}, progress=False)
    if source == "load_quantized":
        save_quantized(model, tmp_path / "quantized")
        model = load_quantized(tmp_path / "quantized")
    adapted = get_peft_model(model, OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "down_proj"])).eval()
    randomize(adapted, 0.1)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    count = 14 if source == "HqqConfig" else 12
    assert sum(isinstance(module, HQQLinear) for module in loaded.modules()) == count
    assert torch.equal(logits(loaded, TOKENS), logits(merged, TOKENS))
    assert torch.equal(logits(load_quantized(tmp_path / "merged"), TOKENS), logits(merged, TOKENS))


@pytest.mark.parametrize("load", [load_quantized, AutoModelForCausalLM.from_pretrained])
def test_an_adapter_names_its_base_model_and_loads_with_it(tmp_path, load):
    model = small_llama()
    quantize_model(model, group_size=16, progress=False)
    model.save_pretrained(tmp_path / "base")
    config = OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(load(tmp_path / "base").eval(), config).eval()
    randomize(adapted, 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert loaded.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    assert sum(isinstance(module, HqqOFTLinear) for module in loaded.modules()) == 2
    assert torch.equal(logits(loaded, TOKENS), logits(adapted, TOKENS))


def test_a_model_merged_into_dense_is_a_plain_model(dense, tmp_path):
    config = OFTConfig(r=0, oft_block_size=8, target_modules=r".*_proj")
    adapted = get_peft_model(from_transformers(dense), config).eval()
    randomize(adapted, 0.1)
    expected = logits(adapted, TOKENS)
    merged = adapted.merge_and_unload(into="dense")
    assert (logits(merged, TOKENS) - expected).norm() < 1e-5 * expected.norm()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), TOKENS), logits(merged, TOKENS)
    )
