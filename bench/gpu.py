"""Everything a GPU can answer, in order of value and within a time: tests, suites, tables. `make gpu` calls it.

Each part is a process of its own with what is left of the time, and writes as it goes, so that killing this one loses
nothing; the same command goes on where it was. Everything lands in `bench/results/<device>/`, and a copy in --out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .environment import ROOT, folder_name

# Suite, and the share of the time left that it may take.
SHARES = (("layer", 0.5), ("ops", 0.45), ("model", 0.7), ("merge", 0.9))
TEST_SECONDS = 150
RESERVE = 15  # for the last tables


def run(command: Sequence[str], seconds: float, log: Path) -> int:
    """A command with a time limit, its output on the screen and in a log; 124 where the time ran out."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
    print(f"$ {' '.join(command)}  (at most {seconds:.0f} s)", flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = 124
    print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:]), flush=True)
    return status


def copy(folders: Sequence[Path], out: Path | None) -> None:
    """Copies of the files in the folders, flat; raw rows keep the name of their folder."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for path in folder.glob("*"):
            if path.is_file():
                shutil.copy(path, out / path.name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="a folder for copies of the results and logs")
    parser.add_argument("--dry", action="store_true", help="the commands on small layers, on any device")
    parser.add_argument("--skip-tests", action="store_true", help="take the last run's report of the tests")
    options = parser.parse_args(argv)
    start = time.monotonic()
    logs = ROOT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    results = (logs / "dry") if options.dry else ROOT / "bench" / "results" / folder_name(options.device)
    junit = ROOT / "build" / "gpu-test.xml"
    statuses: dict[str, int] = {}

    def left() -> float:
        return options.seconds - (time.monotonic() - start) - RESERVE

    python = sys.executable
    if not (options.skip_tests or options.dry):
        command = [python, "-m", "gpu.run", "--only", "tests", "--", "-n", "8", "tests/gpu/test_operations.py"]
        statuses["tests"] = run(command, min(TEST_SECONDS, left()), logs / "tests.log")
    for suite, share in SHARES:
        seconds = left() * share
        command = [python, "-m", "bench.run", "--suite", suite, "--device", options.device, "--out", str(results)]
        command += ["--seconds", f"{seconds - 10:.0f}"]
        command += ["--dry", "--profile", "dry"] if options.dry else ["--junit", str(junit)]
        statuses[suite] = run(command, seconds, logs / f"{suite}.log")
        copy([results, logs], options.out)
    statuses["report"] = run([python, "-m", "bench.report", str(results)], RESERVE, logs / "report.log")
    copy([results, logs], options.out)
    print(", ".join(f"{name}: {'ok' if status == 0 else status}" for name, status in statuses.items()))
    return max(statuses.values())


if __name__ == "__main__":
    raise SystemExit(main())
