"""Time tiles on this device and write the best to `kernels/configs/<device>.json`: `python -m bench.tune`.

Every candidate is checked against the reference and timed on the layers of an 8B Llama; the least geometric mean wins,
if it beats the shipped tile by more than noise. Times are kept in `tune.jsonl`: an interrupted run resumes.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hqq_oft.triton_kernels import _tiles
from hqq_oft.triton_kernels._launch import device_name
from hqq_oft.triton_kernels._tiles import Tile
from torch import Tensor
from tqdm import tqdm

import hqq_oft
from hqq_oft.check.measure import TOLERANCE, relative_error
from hqq_oft.ops import table as ops

from . import timing
from .environment import ROOT
from .problem import Problem, Setting, buffer_sets

SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336))
MARGIN = 0.98  # of the shipped tile's time: what is not faster by this much is noise
# The threshold to the scratch in the tile tables, and the operation that it is measured on.
THRESHOLDS = {"scratch_from_m": "linear_rotated", "backward_scratch_from_m": "linear_backward"}
BOUNDARIES = (32, 64, 128, 192, 256, 384, 512, 768, 1024)


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


RANGES = (
    *(Range(name, 8, (8,), (64, 128), (128,), (1, 2, 4), (2, 3, 4)) for name in ("linear", "linear_rotated")),
    *(Range(name, 16, (16,), (128, 256), (128,), (2, 4), (2, 3, 4)) for name in ("linear", "linear_rotated")),
    Range("linear", 32, (16, 32), (64, 128), (128,), (2, 4), (2, 3)),
    Range("linear", 256, (32, 64), (128, 256), (128,), (4, 8), (2, 3)),
    Range("linear_general", 16, (16,), (64, 128, 256)),
    Range("linear_general", 64, (32, 64), (64, 128)),
    Range("linear_general", 256, (64, 128), (64, 128), (64,)),
    Range("linear_backward", 8, (8,), (64, 128), (128,), (1, 2, 4)),
    Range("linear_backward", 16, (16,), (64, 128), (128,), (1, 2, 4)),
    Range("linear_backward", 64, (16, 32), (64, 128), (128,), (1, 2, 4)),
    Range("rotate", 16, (16,), (64,), (64, 128), (2, 4), (2,)),
    Range("rotate", 4096, (32, 64, 128), (64,), (64, 128), (4, 8), (2,)),
    Range("rotate_backward", 4096, (32, 64, 128), (64,), (64, 128), (4, 8), (2, 3)),
    Range("dequantize", 4096, (1,), (32, 64, 128), (64, 128), (4, 8), (1,)),
    Range("dequantize_rotate", 4096, (1,), (64, 128, 256), (32, 64), (4, 8), (1, 2)),
)
# Of an operation: problem, x, dy and one of the weights.
CALLS: dict[str, Callable[[Problem, Tensor, Tensor, Any], Tensor]] = {
    "linear_rotated": lambda p, x, dy, weight: ops.linear(x, weight, p.d, None, None),
    "linear": lambda p, x, dy, weight: ops.linear(x, weight, None, None, None),
    # other kernels take 16-bit scales only
    "linear_general": lambda p, x, dy, weight: ops.linear(
        x, replace(weight, scale=weight.scale.float(), zero=weight.zero.float()), None, None, None
    ),
    "linear_backward": lambda p, x, dy, weight: ops.linear_backward(dy, x, weight, None, None, True, False)[0],
    "rotate": lambda p, x, dy, weight: ops.rotate(x, p.d, None, False),
    "rotate_backward": lambda p, x, dy, weight: ops.rotate_backward(x, x, p.d, None, False, True, True)[0],
    "dequantize": lambda p, x, dy, weight: ops.dequantize(weight, x.dtype),
    "dequantize_rotate": lambda p, x, dy, weight: ops.dequantize_rotate(weight, p.d, x.dtype),
}


@lru_cache(maxsize=len(SHAPES))
def _problem(n: int, k: int, m: int, device: torch.device, dtype: str) -> tuple[Problem, Tensor, Tensor]:
    torch.manual_seed(0)
    setting = Setting(dtype=dtype, group=min(64, k))
    problem = Problem(n, k, setting, device, buffer_sets(setting.layer(n, k), device))
    x, dy = (torch.randn(m, size, device=device).to(problem.dtype) for size in (k, n))
    return problem, x, dy


def _call(operation: str, *place: Any) -> Callable[[int], Tensor]:
    """The operation at a place (n, k, m, device, dtype) with one of its sets of buffers."""
    problem, x, dy = _problem(*place)
    return lambda number: CALLS[operation](problem, x, dy, problem.weights[number])


@lru_cache(maxsize=len(SHAPES))
def _truth(operation: str, *place: Any) -> Tensor:
    with hqq_oft.backend("reference"):
        return _call(operation, *place)(0).double()


@contextmanager
def _tiles_of(table: dict[str, Any], scratch_from_m: int = 1 << 30) -> Iterator[None]:
    """Run the Triton kernels with these tiles, fused up to some number of rows, forward and backward."""
    regimes = dict.fromkeys(THRESHOLDS, scratch_from_m)
    with _tiles.using({**table, "regimes": regimes}), hqq_oft.backend("triton"):
        yield


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
            with _tiles_of({target.operation: [asdict(tile)]}):
                self.times[key] = self._measured(target.operation, target.m, tile)
            with self.log.open("a") as file:
                file.write(json.dumps({key: self.times[key]}) + "\n")
        return self.times[key]

    def _measured(self, operation: str, m: int, tile: Tile) -> float | None:
        for shape in self.shapes:
            try:
                out = _call(operation, *shape, m, self.device, self.dtype)(0)
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
        for place in ((*shape, m, self.device, self.dtype) for shape in self.shapes):
            call, copies = _call(operation, *place), _problem(*place)[0].copies
            if self.device.type == "cuda":
                found = timing.replay(call, copies, 0.02)
            else:
                found = timing.take_turns({"it": (call, 1)}, self.device, 0.0, 1)["it"]
            logs.append(math.log(found.p50_us))
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

    def boundary(self, operation: str, table: dict[str, Any], tried: tuple[int, ...]) -> int:
        """Rows from which decoding into a scratch for the vendor's product always beats the fused one."""
        limit = tried[-1] * 2
        for m in reversed(tried):
            with _tiles_of(table):
                fused = self._mean(operation, m)
            with _tiles_of(table, 0):
                if fused <= self._mean(operation, m):
                    break
            limit = m
        return limit


def _touch(operation: str, m: int, tile: Tile, device: str, dtype: str) -> None:
    with _tiles_of({operation: [asdict(tile)]}):
        for shape in SHAPES:  # each splits its sums in its own way, and the number of parts is compiled in
            with suppress(Exception):  # the tuner meets it again and reports it
                _call(operation, *shape, m, torch.device(device), dtype)(0)


def compile_ahead(plan: dict[Range, list[Tile]], device: str, dtype: str, processes: int, seconds: float) -> None:
    """Run every tile once in other processes, which leaves its kernel in Triton's cache on disk."""
    end = time.monotonic() + seconds
    with multiprocessing.get_context("spawn").Pool(processes) as pool, suppress(multiprocessing.TimeoutError):
        trials = [(target.operation, target.m, tile, device, dtype) for target, tiles in plan.items() for tile in tiles]
        for job in tqdm([pool.apply_async(_touch, trial) for trial in trials], desc="compile", unit="tile"):
            job.get(max(0.0, end - time.monotonic()))


def tuned(tuner: Tuner, plan: dict[Range, list[Tile]], boundaries: tuple[int, ...] = BOUNDARIES) -> dict[str, Any]:
    """The table of a device: of each range the best of its tiles, and the thresholds."""
    table: dict[str, Any] = {"regimes": dict(_tiles.table(tuner.identity[0])["regimes"])}
    for target, tiles in plan.items():
        table.setdefault(target.operation, []).append(asdict(tuner.best(target, tiles)))
    for threshold, operation in THRESHOLDS.items():
        if time.monotonic() < tuner.until:
            table["regimes"][threshold] = tuner.boundary(operation, table, boundaries)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.tune", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=480, help="stop trying tiles after this long")
    parser.add_argument("--out", type=Path, help="default: kernels/configs/<device>.json")
    parser.add_argument("--processes", type=int, default=8, help="that compile ahead; 0 for none")
    options = parser.parse_args()
    log = ROOT / "build" / "tune.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    tuner = Tuner(torch.device(options.device), log, time.monotonic() + options.seconds)
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
