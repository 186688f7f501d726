"""`OFTLinear` in models: dense layers beside HQQ's, and layers of other quantizers.

bitsandbytes and torchao run on a CPU, where they are installed. For GPTQ, AWQ, AQLM and EETQ a class with their
interface stands in.
"""

from __future__ import annotations

import warnings

import packaging.version
import peft
import pytest
import torch
from helpers import logits, relative_error
from peft import OFTConfig, PeftModel, get_peft_model
from peft.tuners.oft.layer import OFTLayer
from safetensors.torch import load_file
from small_llama import quantized_llama, small_llama
from torch import nn

import hqq_oft
from hqq_oft import HqqOFTLinear, OFTLinear

PEFT_WRITES_QUANTIZED_WEIGHTS = packaging.version.parse(peft.__version__).release >= (0, 21)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapters(model):
    return [module for module in model.modules() if isinstance(module, OFTLayer)]


def randomize(model, adapter="default", std=0.1):
    for layer in adapters(model):
        nn.init.normal_(layer.oft_R[adapter].weight, std=std)


def config(targets=TARGETS, **options):
    return OFTConfig(r=0, target_modules=targets, **{"oft_block_size": 8, "use_cayley_neumann": True, **options})


@pytest.fixture
def mixed():
    """A small Llama whose q_proj are HQQ layers; v_proj and down_proj are dense."""
    base, dense = quantized_llama(), small_llama()
    for ours, theirs in zip(base.model.layers, dense.model.layers, strict=True):
        ours.self_attn.v_proj, ours.mlp.down_proj = theirs.self_attn.v_proj, theirs.mlp.down_proj
    model = get_peft_model(base, config())
    assert sorted(type(layer).__name__ for layer in adapters(model)) == ["HqqOFTLinear"] * 2 + ["OFTLinear"] * 4
    randomize(model)
    return model.eval()


# --- Dense layers beside HQQ's ---------------------------------------------------------------------------------------


def test_a_mixed_model_serves_an_adapter_per_sample(mixed, tokens):
    mixed.add_adapter("second", config(oft_block_size=4))
    randomize(mixed, "second")
    names = ["second", "__base__", "default"]
    found = logits(mixed, tokens, adapter_names=names)
    for row, name in enumerate(names):
        mixed.set_adapter("default" if name == "__base__" else name)
        with mixed.disable_adapter() if name == "__base__" else torch.no_grad():
            assert relative_error(found[row : row + 1], logits(mixed, tokens[row : row + 1])) <= 1e-5
    mixed.set_adapter("default")
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    assert mixed.generate(input_ids=tokens, adapter_names=names, **options).shape[1] > tokens.shape[1]


def test_adapters_saved_by_either_package_load_in_the_other(tokens, tmp_path):
    ours = get_peft_model(small_llama(), config())
    randomize(ours)
    ours.save_pretrained(tmp_path / "ours")
    expected = logits(ours.eval(), tokens)
    hqq_oft.unpatch_peft()
    base = small_llama()
    base.load_state_dict(ours.unload().state_dict())
    theirs = PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert not any(isinstance(layer, OFTLinear) for layer in adapters(theirs))
    assert relative_error(logits(theirs, tokens), expected) <= 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    with hqq_oft.patch_peft():
        again = PeftModel.from_pretrained(theirs.unload(), tmp_path / "theirs").eval()
    assert {type(layer) for layer in adapters(again)} == {OFTLinear}
    assert torch.equal(logits(again, tokens), expected)


def test_a_mixed_model_merges_unmerges_and_unloads(mixed, tokens):
    expected = logits(mixed, tokens)
    dense = [layer for layer in adapters(mixed) if isinstance(layer, OFTLinear)]
    before = [layer.base_layer.weight.clone() for layer in dense]
    mixed.merge_adapter()
    assert all(layer.merged for layer in adapters(mixed))
    assert len(mixed.base_model.merge_errors()) == 2
    mixed.unmerge_adapter()
    assert torch.equal(logits(mixed, tokens), expected)
    assert all(torch.equal(layer.base_layer.weight, weight) for layer, weight in zip(dense, before, strict=True))
    merged = mixed.merge_and_unload(into="dense")
    assert not adapters(merged)
    assert relative_error(logits(merged, tokens), expected) <= 1e-5


def test_a_dense_model_shares_and_freezes_rotations(tokens, launches):
    model = get_peft_model(small_llama(), config())
    randomize(model)
    model.train()
    with hqq_oft.share_rotations(model), torch.no_grad():
        shared = logits(model, tokens)
        assert launches.count("cayley") == 1
    assert torch.equal(shared, logits(model, tokens))
    with hqq_oft.frozen_rotations(model.eval()):
        launches.clear()
        assert relative_error(logits(model, tokens), shared) <= 1e-6
        assert "cayley" not in launches


def test_rotations_shared_in_another_dtype_than_the_inputs_are_not_used(tokens):
    model = get_peft_model(small_llama(), config(["down_proj"]))  # whose input autocast has made bfloat16
    randomize(model)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = logits(model, tokens)
        with hqq_oft.share_rotations(model):
            assert torch.equal(logits(model, tokens), expected)


def test_dense_models_convert_and_revert(tokens):
    hqq_oft.unpatch_peft()
    model = get_peft_model(small_llama(), config())
    randomize(model)
    classes = [type(layer) for layer in adapters(model)]
    expected = logits(model.eval(), tokens)
    assert len(hqq_oft.convert(model).replaced) == 6
    assert {type(layer) for layer in adapters(model)} == {OFTLinear}
    assert relative_error(logits(model, tokens), expected) <= 1e-5
    assert len(hqq_oft.revert(model).replaced) == 6
    assert [type(layer) for layer in adapters(model)] == classes
    assert torch.equal(logits(model, tokens), expected)


# --- Other quantizers ------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """The interface of the layers of GPTQ, AWQ, AQLM and EETQ: packed buffers and a forward; no `weight`."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.scale = nn.Parameter(dense.weight.detach().abs().amax(1, keepdim=True) / 127, requires_grad=False)
        self.register_buffer("qweight", (dense.weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        assert x.dtype == torch.float32
        return x @ (self.qweight * self.scale).T


def test_a_layer_that_only_has_a_forward(tokens):
    base = StandIn(nn.Linear(32, 16))
    layer = OFTLinear(base, "default", r=0, oft_block_size=8, use_cayley_neumann=True)
    layer.update_layer("second", r=0, oft_block_size=4)
    for module in layer.oft_R.values():
        nn.init.normal_(module.weight, std=0.1)
    x = torch.randn(3, 32, requires_grad=True)
    rotated = x @ layer.get_delta_weight("default")
    y = layer(x)
    assert relative_error(y, base(rotated)) <= 1e-6
    grad = torch.randn_like(y)
    leaves = (x, layer.oft_R["default"].weight)
    found, wanted = (torch.autograd.grad(out, leaves, grad) for out in (y, base(rotated)))
    for out, expected in zip(found, wanted, strict=True):
        assert relative_error(out, expected) <= 1e-5
    mixed = layer.eval()(x, adapter_names=["second", "__base__", "default"])
    assert relative_error(mixed[2], y[2]) <= 1e-6
    assert relative_error(mixed[1], base(x)[1]) <= 1e-6
    with pytest.raises(TypeError, match="cannot merge OFT into a StandIn"):
        layer.merge()
    assert not layer.merged


@pytest.mark.skipif(not PEFT_WRITES_QUANTIZED_WEIGHTS, reason="before, each quantizer had a class of its own in PEFT")
def test_peft_puts_it_on_layers_that_it_only_calls(monkeypatch):
    from peft.utils import quantization_utils

    def resolve(base, **kwargs):
        return quantization_utils.ForwardOnlyQuantizationBackend("gptq") if isinstance(base, StandIn) else None

    for module in ("layer", "model"):
        monkeypatch.setattr(f"peft.tuners.oft.{module}.resolve_quantization_backend", resolve)
    model = nn.ModuleDict({"packed": StandIn(nn.Linear(32, 16)), "dense": nn.Linear(32, 16)})
    adapted = get_peft_model(model, config(["packed", "dense"]))
    assert [type(layer) for layer in adapters(adapted)] == [OFTLinear] * 2
    randomize(adapted)
    weight = model["dense"].base_layer.weight.clone()
    with pytest.raises(TypeError, match="cannot merge OFT into a StandIn: PEFT has no way to write its weight"):
        adapted.merge_adapter()
    assert not any(layer.merged for layer in adapters(adapted))
    assert torch.equal(model["dense"].base_layer.weight, weight)
    assert isinstance(adapted.unload()["packed"], StandIn)


def bitsandbytes_8bit(dense):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(dense.in_features, dense.out_features, bias=False, has_fp16_weights=False)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


def bitsandbytes_4bit(dense):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(dense.in_features, dense.out_features, bias=False, compute_dtype=torch.float32)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


def torchao_int8(dense):
    torchao = pytest.importorskip("torchao")
    layer = nn.Sequential(dense)
    torchao.quantize_(layer, torchao.quantization.Int8WeightOnlyConfig())
    return layer[0]


@pytest.mark.parametrize("quantized", [bitsandbytes_8bit, bitsandbytes_4bit, torchao_int8])
def test_other_quantizers_layers(quantized):
    base = quantized(nn.Linear(256, 128, bias=False))
    extra = {}
    if quantized is torchao_int8:
        from torchao.quantization import Int8WeightOnlyConfig

        extra["get_apply_tensor_subclass"] = Int8WeightOnlyConfig
    layer = OFTLinear(base, "default", r=0, oft_block_size=32, use_cayley_neumann=True, **extra).eval()
    nn.init.normal_(layer.oft_R["default"].weight, std=0.05)
    layer.oft_R.float()
    x = torch.randn(7, 256)
    with torch.no_grad():
        untouched, expected = base(x), layer(x)
        assert relative_error(expected, base(x @ layer.get_delta_weight("default"))) <= 1e-3  # some compute in bfloat16
        assert relative_error(expected, untouched) > 0.1
        if not PEFT_WRITES_QUANTIZED_WEIGHTS:
            with pytest.raises(TypeError, match="PEFT has no way to write its weight"):
                layer.merge()
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer.merge(safe_merge=True)
        assert 0 < relative_error(layer(x), expected) < 0.15  # of quantizing again
        merged = layer(x)
        layer.update_layer("broken", r=0, oft_block_size=32)
        layer.oft_R["broken"].weight.fill_(torch.nan)
        with pytest.raises(ValueError, match="the adapter 'broken' seems to be broken"):
            layer.merge(safe_merge=True, adapter_names=["broken"])
        assert layer.merged_adapters == ["default"]
        assert relative_error(layer(x), merged) <= 0.02  # bitsandbytes rounds when it undoes its layout for CPUs
        layer.unmerge()
        assert torch.equal(layer(x), expected)
        layer.enable_adapters(False)
        assert torch.equal(layer(x), untouched)


@pytest.mark.parametrize("quantized", [bitsandbytes_8bit, bitsandbytes_4bit])
def test_peft_puts_it_on_other_quantizers_layers(quantized):
    model = nn.ModuleDict({"layer": quantized(nn.Linear(256, 128, bias=False))})
    model.is_loaded_in_4bit = model.is_loaded_in_8bit = True  # PEFT up to 0.20 asks for it
    adapted = get_peft_model(model, config(["layer"]))
    layer = adapted.base_model.model["layer"]
    assert type(layer) is OFTLinear
    assert layer.oft_R["default"].weight.dtype == torch.float32
    nn.init.normal_(layer.oft_R["default"].weight, std=0.05)
    x = torch.randn(3, 256, requires_grad=True)
    layer(x).sum().backward()
    expected, grad = layer(x).detach(), layer.oft_R["default"].weight.grad.clone()
    hqq_oft.revert(adapted)
    assert not isinstance(layer, (OFTLinear, HqqOFTLinear))
    layer.zero_grad()
    theirs = layer(x)
    theirs.sum().backward()
    assert relative_error(theirs, expected) <= 1e-5
    assert relative_error(layer.oft_R["default"].weight.grad, grad) <= 1e-5
