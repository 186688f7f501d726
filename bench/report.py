"""Tables and plots of what a run has measured: `python -m bench.report bench/results/<device>`.

From `raw.jsonl` and `environment.json` come `results.csv`, `results.json`, the plots and `README.md`.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

from . import targets
from .session import COLUMNS, LORA, Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASELINES = (
    *("dense", "HQQ", "PEFT OFT", "PEFT OFT, HQQ compiled", LORA, "plain PyTorch"),
    *(
        "plain PyTorch, compiled",
        "scratch + rotation of x",
        "GemLite",
        "PyTorch int4",
        "PEFT",
        "copy",
        "copy, new memory",
    ),
)
FLAGGED_FROM = 1.5


def read_rows(raw: Path) -> list[Row]:
    """All rows of `raw.jsonl`; a last line that was cut off is left out."""
    rows = []
    if raw.exists():
        for line in raw.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of each case the rows of its last run, real or dry as the last row of all is."""
    rows = list(rows)
    rows = [row for row in rows if row.get("dry") == rows[-1].get("dry")]
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        key = (row["suite"], row["case"])
        earlier = runs.get(key, [])
        named = [(r.get("contender"), r.get("phase"), r.get("mode")) for r in earlier]
        again = (row.get("contender"), row.get("phase"), row.get("mode")) in named or not row.get("contender")
        again = again or any(_code(r) != _code(row) or not r.get("contender") for r in earlier)
        runs[key] = [row] if again else [*earlier, row]
    return [row for run in runs.values() for row in run]


def _code(row: Row) -> tuple[str, str]:
    return f"{row.get('commit')}", f"{row.get('sources')}"


def with_ratios(rows: list[Row]) -> list[Row]:
    """Each row with `x <baseline>`: that baseline's median time over its own, of the same case, phase and mode."""
    times = {
        (r["suite"], r["case"], r["contender"], r["phase"], r["mode"]): r["p50_us"] for r in rows if r.get("p50_us")
    }
    out = []
    for row in rows:
        row = dict(row)
        for baseline in BASELINES:
            other = times.get((row["suite"], row["case"], baseline, row.get("phase"), row.get("mode")))
            if row.get("p50_us") and other:
                row[f"x {baseline}"] = other / row["p50_us"]
        out.append(row)
    return out


def write(folder: Path) -> None:
    """All files, from what there is; nothing if there is nothing."""
    rows = read_rows(folder / "raw.jsonl")
    if not rows:
        return
    rows = with_ratios(latest(rows))
    columns = [*COLUMNS, *(f"x {baseline}" for baseline in BASELINES)]
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _rounded(value) for key, value in row.items()} for row in rows)
    (folder / "results.json").write_text(json.dumps(rows, indent=0) + "\n")
    environment = json.loads((folder / "environment.json").read_text())
    measured = [row for row in rows if row.get("status") == "measured"]
    plots = [plot(folder, measured) for plot in (_speed, _roofline, _memory)]
    (folder / "README.md").write_text(_page(rows, measured, environment, [plot for plot in plots if plot]))


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _page(rows: list[Row], measured: list[Row], environment: dict[str, Any], plots: list[str]) -> str:
    wanted = targets.GPU if environment["kind"] == "cuda" else targets.CPU
    facts = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton", "peft", "hqq", "transformers"))
    dry = ["**A dry run: every case was called once, nothing was timed, all times are 1 µs.**", ""]
    lines = [
        f"# Measured on {environment['device']}",
        "",
        *(dry if rows[-1].get("dry") else []),
        f"Written by `python -m bench.report`. {environment['threads']} threads, Python {environment['python']}, "
        f"{facts}. Commit `{environment['commit']}`, sources "
        f"`{environment['sources']}`.",
        "",
        f"In the same run a copy moved {environment['bandwidth_gb_per_s']:.1f} GB/s, bytes read and written, and a "
        f"dense bfloat16 product ran at {environment['rate_tflops']:.3g} TFLOP/s; *limit* is the time that the bytes "
        "and operations of `bench/model.py` take at these.",
        "",
        *_of_other_code(measured, environment),
        "## Targets",
        "",
        targets.table(wanted, measured) if measured[0]["suite"] != "host" else "None.",
        "",
    ]
    for suite in ("layer", "ops", "merge", "model", "host"):
        chosen = [row for row in measured if row["suite"] == suite]
        if chosen:
            lines += [f"## Suite {suite}", "", _table(chosen), ""]
    flagged = [row for row in measured if row["contender"] == "hqq_oft" and row.get("over_predicted", 0) > FLAGGED_FROM]
    lines += [f"## Of ours, more than {FLAGGED_FROM} times what bytes and operations predict", ""]
    lines += [_flagged(flagged) if flagged else "None.", ""]
    others = {(row.get("contender"), row["status"]) for row in rows if row.get("status") != "measured"}
    if others:
        lines += ["## Not measured", "", *sorted(f"- {name or 'a case'}: {why}" for name, why in others), ""]
    for plot in plots:
        lines += [f"![{Path(plot).stem}]({plot})", ""]
    return "\n".join(lines)


def _of_other_code(measured: list[Row], environment: dict[str, Any]) -> list[str]:
    """A warning where cases stand from a run of other code."""
    stale = {(row["suite"], row["case"]) for row in measured if _code(row) != _code(environment)}
    return [
        f"**{len(stale)} cases were measured with other code: `commit` and `sources` of their rows say which.**",
        "",
    ][: 2 * bool(stale)]


def _table(rows: list[Row]) -> str:
    lines = [
        "| case | phase | contender | mode | µs | 20 to 80% | TFLOP/s | GB/s | of limit | of ours | kept, MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    ours = {(r["case"], r["phase"], r["mode"]): r["p50_us"] for r in rows if r["contender"] == "hqq_oft"}
    for row in rows:
        mine = ours.get((row["case"], row["phase"], row["mode"]))
        spread = f"{row['p20_us']:.4g} to {row['p80_us']:.4g}" if row.get("p20_us") else ""
        percent = f"{row['limit_percent']:.0f}%" if row.get("limit_percent") else ""
        cells = [row["case"], row["phase"], row["contender"], row["mode"], f"{row['p50_us']:.4g}", spread]
        cells += [_number(row.get("tflops")), _number(row.get("gb_per_s")), percent]
        cells += [f"{row['p50_us'] / mine:.2f}x" if mine else "", _number(row.get("kept_mib"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _flagged(rows: list[Row]) -> str:
    lines = ["| case | phase | mode | µs | predicted µs | ratio |", "|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row["over_predicted"]):
        lines.append(
            f"| {row['suite']}: {row['case']} | {row['phase']} | {row['mode']} | {row['p50_us']:.4g} | "
            f"{row['predicted_us']:.4g} | {row['over_predicted']:.2f} |"
        )
    return "\n".join(lines)


def _speed(folder: Path, rows: list[Row]) -> str | None:
    """Time against M, one panel per shape and phase, of the main setting; replayed from a CUDA graph where it was."""
    rows = [r for r in rows if r["suite"] == "layer" and r["case"].endswith(targets.MAIN)]
    ordered = sorted(rows, key=lambda r: r["mode"] == "graph")
    rows = list({(r["case"], r["contender"], r["phase"]): r for r in ordered}.values())
    panels = list(
        dict.fromkeys((r["N"], r["K"], phase) for phase in ("forward", "full") for r in rows if r["phase"] == phase)
    )
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.5 * columns, 4 * lines), squeeze=False)
    for axis, (n, k, phase) in zip(axes.flat, panels, strict=False):
        here = [r for r in rows if (r["N"], r["K"], r["phase"]) == (n, k, phase)]
        for contender in dict.fromkeys(r["contender"] for r in here):
            points = sorted((r["M"], r["p50_us"]) for r in here if r["contender"] == contender)
            width = 2.2 if contender == "hqq_oft" else 1
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=width, label=contender)
        axis.set(xscale="log", yscale="log", title=f"{n}x{k}, {phase}", xlabel="tokens", ylabel="µs")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=7)
    return _saved(figure, folder, "speed.png")


def _roofline(folder: Path, rows: list[Row]) -> str | None:
    """Rate against operations per byte, of ours, with the two limits measured."""
    rows = [r for r in rows if r["contender"] == "hqq_oft" and r.get("tflops") and r.get("gb_per_s")]
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(7, 5))
    for suite in dict.fromkeys(r["suite"] for r in rows):
        points = [(1e3 * r["tflops"] / r["gb_per_s"], r["tflops"]) for r in rows if r["suite"] == suite]
        axis.plot(*zip(*points, strict=True), "o", markersize=4, label=suite)
    bandwidth, rate = rows[-1]["bandwidth_gb_per_s"], rows[-1]["rate_tflops"]
    intensities = [0.1, 1e3 * rate / bandwidth, 1e4]
    axis.plot(intensities, [min(rate, i * bandwidth / 1e3) for i in intensities], "k-", linewidth=1, label="limit")
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title="hqq_oft and the limits")
    axis.grid(alpha=0.3)
    axis.legend()
    return _saved(figure, folder, "roofline.png")


def _memory(folder: Path, rows: list[Row]) -> str | None:
    """Memory kept between forward and backward, of the largest number of tokens of the first shape."""
    rows = [r for r in rows if r["suite"] == "layer" and r["phase"] == "full" and r.get("kept_mib") is not None]
    if not rows:
        return None
    case = max((r for r in rows), key=lambda r: r["M"])["case"]
    rows = [r for r in rows if r["case"] == case]
    figure, axis = plt.subplots(figsize=(7, 4))
    axis.barh([r["contender"] for r in rows], [r["kept_mib"] for r in rows])
    axis.set(xlabel="MiB kept for backward, beyond input and weights", title=case)
    axis.grid(alpha=0.3, axis="x")
    return _saved(figure, folder, "memory.png")


def _saved(figure: Any, folder: Path, name: str) -> str:
    figure.tight_layout()
    figure.savefig(folder / name, dpi=110)
    plt.close(figure)
    return name


if __name__ == "__main__":
    write(Path(sys.argv[1]))
