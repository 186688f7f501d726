"""What merging keeps of the HQQ layer."""

from __future__ import annotations

import pytest
import torch
from helpers import hqq_layer, oft_layer, packed_bytes, relative_error, same_bytes
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from torch import nn


def test_every_attribute_of_the_hqq_layer_survives():
    base = hqq_layer(dtype=torch.float16, view_as_float=True)
    base.name = "model.layers.0.q_proj"
    hooks = base.register_forward_hook(lambda module, args, out: None)
    layer = oft_layer(base)
    before = {key: value for key, value in vars(base).items() if key not in ("meta", "_parameters")}
    meta = {key: value for key, value in base.meta.items() if not isinstance(value, torch.Tensor)}
    tensors = {key: (t.dtype, t.shape, t.device) for key, t in packed_bytes(base).items()}
    bias = base.bias
    layer.merge()
    assert layer.base_layer is base
    assert base.bias is bias
    assert {key: value for key, value in vars(base).items() if key not in ("meta", "_parameters")} == before
    assert {key: value for key, value in base.meta.items() if not isinstance(value, torch.Tensor)} == meta
    assert {key: (t.dtype, t.shape, t.device) for key, t in packed_bytes(base).items()} == tensors
    assert isinstance(base.W_q, nn.Parameter)
    hooks.remove()


@pytest.mark.parametrize("backend", [HQQBackend.PYTORCH, HQQBackend.PYTORCH_FORWARD])
def test_the_hqq_backend_survives(backend):
    previous = HQQLinear.backend
    try:
        HQQLinear.set_backend(backend)
        layer = oft_layer()
        layer.merge()
        assert layer.base_layer.backend is backend
        assert layer(torch.randn(2, 96)).shape == (2, 64)
    finally:
        HQQLinear.set_backend(previous)


@pytest.mark.parametrize("form", ["plain", "one scale", "quantized scale and zero"])
def test_settings_are_read_from_the_meta_data_if_the_layer_lacks_them(form):
    config = BaseQuantizeConfig(nbits=8, group_size=16, quant_zero=form[0] == "q", quant_scale=form[0] == "q")
    config.pop("offload_meta")
    if form == "one scale":
        config["weight_quant_params"].update(channel_wise=False, group_size=None)
    base = HQQLinear(None, {**config, "offload_meta": False}, compute_dtype=torch.float32, device="cpu")
    base.quantize(torch.randn(64, 96), **config)
    base.quant_config = None
    layer = oft_layer(base)
    before, x = {key: (t.shape, t.dtype) for key, t in packed_bytes(base).items()}, torch.randn(3, 96)
    expected = layer(x)
    layer.merge()
    assert {key: (t.shape, t.dtype) for key, t in packed_bytes(base).items()} == before
    assert relative_error(layer(x), expected) <= 5e-2


@pytest.mark.parametrize("forgotten", [False, True])
@pytest.mark.parametrize("nbits", [8, 6, 5, 4, 3, 2, 1.58, 1])
def test_a_layer_that_went_through_a_state_dict_merges_to_the_same_bytes(nbits, forgotten):
    layer = oft_layer(hqq_layer(nbits=nbits))
    layer.merge()
    expected, error = packed_bytes(layer.base_layer), layer.merge_error
    packing = layer.base_layer.meta["packing"]
    layer.unmerge()
    layer.load_state_dict(layer.state_dict())
    if forgotten:
        layer.base_layer.quant_config = None
    layer.merge()
    assert same_bytes(layer.base_layer, expected)
    assert layer.base_layer.meta["packing"] == packing
    assert layer.merge_error == error


@pytest.mark.parametrize("form", ["offloaded", "quantized"])
def test_deprecated_forms_merge_and_unmerge(form):
    if form == "offloaded":
        base = hqq_layer(nbits=8, group_size=8)
        base.meta["zero_scale"] = torch.stack((base.meta.pop("zero"), base.meta.pop("scale")))
        base.offload_meta = True
    else:
        config = BaseQuantizeConfig(nbits=8, group_size=8, quant_zero=True, quant_scale=True)
        config.pop("offload_meta")
        base = HQQLinear(None, {**config, "offload_meta": False}, compute_dtype=torch.float32, device="cpu")
        base.quantize(torch.randn(64, 96), **config)
    layer = oft_layer(base)
    before, x = packed_bytes(base), torch.randn(5, 96)
    expected = layer(x)
    layer.merge()
    assert base.meta.keys() >= ({"zero_scale"} if form == "offloaded" else {"zero_q", "scale_q"})
    assert packed_bytes(base).keys() == before.keys()
    assert relative_error(layer(x), expected) <= 2e-2
    layer.unmerge()
    assert same_bytes(base, before)
