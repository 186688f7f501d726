"""One case: its errors, whether it repeats, how long it takes.

An operation runs twice, first with NaN in all uninitialized memory. The case fails if it raises, if the relative error
||out - ref|| / ||ref|| of a result exceeds the tolerance of its dtype, or if the two runs differ in a bit.
"""

from __future__ import annotations

import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .._config import BackendName
from ..env import serving_call
from ..ops import reference
from ..ops.backends import backend as select_backend
from ..ops.table import OPERATIONS
from ..ops.verified import UnverifiedKernels
from ..ops.weight import QuantizedWeight
from .cases import DTYPES, LARGE, Case, arguments

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
_FLUSHED_BYTES = 256 * 2**20  # more than a GPU's cache holds


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        case: the call.
        backend: name of the one that served it; `none` if the one selected by name does not support it.
        error: the largest relative error of a result; None if there is no result, NaN if a result has one.
        repeats: whether the two runs gave the same bits; None if there is no result.
        fault: what is wrong; empty if nothing is.
    """

    case: Case
    backend: str = "none"
    error: float | None = None
    repeats: bool | None = None
    fault: str = ""


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same call in float64, on the same stored values; results as well."""

    def widen(arg: Any) -> Any:
        if isinstance(arg, Tensor) and arg.is_floating_point():
            return arg.double()
        if isinstance(arg, QuantizedWeight):
            return replace(arg, scale=arg.scale.double(), zero=arg.zero.double())
        return torch.float64 if isinstance(arg, torch.dtype) else arg

    return tuple(widen(arg) for arg in args)


def relative_error(out: Tensor, truth: Tensor) -> float:
    """`|out - truth| / |truth|`, and `|out|` where the truth is zero; NaN if anything in `out` is."""
    truth = truth.double()
    norm = truth.norm()
    return float((out.double() - truth).norm() / (norm if norm > 0 else 1))


def run_case(case: Case, device: torch.device) -> Outcome:
    """Run a case; whatever it raises is its fault."""
    backend = "none"
    try:
        args = arguments(case, device)
        backend, _ = serving_call(case.operation, args)
        if backend == "none":
            return Outcome(case)
        truths = _results(getattr(reference, case.operation), widened(args), device)
        with _poisoned_memory():
            first = _results(OPERATIONS[case.operation], args, device)
        second = _results(OPERATIONS[case.operation], args, device)
        for out, truth in zip(first, truths, strict=True):
            if out.shape != truth.shape:
                raise ValueError(f"a result has shape {tuple(out.shape)} instead of {tuple(truth.shape)}")
        errors = [relative_error(out, truth) for out, truth in zip(first, truths, strict=True)]
        repeats = all(map(_same_bits, first, second))
        error, tolerance = worst(errors), TOLERANCE[DTYPES[case.dtype]]
        faults = [] if error <= tolerance else [f"error {error:.1e}, tolerance {tolerance:.0e}"]
        faults += [] if repeats else ["two runs differ"]
        return Outcome(case, backend, error, repeats, "; ".join(faults))
    except Exception as problem:
        return Outcome(case, backend, fault=f"{type(problem).__name__}: {problem}")


def worst(errors: list[float]) -> float:
    """The largest error; NaN if one is."""
    return max(errors, key=lambda error: math.inf if math.isnan(error) else error)


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _results(function: Callable[..., Any], args: tuple[Any, ...], device: torch.device) -> tuple[Tensor, ...]:
    out = function(*args)
    _wait(device)
    if out is None:  # computed in place
        out = args[0].clone()
    return out if isinstance(out, tuple) else (out,)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # so that an error appears in the call that causes it


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fill the memory of new tensors with NaN, which PyTorch does when algorithms have to be deterministic."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which operations of PyTorch are not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass(frozen=True)
class Times:
    """Median microseconds at M tokens: of the large layer, of a dense one, and of a copy of the packed weight's bytes.

    Backward is the gradients of x and D; of the dense layer, whose weight is frozen, the gradient of x.
    """

    m: int
    linear: float
    dense: float
    linear_backward: float
    dense_backward: float
    copy: float


def measure(m: int, device: torch.device) -> Times:
    """Time 4 bits in groups of 64, blocks of 32, bfloat16."""
    args = arguments(Case("linear", m=m, **LARGE), device)
    x, weight, _, bias, _ = args
    backward = arguments(Case("linear_backward", m=m, **LARGE), device)
    dy, dense = backward[0], reference.dequantize(weight, x.dtype)
    stored = torch.ones(sum(t.nbytes for t in weight.arguments()[:3]), dtype=torch.uint8, device=device)
    target = torch.ones_like(stored)
    return Times(
        m,
        _microseconds(lambda: OPERATIONS["linear"](*args), device),
        _microseconds(lambda: F.linear(x, dense, bias), device),
        _microseconds(lambda: OPERATIONS["linear_backward"](*backward), device),
        _microseconds(lambda: dy @ dense, device),
        _microseconds(lambda: target.copy_(stored), device),
    )


def _microseconds(call: Callable[[], object], device: torch.device, seconds: float = 0.1) -> float:
    """Median time of a call; on a GPU each finds the cache full of something else."""
    samples: list[float] = []
    flush = torch.empty(_FLUSHED_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    call()
    end = time.perf_counter() + seconds
    while len(samples) < 3 or time.perf_counter() < end:
        if device.type == "cuda":
            flush.zero_()  # the host launches the call meanwhile
            begin, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            done.record()
            _wait(device)
            samples.append(1e3 * begin.elapsed_time(done))
        else:
            start = time.perf_counter()
            call()
            samples.append(1e6 * (time.perf_counter() - start))
    return statistics.median(samples)


def compile_kernels(cases: Sequence[Case], device: torch.device, selected: str) -> None:
    """Call every case in a thread per processor, so that Triton compiles its kernels in parallel, into its cache."""

    def call(case: Case) -> None:
        with suppress(Exception):  # which is a fault when the case runs
            OPERATIONS[case.operation](*arguments(case, device))

    with (
        warnings.catch_warnings(),
        select_backend(cast(BackendName, selected)),
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        warnings.simplefilter("ignore", UnverifiedKernels)
        list(pool.map(call, cases))
