"""Models that HQQ or other versions of transformers stored: they load, or the error names the command that converts."""

from __future__ import annotations

import json
import shutil
from importlib import metadata

import pytest
import torch
import transformers
from helpers import logits
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from peft import OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_llama import VOCABULARY, small_llama
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import hqq_oft
from hqq_oft import CheckpointError, cli, load_quantized, quantize_model, save_quantized
from hqq_oft.checkpoint.layer_format import tensors_of

TOKENS = torch.arange(12).reshape(2, 6) % VOCABULARY
Q = "model.layers.0.self_attn.q_proj"


def convert(source, target):
    return cli.main(["convert", str(source), str(target), "--quiet", "--traceback"])


def by_hqq(**settings):
    """A model that HQQ's own function quantized."""
    model = small_llama()
    config = BaseQuantizeConfig(**{"nbits": 4, "group_size": 16, "axis": 1, **settings})
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float32, device="cpu")
    return model.eval()


SETTINGS = [{}, {"nbits": 3, "axis": 0}, {"nbits": 8, "view_as_float": True}, {"quant_zero": True, "quant_scale": True}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_qmodel_pt_is_converted(tmp_path, settings):
    model = by_hqq(**settings)
    (tmp_path / "hqq").mkdir()
    AutoHQQHFModel.save_quantized(model, str(tmp_path / "hqq"))
    with pytest.raises(CheckpointError, match=r"qmodel\.pt is in HQQ's own format; `hqq-oft convert .*hqq NEW`"):
        load_quantized(tmp_path / "hqq")
    assert convert(tmp_path / "hqq", tmp_path / "new" / "model") == 0
    loaded = load_quantized(tmp_path / "new" / "model")
    assert sum(isinstance(module, HQQLinear) for module in loaded.modules()) == 14
    assert torch.allclose(logits(loaded, TOKENS), logits(model, TOKENS), atol=1e-5)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_qmodel_pt_is_converted_by_a_package_that_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "hqq").mkdir()
    AutoHQQHFModel.save_quantized(by_hqq(), str(tmp_path / "hqq"))
    version = metadata.version

    def not_installed(name):
        if name == "hqq-oft":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", not_installed)
    assert convert(tmp_path / "hqq", tmp_path / "new") == 0


def test_qmodel_pt_of_an_old_hqq_is_converted(tmp_path):
    model = by_hqq()
    (tmp_path / "hqq").mkdir()
    AutoHQQHFModel.save_quantized(model, str(tmp_path / "hqq"))
    modules = torch.load(tmp_path / "hqq" / "qmodel.pt")
    for name, state in modules.items():
        if "W_q" in state:
            meta = {key: value for key, value in model.get_submodule(name).meta.items() if key != "view_as_float"}
            modules[name] = {"W_q": state["W_q"], "bias": state.get("bias"), "meta": meta}
    torch.save(modules, tmp_path / "hqq" / "qmodel.pt")
    assert convert(tmp_path / "hqq", tmp_path / "new") == 0
    assert torch.allclose(logits(load_quantized(tmp_path / "new"), TOKENS), logits(model, TOKENS), atol=1e-5)


class Opener:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("damage", ["code", "truncated", "no weight", "wrong shape"])
def test_a_qmodel_pt_with_code_or_damage_is_refused(tmp_path, damage):
    (tmp_path / "hqq").mkdir()
    AutoHQQHFModel.save_quantized(by_hqq(), str(tmp_path / "hqq"))
    path = tmp_path / "hqq" / "qmodel.pt"
    modules = torch.load(path)
    if damage == "code":
        modules["extra"] = Opener(str(tmp_path / "run"))
    elif damage == "no weight":
        del modules[Q]
    elif damage == "wrong shape":
        modules[Q]["W_q"] = modules[Q]["W_q"][1:]
    torch.save(modules, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"qmodel\.pt: |q_proj\.\w+': missing"):
        convert(tmp_path / "hqq", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["hqq"]


def test_hqqs_safetensors_files_are_converted(tmp_path):
    model = by_hqq()
    model.config.architectures = ["LlamaForCausalLM"]  # as in a model that was loaded
    AutoHQQHFModel.save_to_safetensors(model, str(tmp_path / "hqq"), num_blocks_per_file=1, verbose=False)
    with pytest.raises(CheckpointError, match=r"no quantization_config for HQQ: its HQQ layers were .*hqq-oft convert"):
        load_quantized(tmp_path / "hqq")
    assert convert(tmp_path / "hqq", tmp_path / "new") == 0
    loaded = load_quantized(tmp_path / "new")
    assert torch.allclose(logits(loaded, TOKENS), logits(model, TOKENS), atol=1e-5)


# --- transformers 4 ---------------------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
MODELS = {
    "MoE": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=2)),
    "MoE with a shared name": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2, head_dim=8)
    ),
    "MoE with a renamed router": lambda: GraniteMoeForCausalLM(GraniteMoeConfig(**SMALL, num_local_experts=4)),
    "NeoX": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**{key: value for key, value in SMALL.items() if "key_value" not in key})
    ),
    "VLM": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VISION, image_size=16, patch_size=8), text_config=LlamaConfig(**SMALL)
        )
    ),
}


def store_as_version_4(model, folder):
    """Write `folder/hqq`, whose linear layers are HQQ's under the names of transformers 4, and their dense values."""
    model.save_pretrained(folder / "dense")  # with the names of the original checkpoints
    path = folder / "dense" / "model.safetensors"
    tensors, stored = load_file(path), {}
    for key, value in tensors.items():
        if value.dim() != 2 or "embed" in key or key == "lm_head.weight":
            stored[key] = value
            continue
        linear = nn.Linear(value.shape[1], value.shape[0], bias=False)
        linear.weight = nn.Parameter(value.clone(), requires_grad=False)
        layer = HQQLinear(
            linear, BaseQuantizeConfig(nbits=4, group_size=16, axis=1), compute_dtype=torch.float32, device="cpu"
        )
        stored |= {f"{key.removesuffix('weight')}{name}": tensor for name, tensor in tensors_of(layer).items()}
        tensors[key] = layer.dequantize()
    shutil.copytree(folder / "dense", folder / "hqq")
    save_file(tensors, path, {"format": "pt"})
    save_file(stored, folder / "hqq" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "hqq" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "quant_config": {}, "skip_modules": ["lm_head"]}
    (folder / "hqq" / "config.json").write_text(json.dumps(config))


@pytest.mark.skipif(transformers.__version__ < "5", reason="the names differ from version 5's")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_transformers_4_stored_loads_or_is_converted(tmp_path, name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    store_as_version_4(model, tmp_path)
    expected = logits(type(model).from_pretrained(tmp_path / "dense").eval(), TOKENS)
    with hqq_oft.patch_transformers():
        loaded, info = type(model).from_pretrained(tmp_path / "hqq", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sum(isinstance(module, HQQLinear) for module in loaded.modules()) >= 8
    assert torch.allclose(logits(loaded.eval(), TOKENS), expected, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"/hqq: tensor .*If another version .* `hqq-oft convert .*hqq NEW`"):
        load_quantized(tmp_path / "hqq")
    assert convert(tmp_path / "hqq", tmp_path / "new") == 0
    assert torch.equal(logits(load_quantized(tmp_path / "new"), TOKENS), logits(loaded, TOKENS))
    loaded.save_pretrained(tmp_path / "again")  # the conversions of HQQ layers are not applied in reverse
    with hqq_oft.patch_transformers():
        again = type(model).from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(again, TOKENS), logits(loaded, TOKENS))


@pytest.mark.parametrize("limit", [float("inf"), {"__float__": "Infinity"}])
def test_an_infinite_value_in_the_configuration_is_read(tmp_path, limit):
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, state_size=16, num_heads=8, head_dim=8, n_groups=2
    )
    model = Mamba2ForCausalLM(config).eval()
    quantize_model(model, group_size=16, progress=False)
    save_quantized(model, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    stored = json.loads(path.read_text())
    stored["time_step_limit"] = [0.0, limit]
    path.write_text(json.dumps(stored))
    loaded = load_quantized(tmp_path / "model")
    assert tuple(loaded.config.time_step_limit) == (0.0, float("inf"))
    assert torch.equal(logits(loaded, TOKENS), logits(model, TOKENS))


# --- What a directory is ----------------------------------------------------------------------------------------------


def test_the_error_says_what_a_directory_is(tmp_path):
    small_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="no quantization_config for HQQ: the model is dense: load it with"):
        load_quantized(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match="the model is quantized with 'gptq'"):
        load_quantized(tmp_path / "dense")
    adapted = get_peft_model(small_llama(), OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match=r"contains no config\.json: it is a PEFT adapter"):
        load_quantized(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="it is no saved model"):
        load_quantized(tmp_path)
