"""Writes the table of results, build/architectures.md."""

from __future__ import annotations

from pathlib import Path

TABLE = Path(__file__).parents[2] / "build" / "architectures.md"


def pytest_terminal_summary(terminalreporter):
    rows = []
    for outcome in ("passed", "skipped", "failed", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            if "tests/architectures/" in report.nodeid and (report.when == "call" or outcome == "skipped"):
                name = report.nodeid.partition("[")[2].rstrip("]")
                found = dict(report.user_properties)
                reason = report.longrepr[2] if outcome == "skipped" else found.get("dense", "")
                rows.append(f"| {name} | {outcome} | {found.get('quantized', '')} | {reason} |")
    head = ["| architecture | whole job | quantized | layers that stay dense |", "|---|---|---|---|"]
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text("\n".join([*head, *sorted(rows)]) + "\n", "utf-8")
    terminalreporter.write_line(f"{len(rows)} architectures: {TABLE}")
