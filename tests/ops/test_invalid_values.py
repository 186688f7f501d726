"""NaN and infinity are never hidden and never spread; tensors on several devices and wrong rotations are refused."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from helpers import hqq_layer, oft_layer, packed_bytes

import hqq_oft
from hqq_oft import QuantizedWeight, functional

VALUES = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(autouse=True)
def _patched():
    with hqq_oft.patch_peft():
        yield


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


W = QuantizedWeight.from_hqq(hqq_layer(64, 96, optimize=False))
X, V, D = torch.zeros(2, 96), torch.zeros(12, 28), torch.zeros(12, 8, 8)
INDEX, OFF = torch.zeros(2, dtype=torch.int64), torch.device("meta")
ELSEWHERE = [
    (lambda: functional.linear(X.to(OFF), W, d=D), "x is on meta, d is on cpu, weight is on cpu"),
    (lambda: functional.linear(X, W, d=D.to(OFF)), "x is on cpu, d is on meta, weight is on cpu"),
    (lambda: functional.linear(X, W, torch.zeros(64, device=OFF)), "bias is on meta"),
    (
        lambda: functional.linear(X, W, d=D[None], adapter_index=torch.zeros(2, device=OFF).long()),
        "adapter_index is on",
    ),
    (lambda: functional.rotate(X, D.to(OFF)), "x is on cpu, d is on meta"),
    (lambda: functional.oft_linear(X, W, v=V.to(OFF), block_size=8), "x is on cpu, v is on meta, weight is on cpu"),
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


@pytest.mark.parametrize("d", [torch.zeros(11, 8, 8), torch.zeros(12, 4, 4), torch.zeros(12, 64), torch.zeros(1, 8, 8)])
def test_a_rotation_whose_shape_does_not_match_v_raises(d):
    message = re.escape(f"d must have shape (12, 8, 8) to match v, got {tuple(d.shape)}")
    with pytest.raises(ValueError, match=message):
        functional.oft_linear(X, W, v=V, block_size=8, d=d)
    with pytest.raises(ValueError, match=message):
        functional.oft_rotate(X, V, block_size=8, d=d)
