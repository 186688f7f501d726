"""Measuring: times as percentiles of interleaved contenders, memory, and the limits of a device.

What is timed takes the number of a set of buffers: several equal sets in turn keep a call from finding in the cache
what the one before has read.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

Call = Callable[[int], object]
RESET_PEAK = Path("/proc/self/clear_refs")


class Timing(NamedTuple):
    """Percentiles of single calls in microseconds, from `repeats` samples."""

    p20_us: float
    p50_us: float
    p80_us: float
    repeats: int


def _percentiles(samples: list[float]) -> Timing:
    shares = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return Timing(*torch.tensor(samples, dtype=torch.float64).quantile(shares).tolist(), len(samples))


def _cycled(call: Call, copies: int) -> Callable[[], object]:
    numbers = itertools.cycle(range(copies))
    return lambda: call(next(numbers))


def take_turns(
    calls: dict[str, tuple[Call, int]], device: torch.device, seconds: float, rounds: int = 5
) -> dict[str, Timing]:
    """Time several calls, each with its sets of buffers, in turn: a slow phase of the machine affects all of them."""
    ready = {name: _cycled(*call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in ready.items():
            if turn >= 3 and sum(samples[name]) > 1e6 * seconds:
                continue  # a long call has had its time
            if device.type == "cuda":
                from triton.testing import do_bench

                found = do_bench(call, warmup=1, rep=1e3 * seconds / rounds, return_mode="all")
                samples[name] += [1e3 * milliseconds for milliseconds in found]
            else:
                timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
                samples[name] += [1e6 * t for t in timer.blocked_autorange(min_run_time=seconds / rounds).times]
    return {name: _percentiles(values) for name, values in samples.items()}


def once(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Columns of a row whose call takes seconds, made once."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return {"status": "measured", "mode": "eager", "repeats": 1, "p50_us": 1e6 * seconds, "note": "called once"}


def called(way: Callable[[], object]) -> Call:
    return lambda _: way()


def replay(call: Call, copies: int, seconds: float) -> Timing:
    """Time a call inside a captured CUDA graph, without the host's share."""
    from triton.testing import do_bench_cudagraph

    found = do_bench_cudagraph(_cycled(call, copies), 1e3 * seconds, return_mode="all")
    return _percentiles([1e3 * milliseconds for milliseconds in found])


def peak_mib(call: Call, device: torch.device) -> float | None:
    """MiB that one call allocates at its peak beyond what is allocated before it; None without a CUDA allocator."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(0)
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def process_peak_mib() -> float:
    """Peak resident memory of this process since `RESET_PEAK` was written to."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) / 1024


def kept_mib(forward: Callable[[], object]) -> float:
    """MiB that autograd keeps from a forward for its backward; what a second forward keeps as well stays anyway."""
    kept: list[dict[int, int]] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[-1][storage._cdata] = storage.nbytes()
        return tensor

    results = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        for _ in range(2):
            kept.append({})
            results.append(forward())
    del results
    return sum(size for storage, size in kept[0].items() if storage not in kept[1]) / 2**20


@dataclass(frozen=True)
class Limits:
    """The two limits of a device: of a copy, bytes read and written, and of a dense bfloat16 product, per second."""

    bandwidth: float
    rate: float

    @classmethod
    def measure(cls, device: torch.device) -> Limits:
        """Copy and multiply random data: 2 GiB and 8192^3 on a GPU, 256 MiB and 2048^3 elsewhere."""
        size, side = ((2 << 30), 8192) if device.type == "cuda" else ((256 << 20), 2048)
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
        calls = {"copy": (lambda _: target.copy_(source), 1), "product": (lambda _: torch.mm(left, right), 1)}
        found = take_turns(calls, device, 1.0)
        return cls(2 * size / (1e-6 * found["copy"].p50_us), 2 * side**3 / (1e-6 * found["product"].p50_us))
