"""Runs that repeat bit for bit, CUDA graphs, `torch.compile`, streams, devices and memory."""

from __future__ import annotations

import gc

import calls
import pytest
import torch
from helpers import TOLERANCE, relative_error

from hqq_oft import backend, functional
from hqq_oft.ops import table as ops

from .cases import check, operations, quantized_weight, run, skew_parameters

NAMES = list(operations(1, 64, 64, 16, "cpu", torch.bfloat16))
TOKENS = [1, 16, 128, 512]
MIB = 2**20


@pytest.fixture(autouse=True)
def _triton():
    with backend("triton"):
        yield


def problem(device, m, n=1024, k=4096, dtype=torch.bfloat16):
    """Input, skew parameters in float32 as in training, weight, bias and the output's gradient."""
    x = torch.randn(m, k, device=device).to(dtype)
    v = skew_parameters(k // 32, 32, device)
    weight = quantized_weight(n, k, device, dtype=dtype)
    bias, grad = torch.randn(n, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)
    return x, v, weight, bias, grad


def equal(a, b):
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


# --- Repetition ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4096, 1024), (64, 4096), (64, 768)], ids=str)
@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("name", NAMES)
def test_runs_repeat_bit_for_bit(name, m, shape, device):
    args = operations(m, *shape, 32, device, torch.bfloat16)[name]
    first = run(name, args)
    assert all(torch.isfinite(out).all() for out in first)
    for _ in range(10):
        assert equal(run(name, args), first)


@pytest.mark.parametrize("m", [7, 300])
@pytest.mark.parametrize("name", ["linear", "linear_backward", "rotate", "rotate_backward"])
def test_runs_of_mixed_adapters_repeat_bit_for_bit(name, m, device):
    args = operations(m, 64, 768, 32, device, torch.bfloat16, adapters=3)[name]
    first = run(name, args)
    for _ in range(10):
        assert equal(run(name, args), first)


@pytest.mark.parametrize("m", [16, 512])
def test_two_streams_at_once(m, device):
    both = [operations(m, 1024, 4096, 32, device, torch.bfloat16) for _ in range(2)]
    expected = [[run(name, args) for name, args in call.items()] for call in both]
    streams = [torch.cuda.Stream(device) for _ in both]
    torch.cuda.synchronize(device)
    results = [[], []]
    for _ in range(10):
        for stream, call, result in zip(streams, both, results, strict=True):
            with torch.cuda.stream(stream):
                result.append([run(name, args) for name, args in call.items()])
    torch.cuda.synchronize(device)
    for result, once in zip(results, expected, strict=True):
        assert all(equal(out, out_once) for again in result for out, out_once in zip(again, once, strict=True))


@pytest.mark.parametrize("m", [7, 300])
@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_is_not_the_current_one(name, m):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check(name, operations(m, 256, 768, 32, "cuda:1", torch.bfloat16)[name], torch.bfloat16)
    assert torch.cuda.current_device() == 0


# --- CUDA graphs -----------------------------------------------------------------------------------------------------


def captured(function):
    """A graph of `function` and its static results, after a warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


@pytest.mark.parametrize("m", [1, 16, 128])
def test_graph_of_a_decode_step(m, device):
    x, v, weight, bias, _ = problem(device, m)

    def step():
        return functional.oft_linear(x, weight, bias, v=v, block_size=32, terms=5)

    with torch.no_grad():
        graph, out = captured(step)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            v.mul_(0.9)
            graph.replay()
            assert torch.equal(out, step())


@pytest.mark.parametrize("m", [16, 512])
def test_graph_of_a_training_step(m, device):
    x, v, weight, bias, grad = problem(device, m)
    leaves = [tensor.requires_grad_() for tensor in (x, v, bias)]

    def step():
        out = functional.oft_linear(x, weight, bias, v=v, block_size=32, terms=5)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    graph, results = captured(step)
    for _ in range(3):
        with torch.no_grad():
            for tensor in (*leaves, grad):
                tensor.copy_(torch.randn_like(tensor) * tensor.std())
        graph.replay()
        assert equal(results, step())


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("m", [16, 512])
def test_compile_forward_and_backward(m, dtype, device):
    x, v, weight, bias, grad = problem(device, m, 256, 768, dtype)
    w = skew_parameters(768 // 32, 32, device)

    def f(x, v, w, bias):
        x = functional.rotate(torch.sin(x), functional.cayley(v, 32, 5, dtype=dtype))
        return torch.nn.functional.silu(functional.oft_linear(x, weight, bias, v=w, block_size=32, terms=5))

    torch.compiler.reset()
    results = []
    for function in (f, torch.compile(f, fullgraph=True)):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, v, w, bias)]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for compiled, eager in zip(results[1], results[0], strict=True):
        assert compiled.dtype == eager.dtype
        assert relative_error(compiled, eager) <= TOLERANCE[dtype]


# --- Memory ----------------------------------------------------------------------------------------------------------


def requested(device, when):
    """Bytes requested from the allocator, before rounding: `current` or `peak`."""
    torch.cuda.synchronize(device)
    return torch.cuda.memory_stats(device)[f"requested_bytes.all.{when}"]


@pytest.mark.parametrize("m", [16, 512])
def test_forward_saves_only_x_and_v(m, device):
    x, v, weight, bias, grad = problem(device, m)
    x.requires_grad_()
    v.requires_grad_()

    def forward():
        return functional.oft_linear(x, weight, bias, v=v, block_size=32, terms=5)

    torch.autograd.grad(forward(), (x, v), grad)  # what libraries allocate once
    gc.collect()
    before = requested(device, "current")
    out = forward()
    assert requested(device, "current") - before == out.nbytes


@pytest.mark.parametrize("name", ["linear", "linear_backward"])
def test_the_scratch_is_bounded(name, device, monkeypatch):
    n = k = 4096  # 32 MiB in bfloat16
    args = operations(512, n, k, 32, device, torch.bfloat16)[name]
    if name == "linear_backward":
        args = calls.without_rotation(name, args)  # the gradient of D has buffers of its own

    def peak(limit):
        monkeypatch.setenv("HQQ_OFT_SCRATCH_MIB", str(limit))
        getattr(ops, name)(*args)  # what libraries allocate once
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = requested(device, "current")
        getattr(ops, name)(*args)
        return requested(device, "peak") - before

    whole = peak(64)
    for limit in (1, 4, 16):
        assert whole - peak(limit) >= (32 - limit - 2) * MIB


@pytest.mark.parametrize("name", ["linear", "linear_backward"])
def test_chunks_of_the_scratch_give_the_same_result(name, device, monkeypatch):
    args = operations(512, 4096, 4096, 32, device, torch.bfloat16)[name]
    monkeypatch.setenv("HQQ_OFT_SCRATCH_MIB", "3")
    check(name, args, torch.bfloat16)
