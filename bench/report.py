"""Tables and plots, from `raw.jsonl` and `environment.json`: `python -m bench.report bench/results/<device>`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

from .contenders import CONTENDERS, DENSE, HQQ, LORA, OURS, PEFT
from .problem import Setting
from .run import read_rows

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MAIN = Setting().label
TARGETS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("targets.toml").read_text())
KEY = ["suite", "case", "contender", "phase", "mode"]
CODE = ["commit", "sources"]
NUMBERS = ("M", "N", "K", "kept_mib", "tokens", "p50_us", "p20_us", "p80_us", "limit_percent", "predicted_us", "tflops",
           "gb_per_s", "bandwidth_gb_per_s", "rate_tflops")  # fmt: skip
COLORS = {OURS: "tab:blue", DENSE: "tab:green", PEFT: "tab:red", LORA: "tab:orange", HQQ: "tab:purple",
          "PyTorch int4": "tab:brown", "GemLite": "tab:brown"}  # fmt: skip


def latest(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Of each case the rows of the code that measured it last, and of each time the last; with derived columns."""
    table = pd.DataFrame(rows)
    table = table.reindex(columns=table.columns.union([*KEY, *CODE, *NUMBERS, "note"], sort=False))
    table = table.astype(dict.fromkeys(NUMBERS, float) | dict.fromkeys(CODE, object)).fillna(dict.fromkeys(CODE, ""))
    # Rows without a contender are of cases that failed as a whole; a later run may have measured them.
    last = table.groupby(["suite", "case"])[[*CODE, "status"]].transform("last")
    same = (table[CODE] == last[CODE]).all(axis=1)
    table = table[same & (table.contender.notna() | (table.status == last.status))]
    table = table.drop_duplicates(KEY, keep="last").copy()
    table["kept_percent"] = 100 * table.kept_mib * 2**20 / (2 * table.M * (table.N + table.K))  # of input and output
    table["tokens_per_s"] = 1e6 * table.tokens / table.p50_us
    place = ["suite", "case", "phase", "mode"]
    mine = table[table.contender == OURS].drop_duplicates(place)[[*place, "p50_us"]]
    table = table.merge(mine.rename(columns={"p50_us": "ours_us"}), on=place, how="left")
    table["of_ours"] = table.p50_us / table.ours_us
    return table


def write(folder: Path) -> None:
    """All files, from the rows so far."""
    rows = read_rows(folder / "raw.jsonl")
    if not rows:
        return
    table = latest(rows)
    table.to_csv(folder / "results.csv", index=False, float_format="%.5g")
    measured = table[table.status == "measured"]
    layers = measured[(measured.suite == "layer") & measured.M.isin([1, 16, 512, 4096])]
    layers = layers[layers.case.str.endswith(MAIN) & layers.phase.isin(["forward", "full"])]
    plots = [
        _times(folder, layers, "layers.png", "one layer, 4 bits, block 32, bfloat16"),
        _times(folder, measured[measured.suite == "model"], "models.png", "whole models"),
        _times(folder, measured[measured.suite == "host"], "host.png", "overhead of the host"),
        _roofline(folder, measured),
        _memory(folder, measured),
    ]
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "README.md").write_text(_page(table, measured, environment, [plot for plot in plots if plot]))


def _page(table: pd.DataFrame, measured: pd.DataFrame, environment: dict[str, Any], plots: list[str]) -> str:
    facts = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "peft", "hqq", "transformers"))
    parts = [
        f"# Measured on {environment['device']}",
        "Written by `python -m bench.report`, which also writes all columns to `results.csv`. "
        f"{environment['threads']} threads, Python {environment['python']}, {facts}. Commit `{environment['commit']}`, "
        f"sources `{environment['sources']}`.",
        f"In the same run a copy moved {environment['bandwidth_gb_per_s']:.1f} GB/s, bytes read and written, and a "
        f"dense bfloat16 product ran at {environment['rate_tflops']:.3g} TFLOP/s; *limit* is the time that the bytes "
        "and operations of `bench/model.py` take at these.",
    ]
    if environment.get("allocator"):
        parts.append(
            f"All contenders ran with `{environment['allocator']}`, which keeps freed memory mapped, in large pages."
        )
    stale = measured[(measured[CODE] != [environment[key] for key in CODE]).any(axis=1)]
    if count := len(stale.drop_duplicates(["suite", "case"])):
        parts.append(f"**{count} cases were measured with other code, named by `commit` and `sources` of their rows.**")
    goals = targets_table(environment["kind"], measured.to_dict("records"))
    parts += ["## Targets", goals] if goals.count("\n") > 1 else []
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    for suite, rows in measured.groupby("suite", sort=False):
        parts += [f"## Suite {suite}", _suite(rows)]
    others = table[table.status != "measured"]
    if len(others):
        parts += ["## Not measured", "\n".join(("- " + others.contender.fillna("all") + ": " + others.status).unique())]
    return "\n\n".join(parts) + "\n"


def _markdown(header: str, rows: Iterable[Iterable[Any]]) -> str:
    lines = [header.split(", "), ["---"] * len(header.split(", ")), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _suite(rows: pd.DataFrame) -> str:
    """One line per case and phase: the time of ours, and the others' as multiples of it."""
    lines = []
    for (case, phase, mode), group in rows.groupby(["case", "phase", "mode"], sort=False):
        first = group.sort_values("contender", key=lambda names: names != OURS, kind="stable").iloc[0]
        others = group[group.contender != first.contender].itertuples()
        multiples = ", ".join(f"{row.contender} {row.p50_us / first.p50_us:.3g}" for row in others)
        name = "" if first.contender == OURS else f"{first.contender}: "
        rate = "" if pd.isna(first.tokens_per_s) else f", {first.tokens_per_s:.4g} tokens/s"
        spread = "" if pd.isna(first.p20_us) else f"{_time(first.p20_us)} to {_time(first.p80_us)}"
        limit = "" if pd.isna(first.limit_percent) else f"{first.limit_percent:.0f}%"
        where = phase if mode == "eager" else f"{phase}, {mode}"
        lines.append((case, where, f"{name}{_time(first.p50_us)}{rate}", spread, limit, multiples))
    notes = rows[rows.note.notna()].drop_duplicates(["contender", "note", "N"])
    found = _markdown("case, phase, ours, 20 to 80%, of limit, others in times of ours", lines)
    said = (f"- {r.contender}{'' if r.N != r.N else f', {r.N:.0f}x{r.K:.0f}'}: {r.note}" for r in notes.itertuples())
    return "\n".join([found, "", *said])


def _time(us: float) -> str:
    return f"{us:.3g} µs" if us < 1e3 else f"{us / 1e3:.3g} ms" if us < 1e6 else f"{us / 1e6:.3g} s"


def _times(folder: Path, rows: pd.DataFrame, name: str, title: str) -> str | None:
    """A line of dots for each case: ours, what a user would pick instead, and the limit of bytes and operations."""
    rows = rows[rows.contender.isin(COLORS)].sort_values("mode", key=lambda mode: mode != "graph", kind="stable")
    rows = rows.drop_duplicates(["case", "contender", "phase"])  # of a CUDA graph's replay where there is one
    rows = rows[rows.duplicated(["case", "phase"], keep=False)]
    rows = rows.assign(training=rows.phase == "full").sort_values(["training", "N", "K", "M"], kind="stable")
    if rows.empty:
        return None
    rows["line"] = -rows.groupby(["case", "phase"], sort=False).ngroup()
    figure, axis = plt.subplots(figsize=(9.5, 1.6 + 0.38 * rows.line.nunique()), layout="constrained")
    for contender, color in COLORS.items():
        found, size = rows[rows.contender == contender], 11 if contender == OURS else 6
        if len(found):
            axis.plot(found.p50_us / 1e3, found.line, "o", color=color, markersize=size, label=contender)
    limits = rows[(rows.contender == OURS) & rows.predicted_us.notna()]
    if len(limits):
        axis.plot(limits.predicted_us / 1e3, limits.line, "k|", markersize=15, markeredgewidth=2, label="limit of ours")
    first = rows.drop_duplicates("line")
    names = first.case.str.removesuffix(f" {MAIN}")
    axis.set_yticks(first.line, [n if p in n else f"{n} {p}" for n, p in zip(names, first.phase, strict=True)])
    axis.set(xscale="log", xlabel="time, ms (logarithmic)", ylim=(rows.line.min() - 0.6, 0.6), title=title)
    figure.legend(loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    axis.grid(alpha=0.3)
    return _saved(figure, folder, name)


def _roofline(folder: Path, rows: pd.DataFrame) -> str | None:
    """Rate against operations per byte, of ours, with the two limits measured."""
    rows = rows[(rows.contender == OURS) & rows.tflops.gt(0) & rows.gb_per_s.gt(0)]
    if rows.empty:
        return None
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for suite, group in rows.groupby("suite", sort=False):
        axis.plot(1e3 * group.tflops / group.gb_per_s, group.tflops, "o", markersize=5, alpha=0.7, label=suite)
    bandwidth, rate = rows.bandwidth_gb_per_s.iloc[-1], rows.rate_tflops.iloc[-1]
    intensities = [0.1, 1e3 * rate / bandwidth, 1e4]
    axis.plot(intensities, [min(rate, i * bandwidth / 1e3) for i in intensities], "k-", linewidth=1, label="limit")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title="hqq_oft and the limits")
    axis.grid(alpha=0.3)
    axis.legend()
    return _saved(figure, folder, "roofline.png")


def _memory(folder: Path, rows: pd.DataFrame) -> str | None:
    """Memory kept between forward and backward, at the largest number of tokens of the largest layer."""
    rows = rows[(rows.suite == "layer") & (rows.phase == "full") & rows.kept_mib.notna()]
    rows = rows[rows.contender.isin(CONTENDERS) & ~rows.case.str.startswith("OFT on a dense")]
    if rows.empty:
        return None
    case = rows.sort_values(["M", "N"]).case.iloc[-1]
    rows = rows[rows.case == case].drop_duplicates("contender").sort_values("kept_mib", ascending=False)
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.35 * len(rows)), layout="constrained")
    axis.bar_label(axis.barh(rows.contender, rows.kept_mib), fmt="%.1f", padding=3)
    axis.set(xlabel="MiB kept for backward, beyond input and weights", title=case)
    axis.margins(x=0.1)
    return _saved(figure, folder, "memory.png")


def _saved(figure: Any, folder: Path, name: str) -> str:
    figure.savefig(folder / name, dpi=110)
    plt.close(figure)
    return name


Rows = dict[tuple[Any, ...], dict[str, Any]]


def by_key(rows: Iterable[dict[str, Any]]) -> Rows:
    """Measured rows by suite, case, contender, phase and mode."""
    return {tuple(row[key] for key in KEY): row for row in rows if row.get("status") == "measured"}


def target_values(target: dict[str, Any], rows: Rows) -> Iterator[tuple[str, float]]:
    """Every case that has what a target compares, and the value; both sides of a CUDA graph's replay, or eager."""
    axes = [target.get(key, [""]) for key in ("cases", "shapes", "m")]
    axes = itertools.product(*(TARGETS["lists"][axis] if isinstance(axis, str) else axis for axis in axes))
    names = dict.fromkeys(case.format(shape=shape, m=m, main=MAIN) for case, shape, m in axes)
    for case, mode in itertools.product(names, ("graph", "eager", "fresh process")):
        place = {"suite": target["suite"], "case": case, "contender": target["contender"], "phase": target["phase"]}
        other = {key: value.format(main=MAIN) for key, value in target.get("of", {}).items()}
        sides = [place, place | other][: 1 + bool(other)]
        found = [rows.get((*side.values(), mode), {}).get(target.get("column", "p50_us")) for side in sides]
        if all(value is not None and value == value for value in found):  # NaN is an absent column
            yield case, target.get("scale", 1) * found[0] / (found[1] if other else 1)


def verdict(target: dict[str, Any], rows: Rows) -> tuple[str, str]:
    """`reached`, `missed` or `not measured`, and the worst value with its place."""
    most, values = "at_most" in target, {}
    for case, value in target_values(target, rows):
        values.setdefault(case, value)  # of a replay where there is one
    if not values:
        return "not measured", ""
    place, worst = (max if most else min)(values.items(), key=lambda item: item[1])
    good = worst <= target["at_most"] if most else worst >= target["at_least"]
    return "reached" if good else "missed", f"{worst:.3g}{target.get('unit', 'x')} at {place} (of {len(values)})"


def targets_table(kind: str, records: Iterable[dict[str, Any]]) -> str:
    """Every target of the measured suites as a line of Markdown."""
    rows, lines = by_key(records), []
    for target in TARGETS[kind]:
        if target["suite"] in {suite for suite, *_ in rows}:
            state, worst = verdict(target, rows)
            bound = f"≤ {target['at_most']:g}" if "at_most" in target else f"≥ {target['at_least']:g}"
            lines.append((target["text"], bound + target.get("unit", "x"), worst, state))
    return _markdown("target, wanted, worst measured, ", lines)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
