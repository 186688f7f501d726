"""Time tiles on this device and write the best to `kernels/configs/<device>.json`: `python -m bench.tune`.

For each operation and range of M every candidate is checked against the reference and timed on the layers of an 8B
Llama; the one with the least geometric mean wins, if it beats the shipped tile by more than noise. Then the boundary
between the fused product and the scratch is placed where the scratch begins to win. Times are kept in `tune.jsonl`, so
that an interrupted run resumes.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import multiprocessing
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
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

from . import timing
from .environment import ROOT
from .problem import TOLERANCE, Problem, Setting, relative_error

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
BUFFERS = 160 << 20  # bytes of all sets of buffers of a layer, beyond any GPU's cache
MARGIN = 0.98  # of the shipped tile's time: what is not faster by this much is noise
BOUNDARIES = (64, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Range:
    """Candidates for an operation (its name in the tile tables) up to `m` rows, at which it is timed."""

    operation: str
    m: int
    bm: tuple[int, ...]
    bn: tuple[int, ...]
    bk: tuple[int, ...] = (64, 128)
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (3, 4)

    def candidates(self, device: str) -> list[Tile]:
        """All tiles to try, the shipped one first."""
        shipped = _tiles.tiles(device, self.operation)
        first = replace(next((tile for tile in shipped if self.m <= tile.m), shipped[-1]), m=self.m)
        grid = itertools.product((self.m,), self.bm, self.bn, self.bk, self.warps, self.stages)
        return list(dict.fromkeys([first, *(Tile(*sizes) for sizes in grid)]))


PRODUCTS = ("linear_rotated", "linear", "linear_backward")
RANGES = (
    *(Range(name, 16, (16,), (64, 128, 256)) for name in PRODUCTS),
    *(Range(name, 64, (32, 64), (64, 128)) for name in PRODUCTS),
    *(Range(name, 256, (64, 128), (64, 128), (64,)) for name in PRODUCTS),
    Range("rotate", 16, (16,), (64,), (64, 128), (2, 4), (2,)),
    Range("rotate", 4096, (32, 64, 128), (64,), (64, 128), (4, 8), (2,)),
    Range("rotate_backward", 4096, (32, 64, 128), (64,), (64, 128), (4, 8), (2, 3)),
    Range("dequantize", 4096, (1,), (32, 64, 128), (64, 128), (4, 8), (1,)),
)
Call = Callable[[int], Tensor]


@lru_cache(maxsize=len(SHAPES))
def _problem(n: int, k: int, m: int, device: torch.device, dtype: str) -> tuple[Problem, Tensor, Tensor]:
    torch.manual_seed(0)
    setting = Setting(dtype=dtype, group=min(64, k))
    copies = math.ceil(BUFFERS / setting.layer(n, k).weight_bytes) if device.type == "cuda" else 1
    problem = Problem(n, k, setting, device, min(64, copies))
    x, dy = (torch.randn(m, size, device=device).to(problem.dtype) for size in (k, n))
    return problem, x, dy


def calls(operation: str, problem: Problem, x: Tensor, dy: Tensor) -> tuple[Call, Callable[[], Tensor]]:
    """The operation, planned with the tiles in force, on one of the sets of buffers, and what it should return."""
    d, weights, weight = problem.d, problem.weights, problem.weights[0]
    if operation in ("linear_rotated", "linear", "scratch"):
        rotation = None if operation == "linear" else d
        arguments = (rotation, None, None)
        product = linear.scratch_linear
        if operation != "scratch":
            product = linear.plan_fused_linear(x, weight, *arguments)
        return lambda i: product(x, weights[i], *arguments), lambda: reference.linear(x, weight, *arguments)
    if operation == "linear_backward":
        gradient = linear_backward.plan_fused_input_gradient(dy, weight)
        return lambda i: gradient(dy, weights[i]), lambda: dy @ reference.dequantize(weight, dy.dtype)
    if operation == "rotate":
        turn = rotate.plan_rotate(True, x, d, None, False)
        return lambda i: turn(x, d, None, False), lambda: reference.rotate(x, d, None, False)
    if operation == "rotate_backward":
        back = rotate.plan_rotate_backward(True, x, x, d, None, False, True, True)
        return lambda i: back(x, x, d, None, False, True, True)[0], lambda: reference.rotate(x, d, None, True)
    fold = dequantize.plan_dequantize_rotate(True, weight, d, x.dtype)
    return lambda i: fold(weights[i], d, x.dtype), lambda: reference.dequantize_rotate(weight, d, x.dtype)


@lru_cache(maxsize=len(SHAPES))
def _truth(operation: str, *place: Any) -> Tensor:
    return calls(operation, *_problem(*place))[1]().double()


class Tuner:
    """Times tiles on one device, on layers of `shapes`, until a time on the monotonic clock; `log` is `tune.jsonl`."""

    def __init__(self, device: torch.device, log: Path, until: float, shapes: Any = SHAPES, dtype: str = "bf16"):
        self.device, self.log, self.until, self.shapes, self.dtype = device, log, until, shapes, dtype
        # Times of other kernels say nothing about these.
        sources = b"".join(path.read_bytes() for path in sorted((ROOT / "kernels" / "triton").glob("*.py")))
        self.identity = [device_name(torch.empty(0, device=device)), hashlib.sha256(sources).hexdigest()[:12]]
        self.times: dict[str, float | None] = {}
        for line in log.read_text().splitlines() if log.exists() else ():
            self.times.update(json.loads(line))

    def time(self, target: Range, tile: Tile) -> float | None:
        """Geometric mean in microseconds over the shapes; None for a tile that cannot run or is wrong."""
        key = json.dumps([self.identity, target.operation, asdict(tile), self.shapes, self.dtype])
        if key not in self.times:
            with _tiles.using({target.operation: [asdict(tile)]}), hqq_oft.backend("triton"):
                self.times[key] = self._measured(target.operation, target.m, tile)
            with self.log.open("a") as file:
                file.write(json.dumps({key: self.times[key]}) + "\n")
        return self.times[key]

    def _measured(self, operation: str, m: int, tile: Tile) -> float | None:
        for shape in self.shapes:
            try:
                out = calls(operation, *_problem(*shape, m, self.device, self.dtype))[0](0)
            except Exception as error:  # a tile too large for the device: the compiler or the launch says so
                print(f"{operation} {tile}: {type(error).__name__}: {str(error)[:100]}")
                return None
            found = relative_error(out, _truth(operation, *shape, m, self.device, self.dtype))
            if not found <= TOLERANCE[torch.bfloat16]:
                print(f"WRONG: {operation} {tile} is {found:.1e} off; it is left out")
                return None
        return self._mean(operation, m)

    def _mean(self, operation: str, m: int) -> float:
        """Geometric mean on the device: a few microseconds of an eager call would be its launches."""
        logs = []
        for shape in self.shapes:
            problem, x, dy = _problem(*shape, m, self.device, self.dtype)
            call = calls(operation, problem, x, dy)[0]
            if self.device.type == "cuda":
                found = timing.replay(call, problem.copies, 0.02)
            else:
                found = timing.take_turns({"it": (call, 1)}, self.device, 0.0, 1)["it"]
            logs.append(math.log(found.p50))
        return math.exp(sum(logs) / len(logs))

    def best(self, target: Range, candidates: list[Tile]) -> Tile:
        """The fastest of those that there is time for; the first unless another is faster by more than noise."""
        first, *others = candidates
        chosen, least = first, (self.time(target, first) or math.inf) * MARGIN
        for tile in tqdm(others, desc=f"{target.operation} M<={target.m}", unit="tile", mininterval=5):
            if time.monotonic() > self.until:
                break
            found = self.time(target, tile)
            if found is not None and found < least:
                chosen, least = tile, found
        return chosen

    def boundary(self, table: dict[str, Any], tried: tuple[int, ...]) -> int:
        """Rows from which decoding into a scratch for the vendor's product always beats the fused one."""
        limit = tried[-1] * 2
        with _tiles.using(table), hqq_oft.backend("triton"):
            for m in reversed(tried):
                if self._mean("linear_rotated", m) <= self._mean("scratch", m):
                    break
                limit = m
        return limit


def _touch(operation: str, m: int, tile: Tile, device: str, dtype: str) -> None:
    with _tiles.using({operation: [asdict(tile)]}), hqq_oft.backend("triton"):
        for shape in SHAPES:  # each splits its sums in its own way, and the number of parts is compiled in
            with suppress(Exception):  # the tuner meets it again and reports it
                calls(operation, *_problem(*shape, m, torch.device(device), dtype))[0](0)


def compile_ahead(plan: dict[Range, list[Tile]], device: str, dtype: str, processes: int, seconds: float) -> None:
    """Run every tile once in other processes, which leaves its kernel in Triton's cache on disk."""
    end = time.monotonic() + seconds
    with multiprocessing.get_context("spawn").Pool(processes) as pool, suppress(multiprocessing.TimeoutError):
        trials = [(target.operation, target.m, tile, device, dtype) for target, tiles in plan.items() for tile in tiles]
        for job in tqdm([pool.apply_async(_touch, trial) for trial in trials], desc="compile", unit="tile"):
            job.get(max(0.0, end - time.monotonic()))


def tuned(tuner: Tuner, plan: dict[Range, list[Tile]], boundaries: tuple[int, ...] = BOUNDARIES) -> dict[str, Any]:
    """The table of a device: of each range the best of its tiles, and the boundary."""
    table: dict[str, Any] = {"regimes": dict(_tiles.table(tuner.identity[0])["regimes"])}
    for target, tiles in plan.items():
        table.setdefault(target.operation, []).append(asdict(tuner.best(target, tiles)))
    if time.monotonic() < tuner.until:
        table["regimes"]["scratch_from_m"] = tuner.boundary(table, boundaries)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.tune", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480, help="stop trying tiles after this long")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "tune.jsonl")
    parser.add_argument("--out", type=Path, help="default: kernels/configs/<device>.json")
    parser.add_argument("--processes", type=int, default=8, help="that compile ahead; 0 for none")
    options = parser.parse_args()
    options.log.parent.mkdir(parents=True, exist_ok=True)
    tuner = Tuner(torch.device(options.device), options.log, time.monotonic() + options.seconds)
    plan = {target: target.candidates(tuner.identity[0]) for target in RANGES}
    if options.processes:
        compile_ahead(plan, options.device, tuner.dtype, options.processes, options.seconds / 3)
    out = options.out or ROOT / "kernels" / "configs" / f"{tuner.identity[0]}.json"
    out.write_text(table_text(tuned(tuner, plan)))
    print(f"written to {out}")


def table_text(table: dict[str, Any]) -> str:
    """The table as JSON with one tile to a line."""
    lines = json.dumps(table).replace(": [{", ": [\n    {").replace("}, {", "},\n    {").replace("}]", "}\n  ]")
    return "{\n  " + re.sub(r"([}\]]), \"", r'\1,\n  "', lines[1:-1]) + "\n}\n"


if __name__ == "__main__":
    main()
