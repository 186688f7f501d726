"""What the project wants to reach, and how far a run has got: ratios taken within it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .problem import Setting
from .session import LORA, OURS, PEFT, Row

MAIN = Setting().label
Value = tuple[str, float]  # where, and what


class Results:
    """Measured rows, by suite, case, contender, phase and mode."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = {
            (r["suite"], r["case"], r["contender"], r["phase"], r["mode"]): r
            for r in rows
            if r.get("status") == "measured"
        }

    def row(self, suite: str, case: str, contender: str, phase: str) -> Row | None:
        """The row, of a CUDA graph's replay where there is one."""
        for mode in ("graph", "eager"):
            found = self.rows.get((suite, case, contender, phase, mode))
            if found is not None:
                return found
        return None

    def ratio(self, suite: str, case: str, phase: str, over: str, under: str, under_phase: str = "") -> Iterator[Value]:
        """Median time of `over` as a multiple of `under`'s, both replayed from a CUDA graph or both eager."""
        for mode in ("graph", "eager"):
            upper = self.rows.get((suite, case, over, phase, mode))
            lower = self.rows.get((suite, case, under, under_phase or phase, mode))
            if upper and lower:
                yield case, upper["p50_us"] / lower["p50_us"]
                return

    def column(self, suite: str, case: str, contender: str, phase: str, column: str) -> Iterator[Value]:
        """One column of a row."""
        row = self.row(suite, case, contender, phase)
        if row is not None and row.get(column) is not None:
            yield case, row[column]


@dataclass(frozen=True)
class Target:
    """A bound on the worst of some values.

    Attributes:
        text: what is bounded, in words.
        bound: the value to reach.
        most: whether values must be at most the bound, else at least.
        values: finds them among a run's results.
        unit: printed behind them.
    """

    text: str
    bound: float
    most: bool
    values: Callable[[Results], Iterable[Value]]
    unit: str = "x"

    def verdict(self, results: Results) -> tuple[str, str]:
        """`reached`, `missed` or `not measured`, and the worst value with its place."""
        values = list(self.values(results))
        if not values:
            return "not measured", ""
        place, worst = (max if self.most else min)(values, key=lambda value: value[1])
        well = worst <= self.bound if self.most else worst >= self.bound
        return ("reached" if well else "missed"), f"{worst:.3g}{self.unit} at {place} (of {len(values)})"

    def wanted(self) -> str:
        """The bound as text."""
        return f"{'≤' if self.most else '≥'} {self.bound:g}{self.unit}"


def _layer(n: int, k: int, m: int) -> str:
    return f"{n}x{k} M={m} {MAIN}"


SHAPES_8B = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
SHAPES = (*SHAPES_8B, (28672, 8192), (8192, 28672))


def _cases(
    suite: str, names: Iterable[str], phase: str, over: str, under: str, under_phase: str = ""
) -> Callable[[Results], Iterator[Value]]:
    def values(results: Results) -> Iterator[Value]:
        for name in names:
            yield from results.ratio(suite, name, phase, over, under, under_phase)

    return values


def _columns(suite: str, names: Iterable[str], phase: str, column: str) -> Callable[[Results], Iterator[Value]]:
    def values(results: Results) -> Iterator[Value]:
        for name in names:
            yield from results.column(suite, name, OURS, phase, column)

    return values


def _layers(
    tokens: Iterable[int], phase: str, over: str, under: str, shapes: Iterable[tuple[int, int]] = SHAPES
) -> Callable[[Results], Iterator[Value]]:
    return _cases("layer", [_layer(n, k, m) for n, k in shapes for m in tokens], phase, over, under)


def _of_limit(tokens: Iterable[int], n: int, k: int) -> Callable[[Results], Iterator[Value]]:
    return _columns("layer", [_layer(n, k, m) for m in tokens], "forward", "limit_percent")


def _flat(n: int, k: int) -> Callable[[Results], Iterator[Value]]:
    def values(results: Results) -> Iterator[Value]:
        one = results.row("layer", _layer(n, k, 1), OURS, "forward")
        for m in (2, 4, 8, 16):
            row = results.row("layer", _layer(n, k, m), OURS, "forward")
            if one and row:
                yield _layer(n, k, m), row["p50_us"] / one["p50_us"]

    return values


def _rotation_share(results: Results) -> Iterator[Value]:
    for m in (1, 16):
        case = _layer(14336, 4096, m)
        for place, ratio in results.ratio("layer", case, "forward", "hqq_oft, no rotation", OURS):
            yield place, 100 * (1 - ratio)


def _kept(results: Results) -> Iterator[Value]:
    for n, k in SHAPES:
        for m in (4096, 8192, 16384):
            for place, mib in results.column("layer", _layer(n, k, m), OURS, "full", "kept_mib"):
                yield place, 100 * mib * 2**20 / (2 * m * (n + k))


def _first_step(results: Results) -> Iterator[Value]:
    for (_, case, *_), row in results.rows.items():
        if case.startswith("first step"):
            yield case, row["p50_us"] / 1e6


LARGE, MIDDLE, DECODE = (4096, 8192, 16384), (512, 1024, 2048), (1, 2, 4, 8, 16)
DEQUANTIZE = [f"dequantize {n}x{k} {MAIN}" for n, k in SHAPES]
AGAINST_GEMLITE = [f"{_layer(n, k, m)} against GemLite" for n, k in SHAPES for m in DECODE]
ALL_ADAPTERS = ["cayley all 224 adapters of a model"]

GPU = (
    Target("training step of a layer, M >= 4096, against dense", 1.18, True, _layers(LARGE, "full", OURS, "dense")),
    Target("the same, PEFT's OFT against ours", 2.5, False, _layers(LARGE, "full", PEFT, OURS)),
    Target("the same, PEFT's LoRA against ours", 1.0, False, _layers(LARGE, "full", LORA, OURS)),
    Target(
        "training step of a layer, M = 512 to 2048, against dense", 1.5, True, _layers(MIDDLE, "full", OURS, "dense")
    ),
    Target("the same, PEFT's OFT against ours", 4.0, False, _layers(MIDDLE, "full", PEFT, OURS)),
    Target("decode at 28672x8192, share of the limit", 70, False, _of_limit(DECODE, 28672, 8192), "%"),
    Target("decode at 14336x4096, share of the limit", 55, False, _of_limit(DECODE, 14336, 4096), "%"),
    Target(
        "decode, GemLite without rotation against ours",
        1.0,
        False,
        _cases("layer", AGAINST_GEMLITE, "forward", "GemLite", OURS),
    ),
    Target(
        "decode at 8192-wide layers, dense against ours",
        2.2,
        False,
        _layers(DECODE, "forward", "dense", OURS, ((28672, 8192), (8192, 28672))),
    ),
    Target("decode at 28672x8192, M = 16 against M = 1", 1.15, True, _flat(28672, 8192)),
    Target("rotation's share of decode at 14336x4096", 10, True, _rotation_share, "%"),
    Target(
        "Cayley forward, K=4096, PEFT against ours",
        10,
        False,
        _cases("ops", [f"cayley K=4096 {MAIN}"], "forward", "PEFT", OURS),
    ),
    Target("backward", 10, False, _cases("ops", [f"cayley K=4096 {MAIN}"], "backward", "PEFT", OURS)),
    Target("all 224 adapters of an 8B model", 150, True, _columns("ops", ALL_ADAPTERS, "forward", "p50_us"), " us"),
    Target(
        "dequantize_rotate, share of the limit",
        80,
        False,
        _columns("ops", DEQUANTIZE, "dequantize_rotate", "limit_percent"),
        "%",
    ),
    Target(
        "rotate part of a merge, PEFT against ours",
        100,
        False,
        _cases("merge", [f"4096x4096 {MAIN}", f"4096x14336 {MAIN}"], "rotate", "PEFT", OURS),
    ),
    Target("memory kept for backward beyond the input, of the layer's activations", 2, True, _kept, "%"),
    Target("first step of a fresh process beyond the second", 3, True, _first_step, " s"),
)


def _peak(results: Results) -> Iterator[Value]:
    """Peak memory of a process that trains, ours as a share of PEFT's OFT."""
    for (_, case, contender, phase, _), row in results.rows.items():
        other = results.row("model", case, PEFT, phase)
        if contender == OURS and phase == "training process" and other is not None:
            yield case, 100 * row["peak_mib"] / other["peak_mib"]


def _cpu(n: int, m: int, phase: str, over: str, under: str) -> Callable[[Results], Iterator[Value]]:
    return _layers((m,), phase, over, under, ((n, 4096),))


_BOTH = ((4096, 4096), (14336, 4096))
_TRAINED = ["training process, 4 layers of 1024, sequence 256"]
CPU = (
    Target("M=1, 4096x4096, PEFT's OFT against ours", 60, False, _cpu(4096, 1, "forward", PEFT, OURS)),
    Target(
        "ours against PyTorch's int4, which does not rotate", 1.05, True, _cpu(4096, 1, "forward", OURS, "PyTorch int4")
    ),
    Target("dense against ours", 2.8, False, _cpu(4096, 1, "forward", "dense", OURS)),
    Target("M=1, 14336x4096, PEFT's OFT against ours", 100, False, _cpu(14336, 1, "forward", PEFT, OURS)),
    Target("ours against PyTorch's int4", 0.7, True, _cpu(14336, 1, "forward", OURS, "PyTorch int4")),
    Target("dense against ours", 6, False, _cpu(14336, 1, "forward", "dense", OURS)),
    Target("share of the limit", 75, False, _of_limit((1,), 14336, 4096), "%"),
    Target("M=16, PEFT's OFT against ours", 10, False, _layers((16,), "forward", PEFT, OURS, _BOTH)),
    Target("ours against dense", 1.2, True, _layers((16,), "forward", OURS, "dense", _BOTH)),
    Target("M=512, forward, PEFT's OFT against ours", 2, False, _layers((512,), "forward", PEFT, OURS, _BOTH)),
    Target("ours against dense", 1.15, True, _layers((512,), "forward", OURS, "dense", _BOTH)),
    Target(
        "M=512, forward and backward, PEFT's OFT against ours", 1.8, False, _layers((512,), "full", PEFT, OURS, _BOTH)
    ),
    Target("ours against dense", 1.25, True, _layers((512,), "full", OURS, "dense", _BOTH)),
    Target(
        "merge without requantizing, 4096x4096, PEFT against ours",
        20,
        False,
        _cases("merge", [f"4096x4096 {MAIN}"], "rotate", "PEFT", OURS, "rotate without requantizing"),
    ),
    Target(
        "ours against a copy of the dense weight",
        3,
        True,
        _cases("merge", [f"4096x4096 {MAIN}"], "rotate without requantizing", OURS, "copy"),
    ),
    Target(
        "training step of a process of its own, PEFT's OFT against ours",
        1.6,
        False,
        _cases("model", _TRAINED, "training process", PEFT, OURS),
    ),
    Target("its peak memory, ours of PEFT's OFT", 100, True, _peak, "%"),
)


def table(targets: Iterable[Target], rows: Iterable[Row]) -> str:
    """Every target as a line of Markdown."""
    results = Results(rows)
    lines = ["| target | wanted | worst measured | |", "|---|---|---|---|"]
    for target in targets:
        verdict, worst = target.verdict(results)
        lines.append(f"| {target.text} | {target.wanted()} | {worst} | {verdict} |")
    return "\n".join(lines)
