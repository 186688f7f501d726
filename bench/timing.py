"""Times as medians: CUDA events on a GPU, a monotonic clock elsewhere; alternatives take turns.

What is timed is a function of a number, which says with which of several equal sets of buffers to run: taken in turn,
they keep one call from finding in the cache what the call before has read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[int], object]


@dataclass(frozen=True)
class Timing:
    """Percentiles in microseconds."""

    p20: float
    p50: float
    p80: float
    repeats: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        """From single times in microseconds."""
        ordered = sorted(samples)

        def at(share: float) -> float:
            return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return cls(at(0.2), statistics.median(ordered), at(0.8), len(ordered))


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: a GPU's L2, and for a CPU more than most have."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 64 << 20


class Clock:
    """Times calls on one device.

    Args:
        device: where the calls run.
        budget: seconds that one call may be repeated for.
        most: repeats at most.
    """

    def __init__(self, device: torch.device, budget: float, most: int = 2000) -> None:
        self.device, self.budget, self.most = device, budget, most
        self._flush = (
            torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device) if device.type == "cuda" else None
        )

    def take_turns(self, calls: dict[str, tuple[Call, int]], rounds: int = 5) -> dict[str, Timing]:
        """Time several calls, `rounds` times each in turn, so that a slow spell of the machine meets them all.

        Args:
            calls: by name, the call and its number of sets of buffers.
            rounds: how often to go round.
        """
        counts = {name: self._repeats(call, copies) for name, (call, copies) in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        done = dict.fromkeys(calls, 0)
        for turn in range(rounds):
            for name, (call, copies) in calls.items():
                upto = max(counts[name] * (turn + 1) // rounds, 1)
                numbers = [i % copies for i in range(done[name], upto)]
                samples[name] += self._samples(call, numbers)
                done[name] = upto
        return {name: Timing.of(values) for name, values in samples.items()}

    def _repeats(self, call: Call, copies: int) -> int:
        """Warm up, and say how many calls fit the budget."""
        for number in range(min(copies, 3)):
            call(number)
        first = min(self._samples(call, [i % copies for i in range(2)])) * 1e-6
        return max(3, min(self.most, int(self.budget / max(first, 1e-7))))

    def _samples(self, call: Call, numbers: list[int]) -> list[float]:
        if self._flush is None:
            samples = []
            for number in numbers:
                start = time.perf_counter()
                call(number)
                samples.append(1e6 * (time.perf_counter() - start))
            return samples
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in numbers]
        for number, (start, end) in zip(numbers, pairs, strict=True):
            self._flush.zero_()
            start.record()
            call(number)
            end.record()
        torch.cuda.synchronize(self.device)
        return [1e3 * start.elapsed_time(end) for start, end in pairs]

    def replay(self, call: Call, copies: int) -> Timing:
        """One call's share of a captured CUDA graph that runs it with every set of buffers, at least eight times."""
        calls = copies * -(-8 // copies)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for number in range(copies):
                call(number)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = [call(number % copies) for number in range(calls)]
        whole = self.take_turns({"graph": (lambda _: graph.replay(), 1)})["graph"]
        del outputs
        return Timing(whole.p20 / calls, whole.p50 / calls, whole.p80 / calls, whole.repeats)


class Memory:
    """Peak of the device's allocator, where it has one that counts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def peak(self, call: Call) -> float | None:
        """MiB that one call allocates at its peak beyond what there was; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call(0)
        torch.cuda.synchronize(self.device)
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def kept_bytes(forward: Callable[[], object], outside: list[torch.Tensor]) -> int:
    """Bytes that autograd keeps from a forward for its backward, beyond the given tensors' own storage."""
    known = {tensor.untyped_storage()._cdata for tensor in outside}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())
