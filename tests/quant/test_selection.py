"""Which layers `quantize_model` leaves dense by default, `skip_modules`, forcing a layer, and the report's shares."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from hqq.core.quantize import HQQLinear
from peft import OFTConfig, get_peft_model
from small_llama import small_llama
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import hqq_oft
from hqq_oft import quantize_model

SETTINGS = {"group_size": 16, "progress": False}
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def t5():
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=False))


@pytest.mark.parametrize(
    ("make", "dense"),
    [
        (lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3)), {"score"}),
        (lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)), {"classifier"}),
        (
            lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES, num_labels=32)),
            {"classifier.dense", "classifier.out_proj"},
        ),
        (
            lambda: BertForMaskedLM(BertConfig(**SIZES, tie_word_embeddings=False)),
            {"cls.predictions.transform.dense", "cls.predictions.decoder"},
        ),
        (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)), {"embed_out", "lm_head"}),
        (t5, {"lm_head", "encoder.block.0.layer.1.DenseReluDense.wo", "decoder.block.0.layer.2.DenseReluDense.wo"}),
    ],
    ids=["llama-classifier", "bert-classifier", "roberta-classifier", "bert-masked", "neox", "t5"],
)
def test_heads_and_float32_modules_stay_dense_with_the_reason(make, dense):
    model = make().eval()
    report = quantize_model(model, **SETTINGS)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linears == set(report.kept) == dense.intersection(name for name, _ in model.named_modules())
    assert linears
    assert all(re.search("head|in float32|tied", reason) for reason in report.kept.values()), report.kept
    assert report.quantized


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_transformers_keeps_in_float32_is_not_cast(dtype, tmp_path):
    model, half = t5().eval(), t5().to(torch.bfloat16)
    quantize_model(model, compute_dtype=dtype, **SETTINGS)
    quantize_model(half, compute_dtype=dtype, **SETTINGS)
    hqq_oft.save_quantized(model, tmp_path / "model")
    loaded = hqq_oft.load_quantized(tmp_path / "model", compute_dtype=dtype)
    tokens = torch.arange(6).reshape(1, 6)
    for each in (model, half, loaded):
        found = {name: parameter.dtype for name, parameter in each.named_parameters() if parameter.is_floating_point()}
        wo = {name for name in found if ".wo." in name}
        # transformers keeps them for float16 only
        assert {found.pop(name) for name in wo} == {torch.float32 if dtype is torch.float16 else dtype}
        assert set(found.values()) == {dtype}
    assert torch.equal(
        loaded(input_ids=tokens, decoder_input_ids=tokens).logits,
        model(input_ids=tokens, decoder_input_ids=tokens).logits,
    )


def test_a_classifier_trains_its_head_in_floating_point():
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=0))
    quantize_model(model, **SETTINGS)
    with hqq_oft.patch_peft():
        config = OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"], task_type="SEQ_CLS")
        adapted = get_peft_model(model, config)
    tokens = torch.arange(12).reshape(2, 6)
    adapted(input_ids=tokens, labels=torch.tensor([0, 2])).loss.backward()
    head = adapted.base_model.model.score.modules_to_save["default"]
    assert head.weight.is_floating_point()
    assert head.weight.grad.abs().sum() > 0


class Block(nn.Module):
    """A mixture of experts as transformers 4 writes it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.shared_expert_gate = nn.Linear(32, 1, bias=False)
        self.shared_expert = nn.Linear(32, 32)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))


class TopKRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)


def test_routers_stay_dense():
    model = nn.ModuleDict({"moe": Block(), "switch": TopKRouter()})
    report = quantize_model(model, **SETTINGS)
    names = ("moe.gate", "moe.shared_expert_gate", "switch.layer")
    assert report.kept == dict.fromkeys(names, "it routes tokens to experts")
    assert len(report.quantized) == 5


def test_layers_whose_shape_can_not_be_packed_stay_dense():
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "odd": nn.Linear(10, 10), "row": nn.Linear(16, 1)})
    report = quantize_model(model, **SETTINGS)
    assert set(report.quantized) == {"a"}
    assert report.kept == {
        "odd": "group_size=16 does not divide the 10x10 weights",
        "row": "its 1 rows of levels can't be packed 2 per byte at 4 bits",
    }
    again = quantize_model(model, **SETTINGS)  # nothing is left to quantize, which is no error
    assert set(again.kept) == {"a", "odd", "row"}


def test_an_override_that_names_a_layer_forces_it_and_a_wildcard_does_not():
    model = small_llama()
    assert "lm_head" in quantize_model(model, overrides={"*": {"nbits": 8}}, **SETTINGS).kept
    report = quantize_model(model, overrides={"lm_head": {}}, **SETTINGS)
    assert list(report.quantized) == ["lm_head"]
    assert report.quantized["lm_head"] == hqq_oft.QuantizationSettings(4, 16, 1)
    assert isinstance(model.lm_head, HQQLinear)
    with pytest.raises(ValueError, match="odd: group_size=16 does not divide the 10x10 weights; choose another"):
        quantize_model(
            nn.ModuleDict({"a": nn.Linear(32, 32), "odd": nn.Linear(10, 10)}), overrides={"odd": {}}, **SETTINGS
        )


def test_skip_modules_adds_to_the_defaults_and_may_name_modules_that_contain_layers():
    model = small_llama()
    report = quantize_model(model, skip_modules=["down_proj", "model.layers.0.self_attn"], **SETTINGS)
    assert type(model.lm_head) is nn.Linear
    assert sum(reason == "it matches skip_modules" for reason in report.kept.values()) == 6
    assert len(report.quantized) == 8


def test_a_skipped_name_that_matches_nothing_is_refused_before_anything_changes():
    model = small_llama()
    with pytest.raises(ValueError, match=r"skip_modules match no module of the model: \['down_porj'\]"):
        quantize_model(model, skip_modules=["down_porj", "lm_head"], **SETTINGS)
    assert not any(isinstance(module, HQQLinear) for module in model.modules())


class Dense(nn.Module):
    """A weight that is not a linear layer's."""

    def __init__(self, *shape):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(*shape))


def test_the_report_names_dense_weights_with_their_share_and_warns_of_more_than_half():
    model = nn.ModuleDict({"layers": nn.ModuleList([Dense(64, 16), Dense(64, 16)]), "a": nn.Linear(32, 32, bias=False)})
    with pytest.warns(
        UserWarning, match=r"only 33% of the model's bytes were quantized; dense are layers.\*.table 67%"
    ):
        report = quantize_model(model, **SETTINGS)
    assert report.dense == {"layers.0.table": 4096, "layers.1.table": 4096}
    assert report.quantized_share == pytest.approx(1 / 3)
    assert "dense layers.*.table: 66.7%" in str(report)


def test_a_model_that_is_mostly_quantized_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = quantize_model(small_llama(), **SETTINGS)
    assert report.quantized_share > 0.5
    assert set(report.dense) >= {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert not any(name.endswith("_proj.weight") for name in report.dense)
