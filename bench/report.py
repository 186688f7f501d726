"""Tables and plots of what a run has measured: `python -m bench.report bench/results/<device>`.

From `raw.jsonl` and `environment.json` come `README.md`, its plots, and `results.csv` with all columns.
"""

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
PICKED = {OURS: "tab:blue", DENSE: "tab:green", PEFT: "tab:red", LORA: "tab:orange", HQQ: "tab:purple",
          "PyTorch int4": "tab:brown", "GemLite": "tab:brown"}  # fmt: skip
PLOTTED_TOKENS = (1, 16, 512, 4096)


def latest(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Of each case the rows of the code that measured it last, and of each time the last.

    Derived: `kept_percent`, memory kept for backward as a share of the layer's input and output; `tokens_per_s`; and
    `of <contender>`, its time in that of ours.
    """
    table = pd.DataFrame(rows)
    table = table.reindex(columns=table.columns.union([*KEY, *CODE, *NUMBERS, "note"], sort=False))
    table = table.astype(dict.fromkeys(NUMBERS, float) | dict.fromkeys(CODE, object)).fillna(dict.fromkeys(CODE, ""))
    # Rows without a contender are of cases that failed as a whole; a later run may have measured them.
    last = table.groupby(["suite", "case"])[[*CODE, "status"]].transform("last")
    same = (table[CODE] == last[CODE]).all(axis=1)
    table = table[same & (table.contender.notna() | (table.status == last.status))]
    table = table.drop_duplicates(KEY, keep="last").copy()
    table["kept_percent"] = 100 * table.kept_mib * 2**20 / (2 * table.M * (table.N + table.K))
    table["tokens_per_s"] = 1e6 * table.tokens / table.p50_us
    mine = table[table.contender == OURS].drop_duplicates(["suite", "case", "phase", "mode"])
    mine = mine[["suite", "case", "phase", "mode", "p50_us"]].rename(columns={"p50_us": "ours_us"})
    table = table.merge(mine, on=["suite", "case", "phase", "mode"], how="left")
    table["of_ours"] = table.p50_us / table.ours_us
    return table


def write(folder: Path) -> None:
    """All files, from the rows so far."""
    rows = read_rows(folder / "raw.jsonl")
    if not rows:
        return
    table = latest(rows)
    table.to_csv(folder / "results.csv", index=False, float_format="%.5g")
    environment = json.loads((folder / "environment.json").read_text())
    measured = table[table.status == "measured"]
    plots = [
        _times(folder, measured[_plotted(measured)], "layers.png", "one layer, 4 bits, block 32, bfloat16"),
        _times(folder, measured[measured.suite == "model"], "models.png", "whole models"),
        _times(folder, measured[measured.suite == "host"], "host.png", "overhead of the host"),
        _roofline(folder, measured),
        _memory(folder, measured),
    ]
    (folder / "README.md").write_text(_page(table, measured, environment, [plot for plot in plots if plot]))


def _page(table: pd.DataFrame, measured: pd.DataFrame, environment: dict[str, Any], plots: list[str]) -> str:
    facts = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "peft", "hqq", "transformers"))
    kept = environment.get("allocator")
    allocator = (
        [f"Every contender ran in processes with `{kept}`, so that memory is not mapped anew.", ""] if kept else []
    )
    lines = [
        f"# Measured on {environment['device']}",
        "",
        "Written by `python -m bench.report`, which also writes all columns to `results.csv`. "
        f"{environment['threads']} threads, Python {environment['python']}, {facts}. Commit `{environment['commit']}`, "
        f"sources `{environment['sources']}`.",
        "",
        f"In the same run a copy moved {environment['bandwidth_gb_per_s']:.1f} GB/s, bytes read and written, and a "
        f"dense bfloat16 product ran at {environment['rate_tflops']:.3g} TFLOP/s; *limit* is the time that the bytes "
        "and operations of `bench/model.py` take at these.",
        "",
        *allocator,
    ]
    stale = measured[(measured[CODE] != [environment[key] for key in CODE]).any(axis=1)]
    if len(stale):
        count = len(stale.drop_duplicates(["suite", "case"]))
        lines += [
            f"**{count} cases were measured with other code, which `commit` and `sources` of their rows name.**",
            "",
        ]
    goals = targets_table(environment["kind"], measured.to_dict("records"))
    lines += ["## Targets", "", goals, ""] if goals.count("\n") > 1 else []
    for plot in plots:
        lines += [f"![{Path(plot).stem}]({plot})", ""]
    for suite in measured.suite.unique():
        lines += [f"## Suite {suite}", "", _suite(measured[measured.suite == suite]), ""]
    others = table[table.status != "measured"]
    if len(others):
        reasons = dict.fromkeys(f"- {row.contender}: {row.status}" for row in others.itertuples())
        lines += ["## Not measured", "", *reasons, ""]
    if "profile" in measured:
        for row in measured[measured.profile.notna()].itertuples():
            lines += [
                f"## Where the time of {row.contender} goes: {row.case}",
                "",
                "| operator | ms | calls |",
                "|---|---|---|",
            ]
            lines += [*(f"| {name} | {own:.2f} | {calls} |" for name, own, calls in row.profile), ""]
    return "\n".join(lines)


def _suite(rows: pd.DataFrame) -> str:
    """One line per case and phase: the time of ours, and the others' as multiples of it."""
    lines = ["| case | phase | ours | 20 to 80% | of limit | others, in times of ours |", "|---|---|---|---|---|---|"]
    for (case, phase, mode), group in rows.groupby(["case", "phase", "mode"], sort=False):
        ours, others = group[group.contender == OURS], group[group.contender != OURS]
        first = (ours if len(ours) else group).iloc[0]
        name = "" if len(ours) else f"{first.contender}: "
        rate = "" if pd.isna(first.tokens_per_s) else f", {first.tokens_per_s:.4g} tokens/s"
        others = others if len(ours) else others.iloc[1:]
        multiples = ", ".join(
            f"{row.contender} {row.of_ours:.3g}" if len(ours) else f"{row.contender} {_time(row.p50_us)}"
            for row in others.itertuples()
        )
        spread = "" if pd.isna(first.p20_us) else f"{_time(first.p20_us)} to {_time(first.p80_us)}"
        limit = "" if pd.isna(first.limit_percent) else f"{first.limit_percent:.0f}%"
        where = phase if mode == "eager" else f"{phase}, {mode}"
        lines.append(f"| {case} | {where} | {name}{_time(first.p50_us)}{rate} | {spread} | {limit} | {multiples} |")
    notes = rows[rows.note.notna()].drop_duplicates(["contender", "note", "N"])
    return "\n".join([*lines, "", *(f"- {r.contender}, {r.N:.0f}x{r.K:.0f}: {r.note}" for r in notes.itertuples())])


def _time(us: float) -> str:
    return f"{us:.3g} µs" if us < 1e3 else f"{us / 1e3:.3g} ms" if us < 1e6 else f"{us / 1e6:.3g} s"


def _plotted(rows: pd.DataFrame) -> pd.Series:
    """Layers in the main setting at a few numbers of tokens, without the backward alone."""
    main = rows.case.str.endswith(MAIN) & rows.M.isin(PLOTTED_TOKENS) & rows.phase.isin(["forward", "full"])
    return main & (rows.suite == "layer")


def _times(folder: Path, rows: pd.DataFrame, name: str, title: str) -> str | None:
    """A line of dots for each case: ours, what a user would pick instead, and the limit of bytes and operations."""
    rows = rows[rows.contender.isin(PICKED)].sort_values("mode", key=lambda mode: mode != "graph", kind="stable")
    rows = rows.drop_duplicates(["case", "contender", "phase"])  # of a CUDA graph's replay where there is one
    groups = [group for _, group in rows.groupby(["case", "phase"], sort=False) if len(group) > 1]
    if not groups:
        return None
    groups.sort(key=lambda group: (group.phase.iloc[0] == "full", group.N.iloc[0], group.K.iloc[0], group.M.iloc[0]))
    figure, axis = plt.subplots(figsize=(9.5, 1.6 + 0.38 * len(groups)), layout="constrained")
    for height, group in enumerate(reversed(groups)):
        axis.axhline(height, color="0.9", zorder=0)
        for row in group.itertuples():
            mine = row.contender == OURS
            axis.plot(row.p50_us / 1e3, height, "o", color=PICKED[row.contender], markersize=12 if mine else 6,
                      zorder=2 if mine else 3)  # fmt: skip
            if mine and row.predicted_us == row.predicted_us:
                axis.plot(
                    row.predicted_us / 1e3, height, "|", color="black", markersize=16, markeredgewidth=2, zorder=4
                )
    axis.set_ylim(-0.6, len(groups) - 0.4)
    labels = [_label(group.iloc[0]) for group in reversed(groups)]
    axis.set_yticks(range(len(groups)), labels)
    axis.set(xscale="log", xlabel="time, ms (logarithmic)", title=title)
    seen = [contender for contender in PICKED if contender in {c for group in groups for c in group.contender}]
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=PICKED[c], markersize=7, label=c) for c in seen]
    if any(group.predicted_us.notna().any() for group in groups):
        handles.append(
            plt.Line2D([], [], marker="|", linestyle="", color="black", markersize=14, label="limit of ours")
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    axis.grid(axis="x", alpha=0.3)
    return _saved(figure, folder, name)


def _label(row: Any) -> str:
    if row.suite != "layer":
        return f"{row.case}" if row.suite == "host" or row.phase in row.case else f"{row.case}: {row.phase}"
    work = "forward and backward" if row.phase == "full" else "forward"
    return f"{row.N:.0f}x{row.K:.0f}, {row.M:.0f} token{'s' if row.M > 1 else ''}, {work}"


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
    rows = rows[
        (rows.suite == "layer") & (rows.phase == "full") & rows.kept_mib.notna() & rows.contender.isin(CONTENDERS)
    ]
    if rows.empty:
        return None
    case = rows.sort_values(["M", "N"]).case.iloc[-1]
    rows = rows[rows.case == case].drop_duplicates("contender").sort_values("kept_mib", ascending=False)
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.35 * len(rows)), layout="constrained")
    bars = axis.barh(rows.contender, rows.kept_mib, color=[PICKED.get(c, "0.7") for c in rows.contender])
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.set(xlabel="MiB kept for backward, beyond input and weights", title=case)
    axis.margins(x=0.1)
    return _saved(figure, folder, "memory.png")


def _saved(figure: Any, folder: Path, name: str) -> str:
    figure.savefig(folder / name, dpi=110)
    plt.close(figure)
    return name


# --- Targets ---------------------------------------------------------------------------------------------------------


Rows = dict[tuple[Any, ...], dict[str, Any]]


def by_key(rows: Iterable[dict[str, Any]]) -> Rows:
    """Measured rows by suite, case, contender, phase and mode."""
    return {tuple(row[key] for key in KEY): row for row in rows if row.get("status") == "measured"}


def target_cases(target: dict[str, Any]) -> list[str]:
    """Names of the cases that a target is about."""
    axes = [target.get(key, [""]) for key in ("cases", "shapes", "m")]
    axes = itertools.product(*(TARGETS["lists"][axis] if isinstance(axis, str) else axis for axis in axes))
    return list(dict.fromkeys(case.format(shape=shape, m=m, main=MAIN) for case, shape, m in axes))


def target_values(target: dict[str, Any], rows: Rows) -> Iterator[tuple[str, float]]:
    """Every case that has what a target compares, and the value; both sides of a CUDA graph's replay, or eager."""
    for case, mode in itertools.product(target_cases(target), ("graph", "eager", "fresh process")):
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
    rows = by_key(records)
    lines = ["| target | wanted | worst measured | |", "|---|---|---|---|"]
    for target in TARGETS[kind]:
        if target["suite"] in {suite for suite, *_ in rows}:
            state, worst = verdict(target, rows)
            bound = f"≤ {target['at_most']:g}" if "at_most" in target else f"≥ {target['at_least']:g}"
            lines.append(f"| {target['text']} | {bound}{target.get('unit', 'x')} | {worst} | {state} |")
    return "\n".join(lines)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
