"""One measuring run: cases, the jobs each one times, the rows that come of them.

A row says what was timed, how long it took, what the model of bytes and operations predicts, and why there is no time
where there is none.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from .limits import Limits
from .model import Cost, predicted_seconds
from .timing import Call, Clock, Memory, Timing

Row = dict[str, Any]

COLUMNS = (
    *("suite", "case", "M", "N", "K", "bits", "group", "axis", "block", "dtype", "share", "exact"),
    *("contender", "phase", "mode", "status", "p20_us", "p50_us", "p80_us", "repeats", "tflops", "gb_per_s"),
    *("predicted_us", "over_predicted", "limit_percent", "peak_mib", "kept_mib", "error", "note"),
    *("bandwidth_gb_per_s", "rate_tflops", "device", "commit", "sources", "torch", "triton"),
)
GRAPH_BELOW_US = 100.0
OURS, PEFT = "hqq_oft", "PEFT OFT"
LORA_RANK = 16
LORA = f"PEFT LoRA r={LORA_RANK}"


class Unavailable(RuntimeError):  # noqa: N818
    """A contender can't take part here; the message says why."""


@dataclass
class Job:
    """Something to time.

    Attributes:
        contender: whose it is.
        phase: what part of the work: `forward`, `backward`, `full` and others.
        call: runs it with one of the sets of buffers.
        passes: what it needs at the least (see `bench.model`).
        copies: number of sets of buffers.
        graph: whether it may be captured in a CUDA graph.
        columns: more of its row: an error against float64, memory kept, the reason why it can't run as `status`.
    """

    contender: str
    phase: str
    call: Call | None
    passes: tuple[Cost, ...] = ()
    copies: int = 1
    graph: bool = False
    columns: Row = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether it is this package's layer or operation, which all else is compared with."""
        return self.contender == OURS


@dataclass(frozen=True)
class Case:
    """A set of jobs that are timed in turn.

    Attributes:
        suite: ops, layer, model or merge.
        name: unique in the suite.
        priority: the lower, the earlier; what is cut off by a deadline is the least of value.
        operations: whose tests must be green before a figure is reported.
        facts: columns of all its rows.
        jobs: makes the jobs; what it allocates, the jobs hold.
        context: entered while they are made and timed.
    """

    suite: str
    name: str
    priority: int
    operations: frozenset[str]
    facts: Row
    jobs: Callable[[Session], list[Job]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Session:
    """Runs cases on one device.

    Args:
        device: where.
        limits: of the device, measured in this run.
        budget: seconds for the repeats of one job.
        red: operations whose tests fail; cases that need them are refused.
        identity: columns of every row: device, commit, sources, versions.
        dry: call each job once and time nothing.
    """

    def __init__(
        self,
        device: torch.device,
        limits: Limits,
        budget: float = 0.05,
        red: frozenset[str] = frozenset(),
        identity: Row | None = None,
        dry: bool = False,
    ) -> None:
        self.device, self.limits, self.red, self.dry = device, limits, red, dry
        self.identity = identity or {}
        self.clock = Clock(device, budget)
        self.memory = Memory(device)
        self._kept: tuple[Any, Any] = (None, None)

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, kept until another key is asked for: cases of one layer share what they need."""
        if self._kept[0] != key:
            self._kept = (None, None)
            self.free()
            self._kept = (key, make())
        return self._kept[1]

    def free(self) -> None:
        """Return memory to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def run(self, case: Case) -> Iterator[Row]:
        """The case's rows.

        What ours raises goes up and fails the case. What another contender raises is its own row: code that is not ours
        must not cost the rest. One that can't take part says so by `Unavailable`.
        """
        red = sorted(case.operations & self.red)
        if red:
            yield self._row(case, Job("all", "", None), status=f"refused: the tests of {', '.join(red)} fail")
            return
        with case.context():
            yield from self._timed(case)

    def _timed(self, case: Case) -> Iterator[Row]:
        jobs = case.jobs(self)
        for job in jobs:
            if job.call is None:
                yield self._row(case, job)
        able = []
        for job in jobs:
            if job.call is not None:
                try:
                    job.columns["peak_mib"] = self._first_calls(job)
                    able.append(job)
                except Exception as error:
                    if job.is_ours:
                        raise
                    yield self._row(case, job, status=failure(error))
        if self.dry:
            for job in able:
                yield self._row(case, job, Timing(1.0, 1.0, 1.0, 1), "eager")
            return
        names = {f"{job.contender}|{job.phase}": job for job in able}
        timings = self.clock.take_turns({name: (job.call, job.copies) for name, job in names.items()})
        for name, job in names.items():
            yield self._row(case, job, timings[name], "eager")
        for phase in {job.phase: None for job in able}:
            chosen = {name: job for name, job in names.items() if job.phase == phase and job.graph}
            if self.device.type == "cuda" and any(self._is_short(job, timings[name]) for name, job in chosen.items()):
                yield from (self._replayed(case, job) for job in chosen.values())

    def _first_calls(self, job: Job) -> float | None:
        """Call a job with all its buffers, or the outermost in a dry run; its peak of memory once all is compiled."""
        for number in {0, job.copies - 1} if self.dry else range(job.copies):
            job.call(number)
        return None if self.dry else self.memory.peak(job.call)

    def _is_short(self, job: Job, timing: Timing) -> bool:
        """Whether a call, or the least that the device needs for it, is short: an eager one may be all launches."""
        least = 1e6 * predicted_seconds(job.passes, self.limits.bandwidth, self.limits.rate) if job.passes else math.inf
        return min(timing.p50, least) < GRAPH_BELOW_US

    def _replayed(self, case: Case, job: Job) -> Row:
        try:
            return self._row(case, job, self.clock.replay(job.call, job.copies), "graph")
        except Exception as error:  # not every contender can be captured, and only the capture tells
            return self._row(case, job, None, "graph", status=failure(error))

    def _row(self, case: Case, job: Job, timing: Timing | None = None, mode: str = "", **columns: Any) -> Row:
        row: Row = {"suite": case.suite, "case": case.name, **case.facts, "contender": job.contender}
        row |= {"phase": job.phase, "mode": mode, "status": "measured" if timing else "", **job.columns, **columns}
        if timing is not None:
            row |= {"p20_us": timing.p20, "p50_us": timing.p50, "p80_us": timing.p80, "repeats": timing.repeats}
            row |= self._against_limits(job.passes, timing)
        row |= {"bandwidth_gb_per_s": self.limits.bandwidth / 1e9, "rate_tflops": self.limits.rate / 1e12}
        return row | self.identity

    def _against_limits(self, passes: tuple[Cost, ...], timing: Timing) -> Row:
        if not passes:
            return {}
        seconds = 1e-6 * timing.p50
        predicted = predicted_seconds(passes, self.limits.bandwidth, self.limits.rate)
        return {
            "tflops": sum(cost.operations for cost in passes) / seconds / 1e12,
            "gb_per_s": sum(cost.bytes for cost in passes) / seconds / 1e9,
            "predicted_us": 1e6 * predicted,
            "over_predicted": seconds / predicted,
            "limit_percent": 100 * predicted / seconds,
        }


def failure(error: Exception) -> str:
    """The status of a row in place of a time: the error and the first line of what it says."""
    return f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def unavailable(contender: str, reason: object) -> Job:
    """The row of a contender that can't take part."""
    return Job(contender, "", None, columns={"status": f"not run: {reason}"})
