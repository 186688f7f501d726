"""Time tiles on this device and write the best to `kernels/configs/<device>.json`: `python -m bench.tune`.

For each operation and range of M every candidate is checked against the reference and timed on the layers of an 8B
Llama; the one with the least geometric mean wins, if it beats the shipped tile by more than noise. Then the boundary
between the fused product and the scratch is placed where the scratch begins to win. Times are kept in `tune.jsonl`, so
that a run which is cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from hqq_oft.triton_kernels import _tiles, dequantize, linear, linear_backward, rotate
from hqq_oft.triton_kernels._launch import device_name
from hqq_oft.triton_kernels._tiles import Tile
from torch import Tensor
from tqdm import tqdm

import hqq_oft
from hqq_oft.ops import reference

from .environment import ROOT
from .problem import Problem, Setting, relative_error
from .suites import PROFILES
from .timing import Clock

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
SMALL = ((128, 128),)  # for a dry run
MARGIN = 0.98  # of the shipped tile's time: what is not faster by this much is noise
BOUNDARIES = (64, 128, 192, 256, 384, 512, 768, 1024)
TOLERANCE = 6e-3


@dataclass(frozen=True)
class Range:
    """An operation up to some number of rows.

    Attributes:
        operation: its name in the tile tables.
        m: the largest M of the range, at which it is timed.
        bm, bn, bk, warps, stages: candidates.
    """

    operation: str
    m: int
    bm: tuple[int, ...]
    bn: tuple[int, ...]
    bk: tuple[int, ...] = (64, 128)
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (3, 4)

    def candidates(self, shipped: Tile) -> list[Tile]:
        """All tiles to try, the shipped one first."""
        grid = itertools.product((self.m,), self.bm, self.bn, self.bk, self.warps, self.stages)
        first = Tile(**{**asdict(shipped), "m": self.m})
        return list(dict.fromkeys([first, *(Tile(*sizes) for sizes in grid)]))


RANGES = (
    *(Range(name, 16, (16,), (64, 128, 256)) for name in ("linear_rotated", "linear", "linear_backward")),
    *(Range(name, 64, (32, 64), (64, 128)) for name in ("linear_rotated", "linear", "linear_backward")),
    *(Range(name, 256, (64, 128), (64, 128), (64,)) for name in ("linear_rotated", "linear", "linear_backward")),
    Range("rotate", 16, (16,), (64,), (64, 128), (2, 4), (2,)),
    Range("rotate", 4096, (32, 64, 128), (64,), (64, 128), (4, 8), (2,)),
    Range("rotate_backward", 4096, (32, 64, 128), (64,), (64, 128), (4, 8), (2, 3)),
    Range("dequantize", 4096, (1,), (32, 64, 128), (64, 128), (4, 8), (1,)),
)
Trial = tuple[Range, Tile]


@lru_cache(maxsize=len(SHAPES))
def _problem(n: int, k: int, m: int, device: torch.device, dtype: str) -> tuple[Problem, Tensor, Tensor]:
    torch.manual_seed(0)
    copies = PROFILES["gpu"].copies(n, k) if device.type == "cuda" else 1
    problem = Problem(n, k, Setting(dtype=dtype, group=min(64, k)), device, copies)
    x, dy = (torch.randn(m, size, device=device).to(problem.dtype) for size in (k, n))
    return problem, x, dy


def call(
    operation: str, problem: Problem, x: Tensor, dy: Tensor
) -> tuple[Callable[[int], Tensor], Callable[[], Tensor]]:
    """The operation with the tiles in force on one of the sets of buffers, and what it should give."""
    d, weight = problem.d, problem.weights[0].arguments()
    weights = [weight.arguments() for weight in problem.weights]
    packed = [dequantize.Packed.of(*weight) for weight in weights]

    def rotated() -> Tensor:
        return reference.rotate(x, d, None, False)

    return {
        "linear_rotated": (
            lambda i: linear.fused_linear(x, d, packed[i], None, None),
            lambda: reference.linear(x, d, *weight, None, None),
        ),
        "linear": (
            lambda i: linear.fused_linear(x, None, packed[i], None, None),
            lambda: reference.linear(x, None, *weight, None, None),
        ),
        "linear_backward": (
            lambda i: linear_backward.fused_input_gradient(dy, packed[i]),
            lambda: dy @ reference.dequantize(*weight, dy.dtype),
        ),
        "rotate": (lambda i: rotate.rotate(x, d, None, False), rotated),
        "rotate_backward": (
            lambda i: rotate.rotate_backward(x, x, d, None, False, True, True)[0],
            lambda: reference.rotate(x, d, None, True),
        ),
        "dequantize": (
            lambda i: dequantize.dequantize_rotate(*weights[i], d, x.dtype),
            lambda: reference.dequantize_rotate(*weight, d, x.dtype),
        ),
    }[operation]


@lru_cache(maxsize=len(SHAPES))
def _truth(operation: str, n: int, k: int, m: int, device: torch.device, dtype: str) -> Tensor:
    return call(operation, *_problem(n, k, m, device, dtype))[1]().double()


def _fused(x: Tensor, d: Tensor, weights: list[dequantize.Packed], number: int) -> Tensor:
    return linear.fused_linear(x, d, weights[number], None, None)


def _scratch(x: Tensor, d: Tensor, weights: list[dequantize.Packed], number: int) -> Tensor:
    return linear.scratch_linear(x, d, weights[number], None)


def _kernels() -> str:
    """A digest of the kernels: times of others say nothing about these."""
    sources = sorted((ROOT / "kernels" / "triton").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]


class Tuner:
    """Times trials on one device.

    Args:
        device: where.
        log: `tune.jsonl`.
        until: on the monotonic clock, when to stop.
        shapes: out- and in-features of the layers.
        dtype: of inputs and outputs.
    """

    def __init__(self, device: torch.device, log: Path, until: float, shapes: Any = SHAPES, dtype: str = "bf16"):
        self.device, self.log, self.until, self.shapes, self.dtype = device, log, until, shapes, dtype
        self.clock = Clock(device, budget=0.02)
        self.identity = [device_name(torch.empty(0, device=device)), _kernels()]
        lines = log.read_text().splitlines() if log.exists() else []
        self.times: dict[str, float | None] = {}
        for line in lines:
            self.times.update(json.loads(line))

    def time(self, trial: Trial) -> float | None:
        """Geometric mean in microseconds over the shapes; None for a tile that can't run or is wrong."""
        key = json.dumps([self.identity, trial[0].operation, asdict(trial[1]), self.shapes, self.dtype])
        if key not in self.times:
            self.times[key] = self._measured(trial)
            with self.log.open("a") as file:
                file.write(json.dumps({key: self.times[key]}) + "\n")
        return self.times[key]

    def _measured(self, trial: Trial) -> float | None:
        target, tile = trial
        logs = []
        with _tiles.using({target.operation: [asdict(tile)]}), hqq_oft.backend("triton"):
            for n, k in self.shapes:
                problem, x, dy = _problem(n, k, target.m, self.device, self.dtype)
                run, _ = call(target.operation, problem, x, dy)
                try:
                    out = run(0)
                except Exception as error:  # a tile too large for the device: the compiler or the launch says so
                    print(f"{target.operation} {tile}: {type(error).__name__}: {str(error)[:100]}")
                    return None
                truth = _truth(target.operation, n, k, target.m, self.device, self.dtype)
                error = relative_error(out, truth)
                if not error <= TOLERANCE:
                    print(f"WRONG: {target.operation} {tile} is {error:.1e} off; it is left out")
                    return None
                logs.append(math.log(self._microseconds(run, problem.copies)))
        return math.exp(sum(logs) / len(logs))

    def _microseconds(self, run: Callable[[int], Tensor], copies: int) -> float:
        """Median time on the device: eager calls of a few microseconds would be timed by their launches."""
        if self.device.type == "cuda":
            return self.clock.replay(run, copies).p50
        return self.clock.take_turns({"it": (run, copies)})["it"].p50

    def best(self, target: Range, candidates: list[Tile]) -> Tile:
        """The fastest of those that there is time for; the first unless another is faster by more than noise."""
        first, *others = candidates
        chosen, least = first, (self.time((target, first)) or math.inf) * MARGIN
        for tile in tqdm(others, desc=f"{target.operation} M<={target.m}", unit="tile", mininterval=5):
            if time.monotonic() > self.until:
                break
            found = self.time((target, tile))
            if found is not None and found < least:
                chosen, least = tile, found
        return chosen

    def boundary(self, table: dict[str, Any], tried: tuple[int, ...] = BOUNDARIES) -> int:
        """Rows from which decoding into a scratch for the vendor's product beats the fused one, for good."""
        limit = tried[-1] * 2
        with _tiles.using(table), hqq_oft.backend("triton"):
            for m in reversed(tried):
                gain = 0.0
                for n, k in self.shapes:
                    problem, x, _ = _problem(n, k, m, self.device, self.dtype)
                    packed = [dequantize.Packed.of(*weight.arguments()) for weight in problem.weights]
                    d = problem.d
                    fused = self._microseconds(partial(_fused, x, d, packed), problem.copies)
                    gain += math.log(fused / self._microseconds(partial(_scratch, x, d, packed), problem.copies))
                if gain <= 0:
                    break
                limit = m
        return limit


def compile_ahead(trials: list[Trial], device: str, dtype: str, processes: int, seconds: float) -> None:
    """Run every trial once in other processes, which leaves its kernel in Triton's cache on disk."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        jobs = [pool.apply_async(_touch, (trial, device, dtype)) for trial in trials]
        end = time.monotonic() + seconds
        for job in tqdm(jobs, desc="compile", unit="tile", mininterval=5):
            try:
                job.get(max(0.0, end - time.monotonic()))
            except multiprocessing.TimeoutError:
                break


def _touch(trial: Trial, device: str, dtype: str) -> None:
    target, tile = trial
    with _tiles.using({target.operation: [asdict(tile)]}), hqq_oft.backend("triton"):
        for n, k in SHAPES:  # each splits its sums in its own way, and the number of parts is compiled in
            run, _ = call(target.operation, *_problem(n, k, target.m, torch.device(device), dtype))
            with suppress(Exception):  # the tuner meets it again and says so
                run(0)


def by_operation(ranges: tuple[Range, ...]) -> Iterator[tuple[str, list[Range]]]:
    """Ranges grouped by operation, in order."""
    for name in dict.fromkeys(target.operation for target in ranges):
        yield name, [target for target in ranges if target.operation == name]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.tune", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480, help="stop trying tiles after this long")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "tune.jsonl")
    parser.add_argument("--out", type=Path, help="default: kernels/configs/<device>.json")
    parser.add_argument("--processes", type=int, default=8, help="that compile ahead; 0 for none")
    parser.add_argument("--dry", action="store_true", help="two tiles of each on a small layer, in float16")
    options = parser.parse_args(argv)
    until = time.monotonic() + options.seconds
    device = torch.device(options.device)
    options.log.parent.mkdir(parents=True, exist_ok=True)
    shapes, dtype, most = (SMALL, "fp16", 2) if options.dry else (SHAPES, "bf16", None)
    ranges = tuple(replace(target, m=min(target.m, 64)) for target in RANGES) if options.dry else RANGES
    tuner = Tuner(device, options.log, until, shapes, dtype)
    name = device_name(torch.empty(0, device=device))
    plan = {}
    for target in ranges:
        shipped = next((t for t in _tiles.tiles(name, target.operation) if target.m <= t.m), None)
        plan[target] = target.candidates(shipped or _tiles.tiles(name, target.operation)[-1])[:most]
    if options.processes and not options.dry:
        trials = [(target, tile) for target, tiles in plan.items() for tile in tiles]
        compile_ahead(trials, str(device), dtype, options.processes, options.seconds / 3)
    table: dict[str, Any] = {"regimes": dict(_tiles.table(name)["regimes"])}
    for operation, targets in by_operation(ranges):
        table[operation] = [asdict(tuner.best(target, plan[target])) for target in targets]
    if time.monotonic() < until:
        table["regimes"]["scratch_from_m"] = tuner.boundary(table, BOUNDARIES[:1] if options.dry else BOUNDARIES)
    out = options.out or ROOT / "kernels" / "configs" / f"{name}.json"
    out.write_text(table_text(table))
    print(f"written to {out}")


def table_text(table: dict[str, Any]) -> str:
    """The table as JSON with one tile to a line."""
    parts = []
    for key, value in table.items():
        if isinstance(value, dict):
            parts.append(f"  {json.dumps(key)}: {json.dumps(value)}")
        else:
            lines = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            parts.append(f"  {json.dumps(key)}: [\n{lines}\n  ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
