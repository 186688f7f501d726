"""The autograd Functions and operators over interpreted kernels: gradcheck, opcheck, compile, checkpointing, export."""

from __future__ import annotations

import functools

import calls
import pytest
import torch
from helpers import COMPILE_BACKEND, hqq_layer, oft_layer, relative_error
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hqq_oft import QuantizedWeight, functional

gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()


def quantized_weight(**settings):
    settings = {"group_size": 8, "optimize": False, **settings}
    return QuantizedWeight.from_hqq(hqq_layer(16, 24, **settings))


def double(*shape):
    return (torch.randn(*shape, dtype=torch.float64) * 0.1).requires_grad_()


def test_gradcheck_cayley():
    for b, terms in ((2, 5), (3, 4), (6, 8), (6, None)):
        v, keep = double(2, b * (b - 1) // 2), torch.tensor([True, False])
        assert gradcheck(functools.partial(functional.cayley, block_size=b, terms=terms, keep=keep), v)


def test_gradcheck_rotate():
    index = torch.tensor([1, -1, 0])
    for transpose in (False, True):
        f = functools.partial(functional.rotate, transpose=transpose)
        assert gradcheck(f, (double(3, 12), double(4, 3, 3)))
        assert gradcheck(f, (double(3, 12), double(1, 3, 3)))
        g = functools.partial(functional.rotate, transpose=transpose, adapter_index=index)
        assert gradcheck(g, (double(3, 12), double(2, 4, 3, 3)))


@pytest.mark.parametrize("nbits", [4, 3])
def test_gradcheck_products(nbits):
    weight = quantized_weight(nbits=nbits)
    assert gradcheck(lambda d: functional.dequantize_rotate(weight, d, torch.float64), double(3, 8, 8))
    assert gradcheck(lambda x, d, b: functional.linear(x, weight, b, d=d), (double(3, 24), double(3, 8, 8), double(16)))
    assert gradcheck(
        lambda x, v: functional.oft_linear(x, weight, v=v, block_size=4, terms=5), (double(3, 24), double(6, 6))
    )
    assert gradcheck(lambda x, v: functional.oft_rotate(x, v, block_size=4, terms=5), (double(3, 24), double(6, 6)))


@pytest.mark.parametrize("case", range(21))
def test_opcheck(case):
    name, args = calls.examples()[case]
    torch.library.opcheck(getattr(torch.ops.hqq_oft, name).default, calls.parts(args))


@pytest.mark.usefixtures("_fresh_compiler")
def test_compile_without_graph_breaks_forward_and_backward():
    layer, x = oft_layer(), torch.randn(5, 96)
    results = []
    for module in (layer, torch.compile(layer, backend=COMPILE_BACKEND, fullgraph=True)):
        inputs = x.clone().requires_grad_()
        layer.zero_grad()
        out = module(inputs)
        out.square().sum().backward()
        results.append([out, inputs.grad, layer.oft_R["default"].weight.grad.clone()])
    for eager, compiled in zip(*results, strict=True):
        assert relative_error(compiled, eager) <= 1e-6


def _save_our_products(context, op, *args, **kwargs):
    ours = op == torch.ops.hqq_oft.linear.default
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("selective", [False, True])
def test_gradient_checkpointing(selective):
    layer = oft_layer(module_dropout=0.5)
    context = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _save_our_products)}
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        layer.zero_grad()
        x = torch.ones(5, 96, requires_grad=True)
        options = context if selective else {}
        out = checkpoint(layer, x, use_reentrant=False, **options) if checkpointed else layer(x)
        out.square().sum().backward()
        results.append((x.grad, layer.oft_R["default"].weight.grad.clone()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_export():
    layer, x = oft_layer().eval(), torch.randn(5, 96)
    program = torch.export.export(layer, (x,))
    assert any("hqq_oft" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), layer(x))


def test_autocast_does_not_lower_the_precision():
    weight, v, x = quantized_weight(), torch.randn(3, 28) * 0.1, torch.randn(5, 24)
    expected = functional.oft_linear(x, weight, v=v, block_size=8, terms=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(functional.oft_linear(x, weight, v=v, block_size=8, terms=5), expected)


def test_several_layers_vectors_in_one_call():
    vs = [torch.randn(blocks, 28) * 0.1 for blocks in (3, 1, 4)]
    for v in vs:
        v.requires_grad_()
    ds = functional.cayley_many(vs, 8, 5)
    grads = [torch.randn_like(d) for d in ds]
    torch.autograd.backward(ds, grads)
    for v, d, grad in zip(vs, ds, grads, strict=True):
        alone = v.detach().clone().requires_grad_()
        expected = functional.cayley(alone, 8, 5)
        expected.backward(grad)
        assert torch.equal(d, expected)
        assert torch.equal(v.grad, alone.grad)
