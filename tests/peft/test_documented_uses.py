"""The five documented uses, through PEFT's own functions."""

from __future__ import annotations

import pytest
import torch
from helpers import adapted, layers, logits, randomize, relative_error
from hqq.core.quantize import HQQLinear
from peft import OFTConfig, PeftModel, get_peft_model
from small_llama import quantized_llama

from hqq_oft import HqqOFTLinear

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
        adapted(std=0.1).save_pretrained(tmp_path / name)
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
