"""`save_quantized` and `load_quantized`: bit for bit, layer by layer, and against damaged and hostile directories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import hqq_layer, randomize
from hqq.core.quantize import HQQLinear, Quantizer
from peft import OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_llama import VOCABULARY, small_llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import hqq_oft
from hqq_oft import CheckpointError, load_quantized, quantize_model, save_quantized
from hqq_oft.checkpoint.files import Checkpoint, crc32
from hqq_oft.checkpoint.layer_format import FIELDS, StoredLayer, tensors_of
from hqq_oft.checkpoint.save import parse_size

TOKENS = torch.arange(12).reshape(2, 6) % VOCABULARY


def quantized(**settings):
    model = small_llama()
    quantize_model(model, progress=False, **{"group_size": 16, **settings})
    return model


@pytest.fixture
def stored(tmp_path):
    """A directory with a model in one file."""
    save_quantized(quantized(), tmp_path / "model")
    return tmp_path / "model"


def state(model):
    """Every tensor of the state, by name."""
    found = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, layer in model.named_modules():
        if isinstance(layer, HQQLinear):
            found |= {f"{name}.{key}": value for key, value in layer.meta.items() if isinstance(value, torch.Tensor)}
    return found


def assert_same(a, b):
    left, right = state(a), state(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, crc32(tensor)) == (right[name].dtype, crc32(right[name])), name
    assert torch.equal(a(TOKENS).logits, b(TOKENS).logits)


# --- There and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_is_bitwise_equal_to_the_saved_one(tmp_path, dtype):
    model = quantized(compute_dtype=dtype, overrides={"down_proj": {"nbits": 8}, "up_proj": None})
    save_quantized(model, tmp_path / "model", max_shard_size="8KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    loaded = load_quantized(tmp_path / "model", progress=False)
    assert_same(model, loaded)
    assert loaded.hqq_quantized
    assert not loaded.training
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    save_quantized(loaded, tmp_path / "again", max_shard_size="8KB")
    for path in (tmp_path / "model").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_every_loaded_layer_is_bitwise_equal_with_its_settings(tmp_path, nbits, axis):
    for number, layer in enumerate(
        [
            hqq_layer(nbits=nbits, axis=axis),
            hqq_layer(nbits=nbits, axis=axis, view_as_float=True, bias=False, dtype=torch.bfloat16),
            hqq_layer(96, 64, nbits=nbits, axis=axis, group_size=None),
        ]
    ):
        path = tmp_path / str(number)
        path.mkdir()
        save_file({f"l.{name}": tensor for name, tensor in tensors_of(layer).items()}, path / "model.safetensors")
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        with Checkpoint(path) as checkpoint:
            found = StoredLayer.read(checkpoint, "l", tuple(linear.weight.shape), linear.bias is not None)
            loaded = found.load(checkpoint, "l", linear.bias is not None, torch.device("cpu"))
        assert loaded.W_q.dtype == layer.W_q.dtype
        assert crc32(loaded.W_q) == crc32(layer.W_q)  # compare bytes: as floats, some values may be NaN
        assert torch.equal(loaded.dequantize(), layer.dequantize())
        assert loaded.bias is layer.bias or torch.equal(loaded.bias, layer.bias)
        was, now = (
            hqq_oft.quant.hqq_layer.quantization_settings(one)["weight_quant_params"] for one in (layer, loaded)
        )
        assert was == now
        assert now["nbits"] == nbits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_loads_in_another_compute_dtype_with_the_same_packed_weights(tmp_path, dtype):
    model = quantized(overrides={"down_proj": {"nbits": 3}})
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", compute_dtype=dtype, progress=False)
    was, now = state(model), state(loaded)
    assert {tensor.dtype for name, tensor in now.items() if not name.endswith(("W_q", "inv_freq"))} == {dtype}
    for name, tensor in now.items():
        expected = was[name] if name.endswith(("W_q", "inv_freq")) else was[name].to(dtype)
        assert torch.equal(tensor, expected), name
    assert {module.compute_dtype for module in loaded.modules() if isinstance(module, HQQLinear)} == {dtype}
    assert loaded(TOKENS).logits.dtype == dtype
    with pytest.raises(TypeError, match=r"compute_dtype must be a floating dtype, got torch\.int8"):
        load_quantized(tmp_path / "model", compute_dtype=torch.int8)


def test_a_weight_viewed_as_floats_loads_in_another_compute_dtype_if_its_rows_allow_it(tmp_path):
    layer = hqq_layer(nbits=4, view_as_float=True, dtype=torch.bfloat16)
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    save_file({f"l.{name}": tensor for name, tensor in tensors_of(layer).items()}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        found = StoredLayer.read(checkpoint, "l", tuple(linear.weight.shape), linear.bias is not None)
        loaded = found.load(checkpoint, "l", linear.bias is not None, torch.device("cpu"), torch.float32)
        assert loaded.W_q.dtype == loaded.compute_dtype == torch.float32
        assert crc32(loaded.W_q) == crc32(layer.W_q)
        assert (loaded.dequantize() - layer.dequantize()).abs().max() < 1e-2
    layer.W_q.data = layer.W_q.data[:, :-1].contiguous()
    save_file({"l.W_q": layer.W_q.data}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint, pytest.raises(ValueError, match=r"l: its rows of .* can't be viewed as"):
        found.load(checkpoint, "l", False, torch.device("cpu"), torch.float64)


def test_the_stored_fields_are_those_of_hqq():
    assert set(FIELDS) == HQQLinear(None, None).state_dict_keys()


def test_deprecated_forms_of_a_layer_are_stored_plainly(tmp_path):
    plain, stacked, unpacked = hqq_layer(), hqq_layer(), hqq_layer(nbits=8)
    stacked.load_state_dict(plain.state_dict())
    stacked.meta["zero_scale"] = torch.stack([stacked.meta.pop("zero"), stacked.meta.pop("scale")])
    unpacked.W_q, unpacked.meta["packing"] = nn.Parameter(unpacked.W_q.float(), requires_grad=False), None
    for layer, twin in ((stacked, plain), (unpacked, None)):
        made = tensors_of(layer)
        assert twin is None or all(torch.equal(made[name], tensor) for name, tensor in tensors_of(twin).items())
    assert made["W_q"].dtype == torch.uint8
    assert bytes(made["packing"].tolist()) == b"8bit_u8"


def test_tied_weights_stay_tied_and_are_stored_once(tmp_path):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    report = quantize_model(model, group_size=16, skip_modules=(), progress=False)
    assert report.kept == {"lm_head": "its weight is tied to another module's"}
    save_quantized(model, tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    loaded = load_quantized(tmp_path / "model", progress=False)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(model, loaded)


def test_adapters_trained_before_saving_fit_the_loaded_model(tmp_path):
    with hqq_oft.patch_peft():
        model = quantized()
        save_quantized(model, tmp_path / "model")
        adapted = get_peft_model(model, OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj", "v_proj"])).eval()
        randomize(adapted, 0.1)
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(load_quantized(tmp_path / "model"), tmp_path / "adapter").eval()
        assert torch.equal(loaded(TOKENS).logits, adapted(TOKENS).logits)
        merged = adapted.merge_and_unload()
        save_quantized(merged, tmp_path / "merged")
    assert_same(merged, load_quantized(tmp_path / "merged"))


PEAK = """
import re, sys, torch, hqq_oft
from hqq_oft.quant.report import stored_bytes

def status(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = hqq_oft.load_quantized(sys.argv[1], progress=False)
dense = sum(4 * layer.in_features * layer.out_features for layer in model.modules() if hasattr(layer, "W_q"))
print(status("VmHWM") - before, stored_bytes(model), dense)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory is read from Linux")
def test_loading_never_materializes_the_dense_model(tmp_path, monkeypatch):
    monkeypatch.setattr(Quantizer, "optimize_weights", quick)
    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=8
    )
    model = LlamaForCausalLM(config)
    quantize_model(model, progress=False)
    save_quantized(model, tmp_path / "model")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, size, dense = map(int, output.split())
    assert dense > 5 * size
    assert peak < dense / 2


def quick(tensor, scale, zero, min_max, axis, device):
    """HQQ's optimization of scale and zero, left out: values don't matter here."""
    return (tensor * scale + zero).round().clamp(*min_max), scale, zero


# --- What is refused on the way out ----------------------------------------------------------------------------------


def test_an_unsupported_model_is_refused_before_anything_is_written(tmp_path):
    with hqq_oft.patch_peft():
        adapted = get_peft_model(quantized(), OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]))
    offloaded = quantized()
    offloaded.lm_head.to("meta")
    for model, error, message in [
        (adapted, ValueError, r"the model has adapters: merge them with model.merge_and_unload\(\)"),
        (adapted.base_model.model, ValueError, "the model has adapters"),
        (small_llama(), ValueError, "the model has no HQQ layer: call quantize_model first"),
        (
            nn.Sequential(hqq_layer()),
            TypeError,
            "expected a transformers or diffusers model, got Sequential, which has no config",
        ),
        (offloaded, ValueError, "lm_head.weight is on the meta device"),
    ]:
        with pytest.raises(error, match=message):
            save_quantized(model, tmp_path / "model")
    for size in ("much", 0, "-3GB", "5XB", None):
        with pytest.raises(ValueError, match="a size must be a number of bytes or like '500MB'"):
            save_quantized(quantized(), tmp_path / "model", max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("text", "size"), [(7, 7), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5 kb", 1500), ("9", 9)])
def test_shard_sizes_are_parsed(text, size):
    assert parse_size(text) == size


# --- What is refused on the way in -----------------------------------------------------------------------------------

Q = "model.layers.0.self_attn.q_proj"


def rewrite(directory: Path, change) -> None:
    """Change tensors of a stored model and keep every other file consistent, so that only the values are invalid."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    (directory / "hqq_oft.json").unlink(missing_ok=True)
    save_file(tensors, path)


def text(value):
    return torch.tensor(list(value.encode()), dtype=torch.uint8)


TENSORS = {
    "a missing weight": (lambda t: t.pop(f"{Q}.scale"), rf"tensor '{Q}.scale': missing"),
    "a missing layer": (lambda t: [t.pop(n) for n in list(t) if n.startswith(Q)], rf"tensor '{Q}.weight': missing"),
    "a missing setting": (lambda t: t.pop(f"{Q}.axis"), rf"tensor '{Q}.axis': missing"),
    "a missing bias": (lambda t: t.pop(f"{Q}.bias"), rf"tensor '{Q}.bias': missing"),
    "a missing norm": (lambda t: t.pop("model.norm.weight"), "tensor 'model.norm.weight': missing"),
    "a tensor too many": (
        lambda t: t.update({"model.extra": torch.zeros(3)}),
        "tensor 'model.extra': the model that .*config.json describes has no such tensor",
    ),
    "a norm of another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        r"tensor 'model.norm.weight': its shape is \[31\], expected \[32\]",
    ),
    "a norm of whole numbers": (
        lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}),
        "tensor 'model.norm.weight': its dtype is torch.int32, expected torch.float32",
    ),
    "code for a dtype": (
        lambda t: t.update({f"{Q}.compute_dtype": text("__import__('os').abort()")}),
        rf"tensor '{Q}.compute_dtype': .* is not one of torch.float16",
    ),
    "code longer than a setting": (
        lambda t: t.update({f"{Q}.compute_dtype": text("print('here') or " * 8)}),
        rf"tensor '{Q}.compute_dtype': 136 bytes are too many, at most 64",
    ),
    "an unknown packing": (
        lambda t: t.update({f"{Q}.packing": text("7bit_u9")}),
        rf"tensor '{Q}.packing': '7bit_u9' is not one of 8bit_u8",
    ),
    "a packing of other bits": (
        lambda t: t.update({f"{Q}.packing": text("2bit_u8")}),
        rf"tensor '{Q}.packing': 2bit_u8 does not match 4 bits",
    ),
    "seven bits": (lambda t: t.update({f"{Q}.nbits": torch.tensor(7)}), rf"tensor '{Q}.nbits': 7 is not one of 8, 6"),
    "no number of bits": (
        lambda t: t.update({f"{Q}.nbits": torch.tensor(float("nan"))}),
        rf"tensor '{Q}.nbits': nan is not a single number",
    ),
    "two numbers of bits": (
        lambda t: t.update({f"{Q}.nbits": torch.tensor([4, 4])}),
        rf"tensor '{Q}.nbits': \[4, 4\] is not a single number",
    ),
    "axis two": (lambda t: t.update({f"{Q}.axis": torch.tensor(2)}), rf"tensor '{Q}.axis': 2 is not one of 0, 1"),
    "the other axis": (lambda t: t.update({f"{Q}.axis": torch.tensor(0)}), rf"tensor '{Q}.W_q': its shape is"),
    "a group that does not divide": (
        lambda t: t.update({f"{Q}.group_size": torch.tensor(24)}),
        rf"tensor '{Q}.group_size': 24 does not divide 1024 weights",
    ),
    "a group of none": (
        lambda t: t.update({f"{Q}.group_size": torch.tensor(0)}),
        rf"tensor '{Q}.group_size': 0 does not divide",
    ),
    "a negative group": (
        lambda t: t.update({f"{Q}.group_size": torch.tensor(-16)}),
        rf"tensor '{Q}.group_size': -16 does not divide",
    ),
    "a huge shape": (
        lambda t: t.update({f"{Q}.shape": torch.tensor([2**40, 2**20])}),
        rf"tensor '{Q}.shape': \(1099511627776, 1048576\), but config.json has \(32, 32\)",
    ),
    "a packed weight cut short": (
        lambda t: t.update({f"{Q}.W_q": t[f"{Q}.W_q"][:-1].clone()}),
        rf"tensor '{Q}.W_q': its shape is \[31, 16\], expected \[32, 16\]",
    ),
    "a packed weight of floats": (
        lambda t: t.update({f"{Q}.W_q": t[f"{Q}.W_q"].float()}),
        rf"tensor '{Q}.W_q': its dtype is torch.float32, expected torch.uint8",
    ),
    "a scale of whole numbers": (
        lambda t: t.update({f"{Q}.scale": t[f"{Q}.scale"].int()}),
        rf"tensor '{Q}.scale': its dtype is torch.int32",
    ),
    "a scale of another shape": (
        lambda t: t.update({f"{Q}.scale": t[f"{Q}.scale"].T.contiguous()}),
        rf"tensor '{Q}.scale': its shape is \[1, 64\], expected \[64, 1\]",
    ),
    "an infinite scale": (
        lambda t: t[f"{Q}.scale"].fill_(float("inf")),
        rf"tensor '{Q}.scale': contains NaN or infinity",
    ),
    "a zero that is no number": (
        lambda t: t[f"{Q}.zero"][3].fill_(float("nan")),
        rf"tensor '{Q}.zero': contains NaN or infinity",
    ),
    "a quantized scale": (
        lambda t: t.update({f"{Q}.quant_scale": torch.tensor(1, dtype=torch.uint8)}),
        rf"tensor '{Q}.quant_scale': must be 0; HQQ's deprecated formats",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_with_invalid_shape_dtype_or_values_are_refused_by_name(stored, case):
    change, message = TENSORS[case]
    rewrite(stored, change)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_quantized(stored, progress=False)
    assert str(stored) in str(raised.value)


def edit(directory, name, **changes):
    path = directory / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_bit(directory):
    path = directory / "model.safetensors"
    content = bytearray(path.read_bytes())
    place = content.index(load_file(path)[f"{Q}.W_q"].numpy().tobytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index(weight_map):
    return lambda d: (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


NO_FILE = r"index.json: tensor 'w': .* is not a \*.safetensors file name"
DIRECTORIES = {
    "no directory": (lambda d: d.rename(d.with_name("other")), FileNotFoundError, "contains no config.json"),
    "no config": (lambda d: (d / "config.json").unlink(), FileNotFoundError, "contains no config.json"),
    "no tensors": (lambda d: (d / "model.safetensors").unlink(), FileNotFoundError, "neither model.safetensors nor"),
    "half a config": (lambda d: (d / "config.json").write_text('{"a": '), CheckpointError, "config.json: not valid"),
    "a list for a config": (lambda d: (d / "config.json").write_text("[]"), CheckpointError, "not a JSON object"),
    "no method": (lambda d: edit(d, "config.json", quantization_config=None), CheckpointError, "another function"),
    "another method": (
        lambda d: edit(d, "config.json", quantization_config={"quant_method": "gptq"}),
        CheckpointError,
        "is quantized with 'gptq'",
    ),
    "an unknown class": (
        lambda d: edit(d, "config.json", architectures=["Mine"]), ValueError, r"architectures is \['Mine'\], which"
    ),
    "a class that is a module": (
        lambda d: edit(d, "config.json", architectures=["utils"]), ValueError, r"architectures is \['utils'\], which is"
    ),
    "a class that is no model": (
        lambda d: edit(d, "config.json", architectures=["LlamaConfig"]), ValueError, "which is not a model class"
    ),
    "no class": (lambda d: edit(d, "config.json", architectures=None), ValueError, "architectures is None"),
    "a million layers": (
        lambda d: edit(d, "config.json", num_hidden_layers=10**6), CheckpointError, "num_hidden_layers is 1000000, more"
    ),
    "a layer more": (
        lambda d: edit(d, "config.json", num_hidden_layers=3), CheckpointError, "tensor 'model.layers.2.*': missing"
    ),
    "a layer less": (
        lambda d: edit(d, "config.json", num_hidden_layers=1), CheckpointError, "tensor 'model.layers.1.*no such tensor"
    ),
    "an immense vocabulary": (
        lambda d: edit(d, "config.json", vocab_size=2**40), CheckpointError, "'model.embed_tokens.weight': its shape is"
    ),
    "a flipped bit": (flip_a_bit, CheckpointError, rf"tensor '{Q}.W_q': damaged: its checksum does not match"),
    "a cut file": (cut, CheckpointError, "model.safetensors: truncated, damaged or not a safetensors"),
    "a newer format": (
        lambda d: edit(d, "hqq_oft.json", format_version=2), CheckpointError, "format_version is 2; this hqq_oft"
    ),
    "half a manifest": (lambda d: edit(d, "hqq_oft.json", crc32={}), CheckpointError, "not in both this file"),
    "checksums that are text": (
        lambda d: edit(d, "hqq_oft.json", crc32={"w": "1"}), CheckpointError, "crc32 must be an object"
    ),
    "an index of nothing": (index({}), CheckpointError, "weight_map must be an object"),
    "an index with a path": (index({"w": "../other.safetensors"}), CheckpointError, NO_FILE),
    "an index with an absolute path": (index({"w": "/etc/passwd"}), CheckpointError, NO_FILE),
    "an index with a folder": (index({"w": "sub/model.safetensors"}), CheckpointError, NO_FILE),
    "an index with a backslash": (index({"w": "..\\model.safetensors"}), CheckpointError, NO_FILE),
    "an index with a pickle": (index({"w": "pytorch_model.bin"}), CheckpointError, NO_FILE),
    "an index with a number": (index({"w": 5}), CheckpointError, NO_FILE),
    "an index with a file that is missing": (
        index({"w": "lost.safetensors"}), CheckpointError, "tensor 'w': the file lost.safetensors is missing"
    ),
    "an index with a tensor that is missing": (
        index({"w": "model.safetensors"}), CheckpointError, "not in both the file and model"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DIRECTORIES)
def test_an_incomplete_or_invalid_directory_is_refused(stored, case):
    change, error, message = DIRECTORIES[case]
    change(stored)
    with pytest.raises(error, match=message) as raised:
        load_quantized(stored, progress=False)
    assert str(stored) in str(raised.value)


def test_a_diffusers_model_needs_diffusers(stored, monkeypatch):
    edit(stored, "config.json", _class_name="FluxTransformer2DModel")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match="'FluxTransformer2DModel' is a model of diffusers, which is not installed"):
        load_quantized(stored, progress=False)


def test_nothing_is_read_before_all_sizes_are_checked(stored, monkeypatch):
    rewrite(stored, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    original, read = Checkpoint.read, []

    def recording(self, *args):
        read.append(original(self, *args))
        return read[-1]

    monkeypatch.setattr(Checkpoint, "read", recording)
    with pytest.raises(CheckpointError):
        load_quantized(stored, progress=False)
    assert max(tensor.nbytes for tensor in read) <= 64
