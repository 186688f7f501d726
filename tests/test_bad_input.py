"""Invalid values at every entry point: the error message, and that nothing has changed.

Shapes, dtypes and settings of single operations are in test_functional.py and test_weight.py, those of a layer in
test_layer.py; this file tests values, devices and whole models.
"""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from helpers import add_adapter, hqq_layer, oft_layer, packed_bytes, same_bytes
from peft import OFTConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_llama import quantized_llama, small_llama

import hqq_oft
from hqq_oft import HqqOFTLinear, QuantizedWeight, functional

VALUES = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(autouse=True)
def _patched():
    with hqq_oft.patch_peft():
        yield


# --- NaN and infinity: never hidden, never spread ------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("state", ["active", "mixed", "merged", "disabled"])
def test_a_non_finite_row_of_x_affects_only_its_own_output_row(value, state):
    layer = oft_layer().eval()
    x = torch.randn(4, 96)
    bad = x.clone()
    bad[2, 5] = value
    if state == "merged":
        layer.merge()
    layer.enable_adapters(state != "disabled")
    names = {"adapter_names": ["default", "__base__", "default", "__base__"]} if state == "mixed" else {}
    with torch.no_grad():
        out, expected = layer(bad, **names), layer(x, **names)
    assert not torch.isfinite(out[2]).any()
    rows = [0, 1, 3]
    torch.testing.assert_close(out[rows], expected[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_non_finite_parameter_affects_only_the_features_of_its_block(value, exact):
    v = torch.randn(12, 28) * 0.05
    v[3, 0] = value
    d = functional.cayley(v, 8, None if exact else 5)
    finite = torch.isfinite(d).all(dim=(1, 2))
    assert finite.tolist() == [block != 3 for block in range(12)]
    rotated = functional.rotate(torch.randn(2, 96), d)
    assert torch.isfinite(rotated[:, :24]).all()
    assert not torch.isfinite(rotated[:, 24:32]).all()
    assert torch.isfinite(rotated[:, 32:]).all()


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("part", ["scale", "zero"])
def test_a_non_finite_scale_or_zero_affects_only_its_own_group(value, part):
    weight = QuantizedWeight.from_hqq(hqq_layer(64, 96, group_size=32, optimize=False))
    values = getattr(weight, part).clone()
    values[7] = value  # weights 224 to 255, of row 2
    dense = functional.dequantize(dataclasses.replace(weight, **{part: values}))
    finite = torch.isfinite(dense)
    assert not finite[2, 32:64].all()
    assert finite.sum() >= 64 * 96 - 32
    expected = functional.dequantize(weight)
    assert torch.equal(dense[finite], expected[finite])


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("part", ["scale", "zero"])
def test_safe_merge_refuses_a_non_finite_weight(value, part):
    layer = oft_layer()
    layer.base_layer.meta[part][0] = value
    before = packed_bytes(layer.base_layer)
    with pytest.raises(ValueError, match="NaN or infinity in the merged weights"):
        layer.merge(safe_merge=True)
    after = packed_bytes(layer.base_layer)
    assert all(torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before if key != "W_q")
    assert torch.equal(after["W_q"], before["W_q"])
    assert not layer.merged


@pytest.mark.parametrize("value", VALUES)
def test_a_non_finite_gradient_propagates_to_the_parameter_and_to_x(value):
    layer, x = oft_layer(), torch.randn(4, 96, requires_grad=True)
    out = layer(x)
    grad = torch.ones_like(out)
    grad[1, 1] = value
    out.backward(grad)
    assert not torch.isfinite(x.grad[1]).all()
    assert torch.isfinite(x.grad[[0, 2, 3]]).all()
    assert not torch.isfinite(layer.oft_R["default"].weight.grad).all()


# --- Places ----------------------------------------------------------------------------------------------------------

W = QuantizedWeight.from_hqq(hqq_layer(64, 96, optimize=False))
X, V, D = torch.zeros(2, 96), torch.zeros(12, 28), torch.zeros(12, 8, 8)
OFF = torch.device("meta")
ELSEWHERE = [
    (lambda: functional.linear(X.to(OFF), D, W), "x is on meta, d is on cpu, weight is on cpu"),
    (lambda: functional.linear(X, D.to(OFF), W), "x is on cpu, d is on meta, weight is on cpu"),
    (lambda: functional.linear(X, None, W, torch.zeros(64, device=OFF)), "bias is on meta"),
    (lambda: functional.linear(X, D[None], W, adapter_index=torch.zeros(2, device=OFF).long()), "adapter_index is on"),
    (lambda: functional.rotate(X, D.to(OFF)), "x is on cpu, d is on meta"),
    (lambda: functional.oft_linear(X, V.to(OFF), W, block_size=8), "x is on cpu, v is on meta, weight is on cpu"),
    (lambda: functional.oft_rotate(X, V, block_size=8, d=D.to(OFF)), "v is on cpu, d is on meta"),
    (lambda: functional.dequantize_rotate(W, D.to(OFF)), "weight is on cpu, d is on meta"),
    (lambda: functional.cayley(V, 8, keep=torch.ones(12, dtype=torch.bool, device=OFF)), "keep is on meta"),
    (lambda: functional.cayley_many([V, V.to(OFF)], 8), "vs must have one dtype and be on one device"),
    (lambda: oft_layer()(X.to(OFF)), "all tensors must be on one device: x is on meta"),
]


@pytest.mark.parametrize("case", range(len(ELSEWHERE)))
def test_tensors_on_several_devices_are_refused(case):
    call, message = ELSEWHERE[case]
    with pytest.raises(ValueError, match=message):
        call()


# --- Given values that are known already -----------------------------------------------------------------------------


@pytest.mark.parametrize("d", [torch.zeros(11, 8, 8), torch.zeros(12, 4, 4), torch.zeros(12, 64), torch.zeros(1, 8, 8)])
def test_a_rotation_whose_shape_does_not_match_v_raises(d):
    message = re.escape(f"d must have shape (12, 8, 8) to match v, got {tuple(d.shape)}")
    with pytest.raises(ValueError, match=message):
        functional.oft_linear(X, V, W, block_size=8, d=d)
    with pytest.raises(ValueError, match=message):
        functional.oft_rotate(X, V, block_size=8, d=d)


# --- Adapters and models that do not belong together -----------------------------------------------------------------


def adapted(**settings):
    settings = {"r": 0, "oft_block_size": 8, "target_modules": ["q_proj"], **settings}
    return get_peft_model(quantized_llama(), OFTConfig(**settings))


def test_loading_an_adapter_of_another_width_raises(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: torch.zeros(6, 28) for name in load_file(path)}, path)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*oft_R.*weight"):
        PeftModel.from_pretrained(quantized_llama(), tmp_path)


def test_loading_an_adapter_of_another_block_size_raises_and_changes_nothing(tmp_path):
    adapted(oft_block_size=4).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        (tmp_path / "adapter_config.json").read_text().replace('"oft_block_size": 4', '"oft_block_size": 8')
    )
    model = adapted()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_adapter(tmp_path, "other")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_target_modules_missing_from_the_model_raise():
    with pytest.raises(ValueError, match=r"Target modules .*nowhere.* not found"):
        adapted(target_modules=["nowhere"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8}, "oft_block_size"),
        ({"module_dropout": -0.1}, "module_dropout must be between 0 and 1, got -0.1"),
        ({"module_dropout": float("nan")}, "module_dropout must be between 0 and 1, got nan"),
        ({"coft": True, "eps": -1.0}, "eps must be positive with coft=True, got -1.0"),
        ({"coft": True, "eps": float("nan")}, "eps must be positive with coft=True, got nan"),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": -3}, "num_cayley_neumann_terms must be at least 1"),
    ],
)
def test_invalid_configurations_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        adapted(**settings)


def test_switching_to_an_unknown_adapter_raises():
    model = adapted()
    with pytest.raises(ValueError, match="Adapter other not found"):
        model.set_adapter("other")
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("model", [small_llama, lambda: None])
def test_models_without_layers_have_nothing_to_share_or_gather(model):
    model = model() or torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the model has no HqqOFTLinear layer"):
        hqq_oft.share_rotations(model)
    with pytest.raises(ValueError, match="the model has no adapter 'default'"):
        hqq_oft.full_adapter_state_dict(model)


def test_a_non_finite_adapter_does_not_affect_the_others():
    layer = oft_layer(adapter="good").eval()
    add_adapter(layer, "broken")
    x, pristine = torch.randn(2, 96), packed_bytes(layer.base_layer)
    with torch.no_grad():
        expected = layer(x)
        layer.oft_R["broken"].weight[0, 0] = float("nan")
        mixed = layer(x, adapter_names=["good", "broken"])
        assert torch.isfinite(mixed[0]).all()
        assert not torch.isfinite(mixed[1]).any()
        layer.set_adapter(["good", "broken"])
        with pytest.raises(ValueError, match="the adapter 'broken' seems to be broken"):
            layer.merge(safe_merge=True)
        layer.set_adapter("good")
        assert torch.equal(layer(x), expected)
    assert same_bytes(layer.base_layer, pristine)
    assert isinstance(layer, HqqOFTLinear)
