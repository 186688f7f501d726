"""How far a run has got towards `targets.toml`."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .problem import Setting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAIN = Setting().label
TARGETS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("targets.toml").read_text())


class Results:
    """Measured rows by suite, case, contender, phase and mode."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        keys = ("suite", "case", "contender", "phase", "mode")
        self.rows = {tuple(row[key] for key in keys): row for row in rows if row.get("status") == "measured"}

    def values(self, target: dict[str, Any]) -> Iterator[tuple[str, float]]:
        """Every case that has what a target compares, and the value; both sides of a CUDA graph's replay, or eager."""
        column, scale = target.get("column", "p50_us"), target.get("scale", 1)
        for case in cases(target):
            for mode in ("graph", "eager", "fresh process"):
                place = {"case": case, "contender": target["contender"], "phase": target["phase"]}
                sides = [self._value(target["suite"], place, mode, column)]
                if "of" in target:
                    other = {key: value.format(main=MAIN) for key, value in target["of"].items()}
                    sides.append(self._value(target["suite"], place | other, mode, column))
                if all(side is not None for side in sides):
                    yield case, scale * (sides[0] / sides[1] if len(sides) == 2 else sides[0])
                    break

    def _value(self, suite: str, place: dict[str, str], mode: str, column: str) -> Any:
        row = self.rows.get((suite, place["case"], place["contender"], place["phase"], mode), {})
        return row.get(column) if row.get(column) == row.get(column) else None  # NaN is an absent column

    def verdict(self, target: dict[str, Any]) -> tuple[str, str]:
        """`reached`, `missed` or `not measured`, and the worst value with its place."""
        values = list(self.values(target))
        if not values:
            return "not measured", ""
        most = "at_most" in target
        place, worst = (max if most else min)(values, key=lambda value: value[1])
        good = worst <= target["at_most"] if most else worst >= target["at_least"]
        return "reached" if good else "missed", f"{worst:.3g}{target.get('unit', 'x')} at {place} (of {len(values)})"


def cases(target: dict[str, Any]) -> list[str]:
    """Names of the cases that a target is about."""
    axes = [target.get(key, [""]) for key in ("cases", "shapes", "m")]
    axes = itertools.product(*(TARGETS["lists"][axis] if isinstance(axis, str) else axis for axis in axes))
    return list(dict.fromkeys(case.format(shape=shape, m=m, main=MAIN) for case, shape, m in axes))


def table(kind: str, rows: Iterable[dict[str, Any]]) -> str:
    """Every target of the measured suites as a line of Markdown."""
    results = Results(rows)
    lines = ["| target | wanted | worst measured | |", "|---|---|---|---|"]
    for target in TARGETS[kind]:
        if target["suite"] in {suite for suite, *_ in results.rows}:
            verdict, worst = results.verdict(target)
            bound = f"≤ {target['at_most']:g}" if "at_most" in target else f"≥ {target['at_least']:g}"
            lines.append(f"| {target['text']} | {bound}{target.get('unit', 'x')} | {worst} | {verdict} |")
    return "\n".join(lines)
