"""transformers' `from_pretrained` and `save_pretrained` with HQQ layers: versions 4 on their own, 5 when patched."""

from __future__ import annotations

import logging
import warnings
import weakref

import pytest
import torch
import transformers
from helpers import logits
from hqq.core.quantize import HQQLinear
from safetensors.torch import load_file, save_file
from small_llama import VOCABULARY, small_llama
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    HqqConfig,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import auto

import hqq_oft
from hqq_oft import load_quantized, quantize_model, save_quantized
from hqq_oft.checkpoint.files import crc32
from hqq_oft.checkpoint.layer_format import FIELDS, tensors_of
from hqq_oft.quant import quantizer

TOKENS = torch.arange(12).reshape(2, 6) % VOCABULARY
Q = "model.layers.0.self_attn.q_proj"
on_version_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 does it by itself")


@pytest.fixture(autouse=True)
def _patched():
    with hqq_oft.patch_transformers():
        yield
    hqq_oft.unpatch_transformers()


@pytest.fixture
def dense(tmp_path):
    small_llama().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def quantized(path, config=None, **settings):
    config = HqqConfig(**{"nbits": 4, "group_size": 16, **settings}) if config is None else config
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.float32).eval()


def hqq_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}


def assert_same(model, other):
    left, right = hqq_layers(model), hqq_layers(other)
    assert left.keys() == right.keys()
    for name, layer in left.items():
        ours, theirs = tensors_of(layer), tensors_of(right[name])
        assert all(crc32(ours[field]) == crc32(theirs[field]) for field in FIELDS if field in ours), name
    assert torch.equal(logits(model, TOKENS), logits(other, TOKENS))


@pytest.mark.parametrize(
    "config",
    [
        HqqConfig(nbits=4, group_size=16),
        {"method": "hqq", "nbits": 4, "group_size": 16},
        {"quant_method": "hqq", "nbits": 4, "group_size": 16},
    ],
)
def test_every_form_of_the_configuration_quantizes_as_quantize_model(dense, config):
    model, expected = quantized(dense, config), small_llama()
    quantize_model(expected, group_size=16, progress=False)
    assert len(hqq_layers(model)) == 14
    assert_same(model, expected)


@pytest.mark.parametrize(
    "settings",
    [{}, {"nbits": 3}, {"nbits": 2, "axis": 0}, {"nbits": 8, "view_as_float": True}, {"group_size": None}],
)
def test_save_pretrained_and_from_pretrained_are_exact(dense, tmp_path, settings):
    if transformers.__version__ < "5" and settings.get("group_size", 16) is None:
        pytest.skip("transformers 4 cannot store this group size")
    model = quantized(dense, **settings)
    model.save_pretrained(tmp_path / "stored")
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "stored"))
    assert_same(model, load_quantized(tmp_path / "stored"))


def test_hqq_layers_in_place_of_conv1d_load_by_the_path(tmp_path):
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    model = GPT2LMHeadModel(config).eval()
    quantize_model(model, group_size=16, overrides={"h.1.attn.c_proj": None, "c_fc": {"nbits": 8}}, progress=False)
    save_quantized(model, tmp_path / "model")
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(hqq_layers(loaded)) == 7
    assert_same(model, loaded.eval())
    assert all(layer.from_conv1d for layer in hqq_layers(loaded).values())
    assert type(loaded.transformer.h[1].attn.c_proj) is Conv1D


def test_a_model_saved_by_either_function_loads_by_its_path(tmp_path):
    model = small_llama()
    quantize_model(model, group_size=16, overrides={"down_proj": {"nbits": 8}, "up_proj": None}, progress=False)
    save_quantized(model, tmp_path / "ours", max_shard_size="8KB")
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.config.name_or_path == str(tmp_path / folder)
        assert_same(model, loaded)
    loaded = load_quantized(tmp_path / "theirs")
    assert loaded.name_or_path == loaded.config.name_or_path == str(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        assert_same(model, quantized(tmp_path / "ours"))


@on_version_5
def test_each_dense_weight_is_freed_before_the_next_is_quantized(dense, monkeypatch):
    alive, seen, quantize = [], [], quantizer.quantize

    def watched(weight, *args):
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(weight))
        return quantize(weight, *args)

    monkeypatch.setattr(quantizer, "quantize", watched)
    quantized(dense)
    assert alive == [0] * 14


@on_version_5
def test_layers_stay_dense_with_the_reason(tmp_path, caplog):
    model = small_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "dense")
    with caplog.at_level(logging.WARNING, "hqq_oft"):
        found = hqq_layers(quantized(tmp_path / "dense", group_size=48, skip_modules=["layers.1", "gate_proj"]))
    assert set(found) == {"model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"}
    assert f"{Q} stays dense: group_size=48 does not divide" in caplog.text
    assert "lm_head stays dense: its weight is tied" in caplog.text
    assert "layers.1" not in caplog.text


@on_version_5
def test_experts_that_stay_dense_are_named(tmp_path, caplog):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "dense")
    mostly_dense = pytest.warns(
        UserWarning, match=r"only \d+% of .* dense are .*model.layers.\*.mlp.experts.gate_up_proj"
    )
    with caplog.at_level(logging.WARNING, "hqq_oft"), mostly_dense:
        quantized(tmp_path / "dense")
    assert "model.layers.0.mlp.experts and 1 more stay dense" in caplog.text


@on_version_5
def test_a_model_that_is_mostly_quantized_does_not_warn(dense):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="only .* of the model's bytes")
        assert hqq_layers(quantized(dense))


@on_version_5
def test_a_dynamic_configuration_gives_each_layer_its_settings(dense):
    tags = {"self_attn.q_proj": {"nbits": 8, "group_size": 16}, "mlp.down_proj": {"nbits": 2, "group_size": 8}}
    layers = hqq_layers(quantized(dense, HqqConfig(dynamic_config=tags)))
    assert {name.split(".")[-1]: layer.meta["nbits"] for name, layer in layers.items()} == {"q_proj": 8, "down_proj": 2}
    assert len(layers) == 4


@on_version_5
@pytest.mark.parametrize("damage", ["missing", "code"])
def test_a_damaged_layer_is_an_error_and_runs_no_code(dense, tmp_path, damage, caplog):
    quantized(dense).save_pretrained(tmp_path / "stored")
    path = tmp_path / "stored" / "model.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        del tensors[f"{Q}.scale"]
    else:
        code = f"open({str(tmp_path / 'run')!r}, 'w')"
        tensors[f"{Q}.compute_dtype"] = torch.tensor(list(code.encode()), dtype=torch.uint8)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "stored")
    assert not (tmp_path / "run").exists()


@on_version_5
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error_that_is_reported(dense, value, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    path = dense / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q}.weight"][3, 5] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        quantized(dense)
    assert f"ValueError: {Q}.weight contains NaN or infinity" in caplog.text


@on_version_5
def test_quantized_experts_under_names_that_saving_changes_are_found(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**SMALL, **sizes, num_local_experts=2)).eval()
    quantize_model(model, group_size=16, progress=False)
    model.save_pretrained(tmp_path / "model")
    assert any(".block_sparse_moe.experts.0." in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert len(hqq_layers(loaded)) == 16
    assert_same(model, loaded)


@on_version_5
def test_a_bias_that_the_checkpoint_lacks_is_zero(dense):
    path = dense / "model.safetensors"
    tensors = load_file(path)
    expected = tensors.pop(f"{Q}.bias").shape
    save_file(tensors, path, {"format": "pt"})
    layer = quantized(dense).get_submodule(Q)
    assert torch.equal(layer.bias, torch.zeros(expected))
    assert not layer.bias.requires_grad


@on_version_5
def test_a_checkpoint_loads_in_another_dtype(dense, tmp_path):
    quantized(dense).save_pretrained(tmp_path / "stored")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", dtype=torch.bfloat16)
    assert {layer.compute_dtype for layer in hqq_layers(model).values()} == {torch.bfloat16}
    assert logits(model, TOKENS).dtype == torch.bfloat16


@on_version_5
def test_a_disk_in_the_device_map_is_refused(dense):
    config = HqqConfig(nbits=4, group_size=16)
    with pytest.raises(ValueError, match="HQQ layers can't be offloaded"):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=config, device_map={"": "disk"})


def state_of_transformers():
    classes = (auto.AutoQuantizationConfig, HqqConfig)
    return [vars(owner)["from_dict"] for owner in classes], auto.AUTO_QUANTIZER_MAPPING["hqq"]


def test_the_patch_is_idempotent_and_reversible():
    hqq_oft.unpatch_transformers()
    before = state_of_transformers()
    hqq_oft.patch_transformers()
    patched = state_of_transformers()
    hqq_oft.patch_transformers()
    assert state_of_transformers() == patched != before
    assert before[1] is not patched[1]
    hqq_oft.unpatch_transformers()
    assert state_of_transformers() == before


def test_patch_peft_includes_it():
    hqq_oft.unpatch_transformers()
    before = state_of_transformers()
    with hqq_oft.patch_peft():
        assert state_of_transformers() != before
        with hqq_oft.patch_transformers():
            pass
        assert state_of_transformers() != before
    assert state_of_transformers() == before
    with hqq_oft.patch_transformers():
        with hqq_oft.patch_peft():
            pass
        assert state_of_transformers() != before
    assert state_of_transformers() == before


# --- Models that read the weight of a layer ---------------------------------------------------------------------------

SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2}


def jamba():
    return JambaForCausalLM(
        JambaConfig(
            **SMALL, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, num_experts=2,
            attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False,
        )
    )  # fmt: skip


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )


def mamba():
    return MambaForCausalLM(MambaConfig(**SMALL, hidden_size=32, state_size=16))


READERS = {
    "T5": (t5, "DenseReluDense.wi"),
    "Mamba": (mamba, "in_proj"),
    "Jamba": (jamba, "mamba.in_proj"),
}


def test_layers_that_are_never_called_on_a_gpu_stay_dense_even_if_they_are_named():
    model = mamba().eval()
    names = ("dt_proj", "x_proj", "out_proj")  # the last two are read by the mixer's CUDA kernels only
    report = quantize_model(model, group_size=16, overrides={each: {} for each in names}, progress=False)
    assert {name.split(".")[-1] for name, reason in report.kept.items() if "reads its weight" in reason} == {*names}
    assert logits(model, TOKENS).isfinite().all()


def test_an_hqq_layer_has_an_empty_weight_of_its_dtype():
    model = small_llama()
    quantize_model(model, group_size=16, progress=False)
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.weight.device, layer.weight.numel()) == (torch.float32, layer.W_q.device, 0)
    assert not any(name.endswith("up_proj.weight") for name in model.state_dict())


@on_version_5
@pytest.mark.parametrize("name", READERS)
def test_from_pretrained_keeps_the_layers_dense_that_quantize_model_does(tmp_path, name):
    model = READERS[name][0]().eval()
    model.save_pretrained(tmp_path / "dense")
    loaded = type(model).from_pretrained(
        tmp_path / "dense", quantization_config=HqqConfig(nbits=8, group_size=16, skip_modules=["experts"])
    )
    report = quantize_model(model, nbits=8, group_size=16, skip_modules=["experts"][: name == "Jamba"], progress=False)
    assert hqq_layers(loaded).keys() == report.quantized.keys()
    if name != "T5":
        assert all(".dt_proj" not in layer for layer in report.quantized)


@pytest.mark.parametrize("name", READERS)
def test_models_that_read_weights_run_and_load(tmp_path, name):
    make, quantized_layer = READERS[name]
    torch.manual_seed(0)
    model = make().eval()
    decoder = {"decoder_input_ids": TOKENS} if name == "T5" else {}
    expected = logits(model, TOKENS, **decoder)
    report = quantize_model(model, nbits=8, group_size=16, progress=False)
    assert any(name.endswith(quantized_layer) for name in report.quantized)
    found = logits(model, TOKENS, **decoder)
    assert (found - expected).norm() < 0.05 * expected.norm()
    save_quantized(model, tmp_path / "model")
    for load in (load_quantized, type(model).from_pretrained):
        assert torch.equal(logits(load(tmp_path / "model").eval(), TOKENS, **decoder), found)
