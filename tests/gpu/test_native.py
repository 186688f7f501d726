"""The native CUDA decode kernel on a GPU: values, repetition, graphs, streams. Its layouts are tested in emulation."""

from __future__ import annotations

import calls
import pytest
import torch
from calls import widened
from helpers import TOLERANCE, relative_error

from hqq_oft import backend
from hqq_oft.ops import reference
from hqq_oft.ops import table as ops
from hqq_oft.ops.backends import BackendError, registry
from hqq_oft.ops.native import cuda

from .cases import ORDER_OF_SUMS, operations

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
TOKENS = [1, 2, 7, 8, 16]


@pytest.fixture(autouse=True)
def _native():
    reason = registry()["native"].why_not("linear")
    if reason is None and not cuda.has_kernels():
        reason = "this build of hqq_oft has no CUDA kernels"
    if reason is not None:
        pytest.skip(reason)
    with backend("native"):
        yield


def poison(device, *sizes):
    """Fill the blocks of memory that the next allocations of such sizes, in bytes, will get with NaN."""
    blocks = [torch.full((size // 4 + 1,), float("nan"), device=device) for size in sizes for _ in range(3)]
    del blocks


def run(args):
    x, weight, *_ = args
    n = weight.out_features
    poison(x.device, x.shape[0] * n * 2, *(splits * x.shape[0] * n * 4 for splits in (2, 4, 8, 16, 32)))
    return ops.linear(*args)


def check(args, dtype):
    out, own, truth = run(args), reference.linear(*args), reference.linear(*widened(args))
    assert (out.shape, out.dtype, out.device) == (own.shape, own.dtype, own.device)
    error = relative_error(out, truth)
    assert error <= TOLERANCE[dtype]
    assert error <= 2 * relative_error(own, truth) + ORDER_OF_SUMS[dtype]


def linear(*sizes, **settings):
    return operations(*sizes, **settings)["linear"]


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large(shape, m, dtype, device):
    check(linear(m, *shape, 32, device, dtype), dtype)


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("group", [32, 64, 96, 384])
@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_packing(bits, group, m, dtype, device):
    if bits == 3 and m > 8:
        pytest.skip("3 bits are served to 8 tokens")
    check(linear(m, 1120, 1152, 32, device, dtype, bits=bits, group=group), dtype)


@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("b", [16, 32, 64, 96, 128, 256, 768])
def test_block_sizes(b, shared, m, device):
    for n in (256, 12288):  # D read by few bands, and by so many that a launch of its own is cheaper
        args = linear(m, n, 2304, b, device, torch.bfloat16, stored=1 if shared else None)
        check(args, torch.bfloat16)


@pytest.mark.parametrize("b", [32, 256])
@pytest.mark.parametrize(("m", "adapters"), [(1, 1), (7, 2), (16, 5)])
def test_mixed_adapters(m, adapters, b, device):
    check(linear(m, 4096, 4096, b, device, torch.bfloat16, adapters=adapters), torch.bfloat16)


def test_without_rotation_and_bias(device):
    x, weight, *_ = linear(5, 1024, 1024, 32, device, torch.bfloat16)
    check(calls.linear(x, weight), torch.bfloat16)


def test_strided_inputs(device):
    args = linear(5, 1024, 1024, 32, device, torch.bfloat16)
    for x in (args[0].t().contiguous().t(), torch.nn.functional.pad(args[0], (0, 3))[:, :1024]):
        check((x, *args[1:]), torch.bfloat16)


def test_no_tokens(device):
    assert ops.linear(*linear(0, 64, 128, 32, device, torch.bfloat16)).shape == (0, 64)


@pytest.mark.parametrize("b", [32, 256])
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_runs_repeat_bit_for_bit(shape, m, b, device):
    if shape[1] % b:
        pytest.skip("blocks do not divide the inputs")
    args = linear(m, *shape, b, device, torch.bfloat16)
    first = run(args)
    for _ in range(50):
        assert torch.equal(ops.linear(*args), first)


@pytest.mark.parametrize("b", [32, 256])
@pytest.mark.parametrize("m", [1, 16])
def test_graphs(m, b, device):
    """Replayed one after the other and two at a time, on streams of their own."""
    runs = [linear(m, 4096, 4096, b, device, torch.bfloat16) for _ in range(2)]
    expected = [ops.linear(*args) for args in runs]
    graphs, results = [torch.cuda.CUDAGraph() for _ in runs], []
    for graph, args in zip(graphs, runs, strict=True):
        with torch.cuda.graph(graph):
            results.append([ops.linear(*args) for _ in range(4)])
    streams = [torch.cuda.Stream(device) for _ in runs]
    for _ in range(20):
        for result in (out for outs in results for out in outs):
            result.fill_(float("nan"))
        torch.cuda.synchronize(device)
        for stream, graph in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize(device)
        for outs, once in zip(results, expected, strict=True):
            assert all(torch.equal(out, once) for out in outs)


@pytest.mark.parametrize("m", [1, 16])
def test_two_streams_at_once(m, device):
    runs = [linear(m, 14336, 4096, 32, device, torch.bfloat16) for _ in range(2)]
    expected = [ops.linear(*args) for args in runs]
    streams = [torch.cuda.Stream(device) for _ in runs]
    torch.cuda.synchronize(device)
    results = [[], []]
    for _ in range(20):
        for stream, args, result in zip(streams, runs, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(ops.linear(*args))
    torch.cuda.synchronize(device)
    for result, once in zip(results, expected, strict=True):
        assert all(torch.equal(out, once) for out in result)


def test_unsupported_calls_are_refused(device):
    for args in (
        linear(17, 64, 128, 32, device, torch.bfloat16),
        linear(1, 64, 128, 32, device, torch.float32),
        linear(1, 64, 128, 32, device, torch.bfloat16, axis=0),
        linear(1, 64, 128, 32, device, torch.bfloat16, group=16),
        linear(1, 64, 128, 8, device, torch.bfloat16),
    ):
        with pytest.raises(BackendError):
            ops.linear(*args)
