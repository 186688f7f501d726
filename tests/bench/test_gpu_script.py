"""`make gpu`'s script: every suite, time limits, results in one archive; with a Python that only reports its calls."""

from __future__ import annotations

import os
import subprocess
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAKE = """#!/bin/bash
echo "$@" >> {calls}
case "$*" in *"--suite layer"*) sleep 60 & echo $! > {child}; wait;; *"--suite merge"*) exit 3;; esac
"""


def test_parts_run_within_their_time_and_results_are_archived(tmp_path):
    calls, child, python = tmp_path / "calls", tmp_path / "child", tmp_path / "python"
    python.write_text(FAKE.format(calls=calls, child=child))
    python.chmod(0o755)
    results = tmp_path / "results"
    results.mkdir()
    (results / "raw.jsonl").touch()
    variables = {"PYTHON": str(python), "SECONDS_LEFT": "30", "OUT": str(tmp_path / "out"), "RESULTS": str(results)}
    begin = time.monotonic()
    done = subprocess.run(
        [ROOT / "bench" / "gpu.sh", "--match", "x"], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert time.monotonic() - begin < 30
    assert done.returncode == 1
    states = [line for line in done.stdout.splitlines() if ": ok" in line or ": failed" in line]
    assert states == [
        "check: ok",
        "tests: ok",
        "layer: failed with 124",
        "ops: ok",
        "model: ok",
        "merge: failed with 3",
        "report: ok",
    ]
    assert all("--match x" in line for line in calls.read_text().splitlines() if "bench.run" in line)
    assert "check --device cuda" in calls.read_text().splitlines()[0]
    status = Path(f"/proc/{child.read_text().strip()}/status")  # what a stopped part has started is stopped as well
    end = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert time.monotonic() < end
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert {"raw.jsonl", "check.log", "layer.log", "report.log"} <= names
