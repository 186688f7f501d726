"""The output and the gradients of a layer: dtypes, shapes, several adapters, hooks, the bias."""

from __future__ import annotations

import oracle
import pytest
import torch
from helpers import (
    TOLERANCE,
    add_adapter,
    hqq_layer,
    oft_layer,
    packed_bytes,
    relative_error,
    same_bytes,
    truth,
)
from torch import nn

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("compute", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", ["active", "merged", "disabled", "mixed"])
def test_the_output_has_the_dtype_of_the_input(compute, given, autocast, state):
    layer = oft_layer(hqq_layer(dtype=compute)).eval()
    x = torch.randn(4, 96).to(given)
    kwargs, adapters = {}, ["default"]
    if state == "merged":
        layer.merge()
        adapters = []
    elif state == "disabled":
        layer.enable_adapters(False)
        adapters = []
    elif state == "mixed":
        kwargs["adapter_names"] = ["default"] * 4
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        out = layer(x, **kwargs)
    assert out.dtype == given
    # HQQ's own product, in merged and disabled layers, rounds its weight several times in half precision
    slack = 3 if state in ("merged", "disabled") else 1
    tolerance = max(TOLERANCE[compute] * slack, TOLERANCE[given])
    assert relative_error(out, truth(layer, x.to(compute), *adapters)) <= tolerance


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(96),
        torch.randn(2, 3, 5, 96),
        torch.randn(0, 96),
        torch.randn(2, 0, 96),
        torch.randn(96, 7).T,
        torch.randn(7, 192)[:, ::2],
        torch.randn(1, 96).expand(5, 96),
    ],
    ids=["vector", "4d", "empty", "empty inside", "transposed", "strided", "expanded"],
)
@pytest.mark.parametrize("merged", [False, True])
def test_any_shape_and_strides(x, merged):
    layer = oft_layer().eval()
    if merged:
        layer.merge()
    out = layer(x)
    assert out.shape == (*x.shape[:-1], 64)
    assert relative_error(out, truth(layer, x, *([] if merged else ["default"]))) <= 1e-5


def test_bad_input_is_refused():
    layer = oft_layer()
    with pytest.raises(TypeError, match=r"must be a floating point tensor, got torch.int64"):
        layer(torch.zeros(2, 96, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must have shape \[..., 96\], got \(2, 95\)"):
        layer(torch.zeros(2, 95))
    with pytest.raises(ValueError, match=r"got \(\)"):
        layer(torch.tensor(1.0))


def test_an_adapter_active_twice_applies_once():
    layer = oft_layer()
    x = torch.randn(3, 96)
    expected = layer(x)
    layer.set_adapter(["default", "default"])
    assert torch.equal(layer(x), expected)


def test_several_adapters_save_only_their_inputs_and_parameters():
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b", oft_block_size=3)
    layer.set_adapter(["a", "b"])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(tuple(t.shape)), t)[1], lambda t: t):
        layer(torch.randn(5, 96))
    assert sorted(saved) == [(5, 96), (5, 96), (12, 28), (32, 3)]  # the inputs of both, and the parameters


def test_active_adapters_apply_in_order():
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b", oft_block_size=3)
    x = torch.randn(4, 96)
    for order in (["a"], ["b"], ["a", "b"], ["b", "a"]):
        layer.set_adapter(order)
        assert relative_error(layer(x), truth(layer, x, *order)) <= 1e-5
    assert relative_error(truth(layer, x, "a", "b"), truth(layer, x, "b", "a")) > 1e-2
    layer.set_adapter(["unknown"])
    assert relative_error(layer(x), truth(layer, x)) <= 1e-5


def test_every_active_adapter_gets_its_gradient():
    layer = oft_layer(adapter="a")
    add_adapter(layer, "b", oft_block_size=3)
    layer.set_adapter(["a", "b"])
    x = torch.randn(4, 96, requires_grad=True)
    layer(x).square().sum().backward()
    parameters = [layer.oft_R[name].weight for name in ("a", "b")]
    copies = [p.detach().double().requires_grad_() for p in parameters]
    x64 = x.detach().double().requires_grad_()
    y = x64
    for v, b in zip(copies, (8, 3), strict=True):
        y = y @ oracle.rotation(v, b, 96, None)
    (y @ oracle.of_layer(layer.base_layer).T + layer.base_layer.bias.double()).square().sum().backward()
    assert relative_error(x.grad, x64.grad) <= 1e-5
    for parameter, copied in zip(parameters, copies, strict=True):
        assert relative_error(parameter.grad, copied.grad) <= 1e-5


def test_disabled_adapters_give_the_base_output():
    layer = oft_layer()
    x = torch.randn(3, 96)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert not torch.allclose(layer(x), layer.base_layer(x))


def test_disabling_while_merged_unmerges_bit_for_bit():
    layer = oft_layer()
    before, x = packed_bytes(layer.base_layer), torch.randn(3, 96)
    expected = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), expected)
    assert not layer.merged
    assert same_bytes(layer.base_layer, before)


def test_hooks_on_the_base_layer_run():
    layer = oft_layer()
    x, seen = torch.randn(3, 96), []
    expected = layer(x)
    handle = layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert relative_error(layer(x), expected) <= 1e-6
    assert seen == [(3, 64)]
    handle.remove()
    layer.base_layer.forward = lambda x: torch.full((3, 64), 2.0)  # as accelerate does
    assert torch.equal(layer(x), torch.full((3, 64), 2.0))


def test_trainable_bias():
    base = hqq_layer()
    base.bias = nn.Parameter(base.bias.detach().clone())
    layer = oft_layer(base)
    layer(torch.randn(5, 96)).sum().backward()
    assert torch.equal(base.bias.grad, torch.full((64,), 5.0))
