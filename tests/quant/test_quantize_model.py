"""`quantize_model`: which layers it quantizes, which it keeps, memory, and the state after failures."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from helpers import relative_error
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import OFTConfig, get_peft_model
from small_llama import VOCABULARY, small_llama
from torch import nn
from transformers import HqqConfig

import hqq_oft
from hqq_oft import quantize_model
from hqq_oft.quant import model as quantizing
from hqq_oft.quant.report import stored_bytes

TOKENS = torch.arange(12).reshape(2, 6) % VOCABULARY
SETTINGS = {"group_size": 16, "progress": False}


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}


def test_every_linear_layer_except_the_head_is_quantized_as_by_hqq():
    model, dense = small_llama(), small_llama()
    report = quantize_model(model, nbits=3, group_size=16, axis=0, progress=False)
    assert set(report.quantized) == set(layers_of(model))
    assert len(report.quantized) == 14
    assert report.kept == {"lm_head": "it is the output head of LlamaForCausalLM"}
    assert model.hqq_quantized
    for name, layer in layers_of(model).items():
        linear = dense.get_submodule(name).requires_grad_(False)
        bias = linear.bias
        expected = HQQLinear(linear, BaseQuantizeConfig(3, 16, axis=0), compute_dtype=torch.float32, device="cpu")
        assert torch.equal(layer.W_q, expected.W_q)
        assert torch.equal(layer.dequantize(), expected.dequantize())
        assert bias is None or torch.equal(layer.bias, bias)
    assert report.bytes_after == stored_bytes(model) < report.bytes_before / 2


def test_the_model_computes_and_takes_adapters():
    model, dense = small_llama(), small_llama()
    quantize_model(model, nbits=8, **SETTINGS)
    assert relative_error(model(TOKENS).logits, dense(TOKENS).logits) < 2e-2
    copy.deepcopy(model)
    with hqq_oft.patch_peft():
        adapted = get_peft_model(model, OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]))
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert isinstance(model.model.layers[0].self_attn.q_proj, hqq_oft.HqqOFTLinear)


def test_overrides_name_layers_by_name_end_or_pattern_and_the_last_counts():
    model = small_llama()
    report = quantize_model(
        model,
        overrides={
            "model.layers.0.*": {"nbits": 2},
            "down_proj": {"nbits": 8, "group_size": 48, "axis": 0},
            "model.layers.1.mlp.up_proj": None,
            "mlp.gate_proj": {"nbits": 1.58},
        },
        **SETTINGS,
    )
    bits = {name: layer.meta["nbits"] for name, layer in layers_of(model).items()}
    assert bits["model.layers.0.self_attn.q_proj"] == 2
    assert bits["model.layers.1.self_attn.q_proj"] == 4
    assert bits["model.layers.0.mlp.gate_proj"] == 1.58
    assert bits["model.layers.0.mlp.down_proj"] == bits["model.layers.1.mlp.down_proj"] == 8
    assert report.quantized["model.layers.0.mlp.down_proj"].axis == 0
    assert type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert report.kept["model.layers.1.mlp.up_proj"] == "overrides['model.layers.1.mlp.up_proj'] leaves it dense"
    assert "13 layer(s) quantized, 2 kept" in str(report)


@pytest.mark.parametrize("nbits", [4, 3, 1.58])
@pytest.mark.parametrize("group_size", [16, None])
def test_quantization_settings_may_be_an_hqq_or_a_transformers_configuration(nbits, group_size):
    model, skip = small_llama(), ["lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    expected = {"nbits": nbits, "group_size": group_size, "axis": 0}
    config = HqqConfig(**expected, skip_modules=skip)
    report = quantize_model(model, quant_config=config, progress=False)
    assert len(report.quantized) == 4
    assert set(report.quantized.values()) == {hqq_oft.QuantizationSettings(**expected)}
    (layer, *_) = layers_of(model).values()
    assert layer.meta["nbits"] == nbits
    plain = BaseQuantizeConfig(nbits, group_size, axis=0)
    again = quantize_model(small_llama(), quant_config=plain, skip_modules=skip, progress=False)
    assert again.quantized == report.quantized
    stored = {name: plain[name] for name in ("weight_quant_params", "scale_quant_params")}  # as in a saved config.json
    assert quantize_model(small_llama(), quant_config=stored, skip_modules=skip, progress=False).quantized
    kept = quantize_model(small_llama(), quant_config=config, skip_modules=["*"], progress=False)
    assert len(kept.kept) == 15


def test_a_quant_config_overrides_the_single_settings():
    config = BaseQuantizeConfig(nbits=3, group_size=32, axis=0)
    report = quantize_model(small_llama(), quant_config=config, nbits=8, group_size=16, axis=1, progress=False)
    assert set(report.quantized.values()) == {hqq_oft.QuantizationSettings(3, 32, 0)}


ACCEPTED = r"accepted are BaseQuantizeConfig\(nbits=..., group_size=..., axis=...\) and HqqConfig of the same"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"quant_config": 4}, TypeError, f"quant_config is a int; {ACCEPTED}"),
        ({"quant_config": {"nbits": 4}}, ValueError, f"quant_config has no weight_quant_params; {ACCEPTED}"),
        (
            {"quant_config": HqqConfig(dynamic_config={"self_attn.q_proj": {"nbits": 8}})},
            ValueError,
            "quant_config has no weight_quant_params; .* use overrides= for dynamic_config",
        ),
        (
            {"quant_config": BaseQuantizeConfig(4, 64, quant_zero=True, quant_scale=True)},
            ValueError,
            rf"quant_config: scale_quant_params=.*, zero_quant_params=.* is not supported; {ACCEPTED}",
        ),
        (
            {"quant_config": BaseQuantizeConfig(4, 64, offload_meta=True)},
            ValueError,
            "quant_config: offload_meta=True is not supported",
        ),
        ({"quant_config": HqqConfig(view_as_float=True)}, ValueError, "view_as_float=True is not supported"),
        (
            {"quant_config": {"weight_quant_params": {"nbits": 7}}},
            ValueError,
            r"nbits must be one of .*, got 7",
        ),
    ],
)
def test_quantization_configurations_that_can_not_be_honoured_are_refused(settings, error, message):
    model, dense = small_llama(), small_llama()
    with pytest.raises(error, match=message):
        quantize_model(model, progress=False, **settings)
    assert_dense(model, dense)


def test_settings_are_keyword_only_and_their_defaults_are_plain_numbers():
    with pytest.raises(TypeError, match="positional argument"):
        quantize_model(small_llama(), 4)
    model = nn.ModuleDict({"a": nn.Linear(64, 64)})
    (settings,) = quantize_model(model, progress=False).quantized.values()
    assert settings == hqq_oft.QuantizationSettings()
    assert {type(value) for value in vars(settings).values()} == {int}


class Odd(nn.Linear):
    """A linear layer that may compute something else."""


def test_tied_shared_subclassed_and_quantized_layers_are_handled():
    shared = nn.Linear(16, 16)
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(32, 16), "head": nn.Linear(16, 32), "a": shared, "b": shared, "odd": Odd(16, 16)}
    )
    model["head"].weight = model["embedding"].weight
    report = quantize_model(model, skip_modules=(), **SETTINGS)
    assert set(report.quantized) == {"a", "b"}
    assert isinstance(model["a"], HQQLinear)
    assert model["a"] is model["b"]
    assert model["head"].weight is model["embedding"].weight
    assert report.kept == {
        "head": "its weight is tied to another module's",
        "odd": "it is a Odd, which may compute a different function",
    }
    again = quantize_model(model, skip_modules=(), **SETTINGS)
    assert not again.quantized
    assert again.kept["a"] == "it is already an HQQ layer"


def test_compute_dtype_casts_the_rest_but_not_computed_buffers():
    model = small_llama()
    quantize_model(model, compute_dtype=torch.bfloat16, device="cpu", **SETTINGS)
    assert {layer.compute_dtype for layer in layers_of(model).values()} == {torch.bfloat16}
    assert model.model.norm.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_each_dense_weight_is_freed_before_the_next_layer_is_quantized(monkeypatch):
    model = small_llama()
    weights = [weakref.ref(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    alive, original = [], quantizing._quantize_layer

    def counting(*args):
        alive.append(sum(weight() is not None for weight in weights))
        return original(*args)

    monkeypatch.setattr(quantizing, "_quantize_layer", counting)
    quantize_model(model, **SETTINGS)
    assert alive == list(range(14, 0, -1))


REFUSED = [
    ({"nbits": 7}, ValueError, r"nbits must be one of \[8, 6, 5, 4, 3, 2, 1.58, 1\], got 7"),
    ({"group_size": 12}, ValueError, "group_size must be a positive multiple of 8, or None for a whole row; got 12"),
    ({"group_size": -8}, ValueError, "group_size must be a positive multiple of 8"),
    ({"group_size": 64.0}, ValueError, "group_size must be a positive multiple of 8"),
    ({"axis": 2}, ValueError, "axis must be 0 or 1, got 2"),
    ({"group_size": 2048}, ValueError, r"q_proj: group_size=2048 does not divide the 32x32 weights; choose another"),
    (
        {"nbits": 1, "group_size": 512},
        ValueError,
        r"q_proj: its 2 rows of levels can't be packed 8 per byte at 1 bits",
    ),
    ({"compute_dtype": torch.int8}, TypeError, "compute_dtype must be a floating dtype, got torch.int8"),
    ({"skip_modules": "lm_head"}, ValueError, "skip_modules must be a list of names, got the string 'lm_head'"),
    ({"overrides": {"no_proj": None}}, ValueError, r"overrides match no linear layer of the model: \['no_proj'\]"),
    ({"overrides": {"q_proj": {"bits": 3}}}, ValueError, r"overrides\['q_proj'\]: \['bits'\] are not among"),
    ({"overrides": {"q_proj": {"nbits": 9}}}, ValueError, r"overrides\['q_proj'\]: nbits must be one of"),
    ({"device": "nowhere"}, RuntimeError, "device"),
]


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED, ids=[str(list(s[0].items())) for s in REFUSED])
def test_invalid_settings_are_refused_before_anything_changes(settings, error, message):
    model, dense = small_llama(), small_llama()
    with pytest.raises(error, match=message):
        quantize_model(model, **{**SETTINGS, **settings})
    assert_dense(model, dense)


def spoil_weight(model):
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")


def offload(model):
    model.model.layers[1].mlp.up_proj.to("meta")


def hook(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *args: None)


def adapt(model):
    get_peft_model(model, OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoil_weight, ValueError, r"model.layers.1.mlp.up_proj: its weight contains NaN or infinity"),
        (offload, ValueError, r"model.layers.1.mlp.up_proj is on the meta device"),
        (hook, ValueError, r"model.layers.1.mlp.up_proj has hooks, .* load the model without device_map"),
        (adapt, ValueError, r"the model has adapters; quantize the base model, then add the"),
    ],
)
def test_a_model_that_can_not_be_quantized_is_refused_before_anything_changes(spoil, error, message):
    model = small_llama()
    spoil(model)
    with pytest.raises(error, match=message):
        quantize_model(model, **SETTINGS)
    assert not layers_of(model)


def assert_dense(model, dense):
    assert not layers_of(model)
    assert not hasattr(model, "hqq_quantized")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()])
@pytest.mark.parametrize("nth", [0, 5, 13])
def test_after_a_failure_the_model_computes_and_quantization_can_continue(monkeypatch, caplog, error, nth):
    model, whole = small_llama(), small_llama()
    quantize_model(whole, **SETTINGS)
    original, calls = quantizing._quantize_layer, []

    def failing(model, linear, names, *rest):
        calls.append(names[0])
        if len(calls) == nth + 1:
            raise error
        return original(model, linear, names, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "_quantize_layer", failing)
        if isinstance(error, Exception):
            with pytest.raises(RuntimeError, match=f"failed: {nth} of 14 layers are quantized, it and .* no room"):
                quantize_model(model, **SETTINGS)
        else:
            with pytest.raises(KeyboardInterrupt):
                quantize_model(model, **SETTINGS)
            assert f"quantizing {calls[-1]} failed: {nth} of 14 layers are quantized" in caplog.text
    assert list(layers_of(model)) == calls[:-1]
    assert model(TOKENS).logits.isfinite().all()
    quantize_model(model, **SETTINGS)
    assert torch.equal(model(TOKENS).logits, whole(TOKENS).logits)
