"""Targets and tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report, table

RESULTS = Path(report.__file__).with_name("results")
PHASES = ("decoding", "training",
          "forward", "backward", "full", "dequantize", "dequantize_rotate", "rotate", "rotate without requantizing",
          "training process", "first step beyond the second", "quantize", "requantize", "whole", "merge")  # fmt: skip
NAMES = ("hqq_oft", "hqq_oft, no rotation", "dense", "PEFT OFT", "PEFT LoRA r=16", "GemLite", "PyTorch int4", "PEFT",
         "copy", "HQQ")  # fmt: skip


def row_of(case, contender, p50, phase="forward", mode="eager", suite="layer", **more):
    row = {"suite": suite, "case": case, "contender": contender, "phase": phase, "mode": mode, "status": "measured"}
    return row | {"p50_us": p50} | more


def test_targets_are_judged_by_their_worst_value():
    first = report.TARGETS["cuda"][0]
    assert report.verdict(first, {}) == ("not measured", "")
    where = [f"4096x4096 M={m} {report.MAIN}" for m in (4096, 8192)]
    rows = [row_of(where[0], "hqq_oft", 110, "full"), row_of(where[0], "dense", 100, "full")]
    assert report.verdict(first, report.by_key(rows)) == ("reached", f"1.1x at {where[0]} (of 1)")
    rows += [row_of(where[1], "hqq_oft", 250, "full"), row_of(where[1], "dense", 200, "full")]
    assert report.verdict(first, report.by_key(rows)) == ("missed", f"1.25x at {where[1]} (of 2)")


def test_a_graph_is_compared_with_a_graph():
    decode = f"28672x8192 M=1 {report.MAIN}"
    target = next(target for target in report.TARGETS["cuda"] if "8192-wide" in target["text"])
    rows = [row_of(decode, "hqq_oft", 40, mode="graph"), row_of(decode, "hqq_oft", 90), row_of(decode, "dense", 120)]
    assert list(report.target_values(target, report.by_key(rows)))[:1] == [(decode, 120 / 90)]
    rows.append(row_of(decode, "dense", 110, mode="graph"))
    assert list(report.target_values(target, report.by_key(rows)))[:1] == [(decode, 110 / 40)]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_target_finds_its_rows(device):
    """Rows with every name that the suites of a device produce leave no target unmeasured."""
    columns = {"limit_percent": 50.0, "kept_percent": 0.1, "peak_mib": 300.0}
    rows = [
        row_of(case.name, name, 10.0, phase, suite=suite, **columns)
        for suite in table.SUITES
        for case in table.cases(suite, device)
        for name in NAMES
        for phase in PHASES
    ]
    found = report.by_key(rows)
    missing = [
        target["text"] for target in report.TARGETS[device] if report.verdict(target, found)[0] == "not measured"
    ]
    assert missing == []
    assert report.targets_table(device, rows).count("\n") == 1 + len(report.TARGETS[device])


def test_a_table_has_multiples_of_ours_and_the_last_run_of_each_time():
    first, second = row_of("a", "hqq_oft", 30.0, commit="x"), row_of("a", "dense", 60.0, commit="x")
    found = report.latest([first, second])
    assert list(found.of_ours) == [1.0, 2.0]
    again, other = row_of("a", "hqq_oft", 20.0, commit="x"), row_of("b", "HQQ", 1.0, commit="x")
    found = report.latest([first, second, again, other])
    assert list(found.p50_us) == [60.0, 20.0, 1.0]
    newer = row_of("a", "hqq_oft", 10.0, commit="y")
    assert list(report.latest([first, second, newer, other]).p50_us) == [10.0, 1.0]
    kept = row_of("c", "hqq_oft", 1.0, "full", M=4096, N=4096, K=4096, kept_mib=0.64)
    assert list(report.latest([kept]).kept_percent) == pytest.approx([1.0])


def test_recorded_results_can_be_reported(tmp_path):
    for name in ("raw.jsonl", "environment.json"):
        (tmp_path / name).write_text((RESULTS / "cpu" / name).read_text())
    report.write(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "## Targets" in page
    for plot in ("layers.png", "models.png", "roofline.png", "memory.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
        assert f"]({plot})" in page
