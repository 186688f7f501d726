"""HQQ layers without adapters: what autocast and casts of the model do to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import TOLERANCE, hqq_layer, relative_error
from hqq.core.quantize import HQQBackend, HQQLinear
from small_llama import VOCABULARY, small_llama
from torch import nn
from transformers.utils.quantization_config import QuantizationMethod

import hqq_oft
from hqq_oft.quant.hqq_layer import take_over

TOKENS = torch.arange(12).reshape(2, 6) % VOCABULARY
HALF = [torch.bfloat16, torch.float16]


def quantized(dtype=torch.float32):
    model = small_llama()
    hqq_oft.quantize_model(model, group_size=16, compute_dtype=dtype, progress=False)
    return model


def loaded(folder, dtype=torch.float32):
    hqq_oft.save_quantized(quantized(dtype), folder)
    return hqq_oft.load_quantized(folder)


def layer_of(source, dtype=torch.float32, **settings):
    """A layer quantized by this package, or by HQQ and then taken over."""
    if source == "hqq":
        layer = hqq_layer(dtype=dtype, **settings)
        take_over(layer)
        return layer
    model = nn.Sequential(nn.Linear(96, 64))
    hqq_oft.quantize_model(model, group_size=32, compute_dtype=dtype, progress=False)
    return model[0]


def as_linear(layer):
    linear = nn.Linear(layer.in_features, layer.out_features, dtype=layer.compute_dtype)
    linear.weight.data, linear.bias.data = layer.dequantize(), layer.bias.detach().clone()
    return linear.requires_grad_(False)


@pytest.mark.parametrize("source", ["quantize_model", "hqq"])
@pytest.mark.parametrize("backend", [HQQBackend.PYTORCH, HQQBackend.PYTORCH_FORWARD])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", HALF)
def test_autocast_is_followed_as_by_a_linear_layer(source, backend, stored, autocast):
    layer = layer_of(source, stored)
    linear, x = as_linear(layer), torch.randn(2, 5, 96)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    previous = HQQLinear.backend
    HQQLinear.set_backend(backend)
    try:
        with torch.autocast("cpu", autocast):
            outputs = [module(value) for module, value in zip((layer, linear), inputs, strict=True)]
        for y in outputs:
            y.float().square().sum().backward()
    finally:
        HQQLinear.set_backend(previous)
    assert outputs[0].dtype == outputs[1].dtype == autocast
    assert outputs[0].shape == (2, 5, 64)
    assert relative_error(outputs[0], outputs[1]) <= 2 * TOLERANCE[torch.bfloat16]
    assert relative_error(inputs[0].grad, inputs[1].grad) <= 2 * TOLERANCE[torch.bfloat16]
    with torch.autocast("cpu", autocast, enabled=False):
        assert layer(x.to(stored)).dtype == stored


def test_autocast_computes_in_its_own_dtype():
    layer = layer_of("quantize_model", torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.full((1, 96), 1e6)).isfinite().all()  # float16 has no such numbers


@pytest.mark.parametrize("source", ["quantize_model", "hqq"])
@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.double(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.type(torch.bfloat16),
    ],
)
@pytest.mark.parametrize("inside", [False, True])
def test_casts_are_followed_and_the_packed_bytes_kept(source, cast, inside):
    layer = layer_of(source)
    packed, expected = layer.W_q.detach().clone(), as_linear(layer)
    cast(nn.Sequential(layer) if inside else layer)
    cast(expected)
    dtype = expected.weight.dtype
    assert torch.equal(layer.W_q, packed)
    assert layer.W_q.dtype == packed.dtype
    assert layer.bias.dtype == layer.meta["scale"].dtype == layer.compute_dtype == layer.dequantize().dtype == dtype
    x = torch.randn(3, 96, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    assert y.dtype == x.grad.dtype == dtype
    assert relative_error(y, expected(x)) <= 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("in_features", "viewed"), [(8, True), (6, False)])  # rows of 72 or 54 packed bytes
def test_a_weight_viewed_as_floats_keeps_its_bytes(in_features, viewed):
    layer = hqq_layer(72, in_features, dtype=torch.bfloat16, view_as_float=True, axis=0, group_size=8)
    take_over(layer)
    packed, weight = layer.W_q.detach().view(torch.uint8).clone(), layer.dequantize()
    for dtype in (torch.float64, torch.float16):
        layer.to(dtype)
        assert torch.equal(layer.W_q.view(torch.uint8), packed)
        assert layer.W_q.dtype == (dtype if viewed else torch.uint8)
        assert relative_error(layer.dequantize(), weight) <= TOLERANCE[torch.bfloat16]
    assert layer.quant_config["weight_quant_params"]["view_as_float"] == viewed


def test_models_that_transformers_knows_as_hqq_models_are_cast():
    """transformers then calls HQQ's `cuda` of each layer with the first argument of `to`, here a dtype."""
    model = quantized()
    packed = model.model.layers[0].self_attn.q_proj.W_q.detach().clone()
    model.quantization_method = QuantizationMethod.HQQ
    model.to(torch.bfloat16)
    model.to("cpu", dtype=torch.float16)
    layer = model.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.W_q, packed)
    assert layer.meta["scale"].dtype == layer.bias.dtype == layer.compute_dtype == torch.float16
    assert model(TOKENS).logits.dtype == torch.float16


@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_without_adapters_compiles_to_one_graph(autocast):
    torch._dynamo.reset()
    layer, x = layer_of("quantize_model"), torch.randn(3, 96, requires_grad=True)
    grads = []
    for module in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        (grad,) = torch.autograd.grad(y.float().square().sum(), x)
        grads.append(grad)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert relative_error(grads[1], grads[0]) <= TOLERANCE[torch.bfloat16]


def test_inputs_of_another_dtype_are_cast_as_by_an_adapted_layer():
    layer = layer_of("quantize_model", torch.bfloat16)
    y = layer(torch.randn(3, 96))
    assert y.dtype == torch.float32


@pytest.mark.parametrize("made", [lambda folder: quantized(), loaded])
@pytest.mark.parametrize("dtype", HALF)
def test_a_whole_model_follows(made, dtype, tmp_path):
    model = made(tmp_path / "saved").eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
    with torch.autocast("cpu", dtype):
        output = model(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward()
    assert relative_error(output.logits, expected) <= 3e-2
    model.to(dtype)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == dtype
    with torch.no_grad():
        logits = model(TOKENS).logits
    assert logits.dtype == dtype
    assert relative_error(logits, expected) <= 3e-2
    hqq_oft.save_quantized(model, tmp_path / "cast")
    again = hqq_oft.load_quantized(tmp_path / "cast").model.layers[0].mlp.up_proj
    assert torch.equal(again.dequantize(), model.model.layers[0].mlp.up_proj.dequantize())


def test_copies_and_pickles_keep_the_class():
    layer = layer_of("quantize_model")
    assert type(layer).__name__ == "HQQLinear"  # by which PEFT recognizes it
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(clone) is type(layer)
        assert torch.equal(clone.half().W_q, layer.W_q)


def test_moving_moves_scale_zero_and_bias():
    layer = layer_of("hqq").to("meta")
    assert {t.device.type for t in (layer.W_q, layer.bias, layer.meta["scale"], layer.meta["zero"])} == {"meta"}
    assert layer.device == "meta"


def test_weight_is_an_empty_tensor_of_the_compute_dtype_and_hqqs_class_is_unchanged():
    layer = layer_of("here", torch.bfloat16)
    assert (layer.weight.dtype, layer.weight.device, layer.weight.numel()) == (torch.bfloat16, torch.device("cpu"), 0)
    assert layer.half().weight.dtype == torch.float16
    added = vars(HQQLinear).get("weight")
    assert added is None or added.fget.__module__.startswith("transformers.")  # transformers 4 adds one
