"""The layer on a GPU: forward, gradients, mixed adapters, merging, against the oracle in float64."""

from __future__ import annotations

import calls
import oracle
import pytest
import torch
from helpers import TOLERANCE, relative_error
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn

from hqq_oft import HqqOFTLinear, QuantizedWeight, backend
from hqq_oft.ops.backends import registry

N, K, B = 64, 192, 32
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = [(1,), (3, 5), (2, 150)]  # decode, the middle, and the scratch


@pytest.fixture(autouse=True)
def _triton():
    with backend("triton"):
        yield


def oft_layer(device, dtype=torch.bfloat16, nbits=4, adapters=("a",), **settings):
    config = BaseQuantizeConfig(nbits=nbits, group_size=32, axis=1)
    base = HQQLinear(nn.Linear(K, N), config, compute_dtype=dtype, device=str(device))
    layer = HqqOFTLinear(base, adapters[0], r=0, oft_block_size=B, **settings)
    for name in adapters[1:]:
        layer.update_layer(name, r=0, oft_block_size=B, **settings)
    for name in adapters:
        nn.init.normal_(layer.oft_R[name].weight, std=0.02)
    layer.set_adapter(list(adapters))
    return layer


def dense(layer):
    """The layer's current weight by the oracle, float64 on the CPU."""
    w = QuantizedWeight.from_hqq(layer.get_base_layer())
    return oracle.weight(w.packed.cpu(), w.scale.cpu(), w.zero.cpu(), w.shape, w.bits, w.group_size, w.axis)


def rotations(layer, *adapters):
    """Parameters, float64 leaves on the CPU, and the dense rotation that they make together."""
    leaves, product = [], torch.eye(K, dtype=torch.float64)
    for name in adapters:
        module = layer.oft_R[name]
        leaf = module.weight.detach().cpu().double().requires_grad_()
        terms = module.num_cayley_neumann_terms if module.use_cayley_neumann else None
        product = product @ oracle.rotation(leaf, B, K, terms)
        leaves.append(leaf)
    return leaves, product


def truth(layer, x, *adapters):
    _, rotation = rotations(layer, *adapters)
    return x.detach().cpu().double() @ rotation @ dense(layer).T + layer.get_base_layer().bias.detach().cpu().double()


@pytest.mark.parametrize("series", [True, False], ids=["series", "exact"])
@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(dtype, tokens, series, device):
    layer = oft_layer(device, dtype, adapters=("a", "b"), use_cayley_neumann=series)
    x = torch.randn(*tokens, K, device=device).to(dtype).requires_grad_()
    grad = torch.randn(*tokens, N, device=device).to(dtype)
    out = layer(x)
    out.backward(grad)
    x64 = x.detach().cpu().double().requires_grad_()
    leaves, rotation = rotations(layer, "a", "b")
    expected = x64 @ rotation @ dense(layer).T + layer.get_base_layer().bias.detach().cpu().double()
    expected.backward(grad.cpu().double())
    assert (out.dtype, out.shape, out.device) == (dtype, (*tokens, N), x.device)
    # the input of the second adapter is rounded once more than one layer's output
    tolerance = 1.5 * TOLERANCE[dtype]
    assert relative_error(out.cpu(), expected) <= tolerance
    assert relative_error(x.grad.cpu(), x64.grad) <= tolerance
    for name, leaf in zip("ab", leaves, strict=True):
        assert relative_error(layer.oft_R[name].weight.grad.cpu(), leaf.grad) <= tolerance


@pytest.mark.parametrize("tokens", TOKENS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_adapter_is_within_the_tolerance_of_one_layer(dtype, tokens, device):
    layer = oft_layer(device, dtype, use_cayley_neumann=True).eval()
    x = torch.randn(*tokens, K, device=device).to(dtype)
    with torch.no_grad():
        assert relative_error(layer(x).cpu(), truth(layer, x, "a")) <= TOLERANCE[dtype]


@pytest.mark.parametrize("samples", [4, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_adapters(dtype, samples, device):
    layer = oft_layer(device, dtype, adapters=("a", "b")).eval()
    names = ["b", "__base__", "a", "b"] * (samples // 4)
    x = torch.randn(samples, 5, K, device=device).to(dtype)
    with torch.no_grad():
        out = layer(x, adapter_names=names).cpu()
    expected = {"__base__": truth(layer, x), "a": truth(layer, x, "a"), "b": truth(layer, x, "b")}
    for row, name in enumerate(names):
        assert relative_error(out[row], expected[name][row]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("keep", ["device", "host"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_and_unmerge(dtype, keep, device):
    layer = oft_layer(device, dtype, nbits=8, adapters=("a", "b")).eval()
    layer.keep_pristine = keep
    base = layer.get_base_layer()
    packed = base.W_q.detach().clone()
    meta = {key: value.clone() for key, value in base.meta.items() if isinstance(value, torch.Tensor)}
    x = torch.randn(7, K, device=device).to(dtype)
    with torch.no_grad():
        expected = layer(x)
        layer.merge(safe_merge=True)
        assert base.W_q.device.type == device.type
        assert layer.merge_error <= 2e-2  # 8 bits in groups of 32
        assert relative_error(layer(x).cpu(), truth(layer, x)) <= TOLERANCE[dtype]  # of the merged weight
        assert relative_error(layer(x), expected) <= 2e-2
        layer.unmerge()
        assert torch.equal(layer(x), expected)
    assert torch.equal(base.W_q, packed)
    assert all(torch.equal(base.meta[key], value) for key, value in meta.items())


def test_the_merged_weight_is_the_rotated_one(device):
    layer = oft_layer(device, nbits=8, adapters=("a", "b"))
    _, rotation = rotations(layer, "a", "b")
    expected = (dense(layer) @ rotation.T).detach()
    layer.merge()
    assert relative_error(dense(layer), expected) <= 2e-2


def test_auto_selects_triton(device):
    layer = oft_layer(device).eval()
    x = torch.randn(7, K, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        with backend("auto"):
            assert torch.equal(layer(x), expected)


def test_rotations_are_computed_once_in_inference(device):
    computed, planner = [], registry()["triton"].operations["cayley"]

    def counted(by_name, *args):
        function = planner(by_name, *args)
        return lambda *args: computed.append("cayley") or function(*args)

    layer = oft_layer(device).eval()
    x = torch.randn(1, K, device=device, dtype=torch.bfloat16)
    with torch.no_grad(), calls.planners_of("triton", cayley=counted):
        first = layer(x)
        assert len(computed) == 1
        assert torch.equal(layer(x), first)
        assert len(computed) == 1
        layer.oft_R["a"].weight.mul_(2)
        assert relative_error(layer(x).cpu(), truth(layer, x, "a")) <= TOLERANCE[torch.bfloat16]
        assert len(computed) == 2


def test_moving_to_the_host_and_back(device):
    layer = oft_layer(device).eval()
    x = torch.randn(7, K, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        layer.to("cpu")
        with backend("reference"):
            assert relative_error(layer(x.cpu()), expected.cpu()) <= TOLERANCE[torch.bfloat16]
        layer.to(device)
        assert torch.equal(layer(x), expected)
