"""Experts that transformers 5 stores as three-dimensional parameters, and `Conv1D`, become HQQ layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from helpers import randomize, relative_error
from hqq.core.quantize import HQQLinear
from peft import OFTConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import hqq_oft
from hqq_oft import HqqOFTLinear, load_quantized, quantize_model, save_quantized
from hqq_oft.quant.experts import Experts
from hqq_oft.quant.report import stored_bytes

fused_only = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 has a module for each expert"
)
TOKENS = torch.arange(16).reshape(2, 8)
SETTINGS = {"group_size": 16, "progress": False}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2}
SIZES |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0}
SIZES |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "moe_num_experts": 4, "moe_topk": 2}


def moe(kind: str = "mixtral", **settings) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**SIZES | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.2)  # GPT-OSS leaves biases zero
    return model


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, pad_token_id=0)).eval()


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def experts_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


@fused_only
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "aria_text", "nemotron_h"])
def test_experts_compute_what_transformers_computes_with_the_dequantized_weights(kind):
    settings = {"layers_block_type": ["moe", "attention"], "moe_latent_size": None} if kind == "nemotron_h" else {}
    model, dense = moe(kind, **settings), moe(kind, **settings)
    report = quantize_model(model, **SETTINGS)
    found = experts_of(model)
    assert found
    for name, experts in found.items():
        fused = dense.get_submodule(name)
        for index in range(4):
            for projection in experts.projections:
                layer = experts.get_submodule(f"{index}.{projection}")
                assert isinstance(layer, HQQLinear)
                assert f"{name}.{index}.{projection}" in report.quantized
                weight = layer.dequantize()
                getattr(fused, projection).data[index] = weight.T if fused.is_transposed else weight
        torch.manual_seed(1)
        hidden = torch.randn(7, getattr(fused, experts.projections[0]).shape[1 if fused.is_transposed else 2])
        chosen = torch.tensor([[0, 1], [2, 0], [0, 2], [1, 0], [2, 1], [0, 1], [1, 2]])  # none takes expert 3
        weights = torch.rand(7, 2)
        with torch.no_grad():
            assert relative_error(experts(hidden, chosen, weights), fused(hidden, chosen, weights)) < 1e-5
        assert experts(hidden[:0], chosen[:0], weights[:0]).shape == (0, hidden.shape[1])
        assert torch.equal(
            pickle.loads(pickle.dumps(experts))(hidden, chosen, weights), experts(hidden, chosen, weights)
        )
        copy.deepcopy(experts)


@fused_only
def test_indices_that_are_no_experts_contribute_nothing():
    experts = Experts(moe().model.layers[0].mlp.experts)
    hidden, weights = torch.randn(3, 32), torch.ones(3, 2)
    result = experts(hidden, torch.tensor([[0, 4], [4, 4], [3, 4]]), weights)
    alone = experts(hidden[[0, 2]], torch.tensor([[0], [3]]), weights[:2, :1])
    assert torch.equal(result[1], torch.zeros(32))
    assert relative_error(result[[0, 2]], alone) < 1e-6


@fused_only
def test_experts_are_quantized_saved_and_loaded_with_overrides_and_skips(tmp_path):
    model = moe()
    name = "model.layers.0.mlp.experts"
    overrides = {f"{name}.0.*": {"nbits": 8}, f"{name}.1.down_proj": None}
    report = quantize_model(model, overrides=overrides, skip_modules=["layers.1.mlp.experts"], **SETTINGS)
    assert report.quantized[f"{name}.0.gate_up_proj"].nbits == 8
    assert report.kept["model.layers.1.mlp.experts.2.down_proj"] == "it matches skip_modules"
    assert set(experts_of(model)) == {name}
    assert type(model.get_submodule(f"{name}.1.down_proj")) is nn.Linear
    slice_bytes = 32 * 32 * 4
    assert report.dense[f"{name}.down_proj"] == slice_bytes
    assert report.dense["model.layers.1.mlp.experts.gate_up_proj"] == 4 * 2 * slice_bytes
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", progress=False)
    assert set(experts_of(loaded)) == {name}
    assert torch.equal(logits(loaded), logits(model))


@fused_only
def test_routers_are_known_beside_quantized_experts():
    model = moe("qwen2_moe")
    first = quantize_model(model, nbits=8, **SETTINGS)
    again = quantize_model(model, nbits=8, **SETTINGS)
    routers = {name for name, reason in first.kept.items() if reason == "it routes tokens to experts"}
    assert {name.rpartition(".")[2] for name in routers} == {"shared_expert_gate"}
    assert again.quantized == {}
    assert routers == {name for name, reason in again.kept.items() if reason == "it routes tokens to experts"}


@fused_only
def test_fused_experts_are_freed():
    model = moe()
    report = quantize_model(model, nbits=4, **SETTINGS)
    assert report.bytes_after == stored_bytes(model) < report.bytes_before / 2
    assert report.quantized_share > 0.7


@fused_only
def test_a_failed_layer_leaves_experts_that_compute_and_can_be_continued(monkeypatch):
    from hqq_oft.quant import model as quantizing

    model, whole = moe(), moe()
    quantize_model(whole, **SETTINGS)
    original = quantizing._quantize_layer

    def failing(model, linear, names, *rest):
        if names[0].endswith("experts.2.gate_up_proj"):
            raise MemoryError
        return original(model, linear, names, *rest)

    monkeypatch.setattr(quantizing, "_quantize_layer", failing)
    with pytest.raises(RuntimeError, match=r"experts\.2\.gate_up_proj failed"):
        quantize_model(model, **SETTINGS)
    assert logits(model).isfinite().all()
    monkeypatch.undo()
    quantize_model(model, **SETTINGS)
    assert torch.equal(logits(model), logits(whole))


@fused_only
@pytest.mark.parametrize("kind", ["llama4_text"])
def test_experts_with_another_forward_stay_dense_with_the_reason(kind):
    model = moe(kind, intermediate_size_mlp=32)
    report = quantize_model(model, **SETTINGS)
    reasons = [reason for name, reason in report.kept.items() if name.endswith("experts")]
    assert reasons
    assert all("don't compute what transformers' shared implementation does" in reason for reason in reasons)
    assert any(name.endswith("experts.down_proj") for name in report.dense)


@fused_only
def test_adapters_of_experts_train_and_a_dense_merge_restores_transformers_module(tmp_path):
    model = moe()
    quantize_model(model, nbits=8, overrides={"*self_attn*": None}, **SETTINGS)
    kind = type(moe().model.layers[0].mlp.experts)
    with hqq_oft.patch_peft():
        targets = [name for name, module in model.named_modules() if isinstance(module, HQQLinear)]
        adapted = get_peft_model(model, OFTConfig(r=0, oft_block_size=8, target_modules=targets))
        adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
        layer = adapted.get_submodule("base_model.model.model.layers.0.mlp.experts.0.down_proj")
        assert isinstance(layer, HqqOFTLinear)
        assert layer.oft_R["default"].weight.grad.abs().sum() > 0
        randomize(adapted, 0.1)
        tuned = logits(adapted)
        merged = adapted.merge_and_unload(into="dense")
    assert type(merged.model.layers[0].mlp.experts) is kind
    assert relative_error(logits(merged), tuned) < 1e-4
    merged.save_pretrained(tmp_path / "dense")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(merged))


@fused_only
def test_a_dense_merge_that_cannot_restore_the_second_experts_changes_nothing(monkeypatch):
    model = moe()
    quantize_model(model, nbits=8, overrides={"*self_attn*": None}, **SETTINGS)
    with hqq_oft.patch_peft():
        targets = [name for name, module in model.named_modules() if isinstance(module, HQQLinear)]
        adapted = get_peft_model(model, OFTConfig(r=0, oft_block_size=8, target_modules=targets)).eval()
        randomize(adapted, 0.1)
        before, modules = logits(adapted), dict(adapted.named_modules())
        original, done = Experts.fuse, []

        def failing(self):
            done.append(self)
            if len(done) == 2:
                raise MemoryError
            return original(self)

        monkeypatch.setattr(Experts, "fuse", failing)
        with pytest.raises(MemoryError):
            adapted.merge_and_unload(into="dense")
        assert dict(adapted.named_modules()) == modules
        assert torch.equal(logits(adapted), before)
        monkeypatch.undo()
        assert not experts_of(adapted.merge_and_unload(into="dense"))


def test_conv1d_becomes_an_hqq_layer_that_is_saved_and_loaded(tmp_path):
    model, dense = gpt2(), gpt2()
    report = quantize_model(model, overrides={"attn.c_proj": {"nbits": 8, "axis": 0}}, **SETTINGS)
    names = {name for name, module in dense.named_modules() if isinstance(module, Conv1D)}
    assert set(report.quantized) == names
    assert len(names) == 8
    for name in names:
        layer, conv = model.get_submodule(name), dense.get_submodule(name)
        assert (layer.out_features, layer.in_features) == (conv.nf, conv.nx)
        assert relative_error(layer.dequantize(), conv.weight.T) < 0.1
        conv.weight.data = layer.dequantize().T.contiguous()
    assert relative_error(logits(model), logits(dense)) < 1e-5
    save_quantized(model, tmp_path / "model")
    assert torch.equal(logits(load_quantized(tmp_path / "model", progress=False)), logits(model))


@pytest.mark.parametrize("loaded", [False, True])
def test_a_dense_merge_restores_conv1d(tmp_path, loaded):
    model = gpt2()
    quantize_model(model, nbits=8, **SETTINGS)
    if loaded:
        save_quantized(model, tmp_path / "model")
        model = load_quantized(tmp_path / "model", progress=False)
    with hqq_oft.patch_peft():
        adapted = get_peft_model(model, OFTConfig(r=0, oft_block_size=8, target_modules=["c_attn", "c_proj", "c_fc"]))
        adapted.eval()
        randomize(adapted, 0.1)
        tuned = logits(adapted)
        merged = adapted.merge_and_unload(into="dense")
    assert type(merged.transformer.h[0].attn.c_proj) is Conv1D
    assert relative_error(logits(merged), tuned) < 1e-4
    merged.save_pretrained(tmp_path / "dense")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(merged))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.dt_proj, self.in_proj, self.wo = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        if isinstance(self.wo.weight, torch.Tensor):
            x = x.to(self.wo.weight.dtype)
        return self.wo(self.in_proj(x) @ self.dt_proj.weight)


@pytest.mark.parametrize("overrides", [{}, {"dt_proj": {}}])
def test_layers_whose_weight_the_module_around_them_reads_stay_dense(overrides):
    model = nn.ModuleDict({"mixer": Mixer()})
    report = quantize_model(model, overrides=overrides, **SETTINGS)
    assert model["mixer"](torch.randn(3, 32)).shape == (3, 32)
    assert report.kept == {"mixer.dt_proj": "Mixer reads its weight"}
    assert set(report.quantized) == {"mixer.in_proj", "mixer.wo"}
