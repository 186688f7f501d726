"""Everything a GPU can answer, in order of value and within a time: tests, suites, tables. `make gpu` calls it.

Each part is a process of its own with what is left of the time, and writes as it goes, so that killing this one loses
nothing; the same command goes on where it was. Everything lands in `bench/results/<device>/`, and an archive of it,
renewed while a part runs, in --out.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import verify
from .environment import ROOT, folder_name

# Suite, and the share of the time left that it may take.
SHARES = (("layer", 0.5), ("ops", 0.45), ("model", 0.7), ("merge", 0.9))
TEST_SECONDS = 150
RESERVE = 20  # for the last tables
COPY_EVERY = 20.0
IMPORT_SECONDS = 15  # before a suite looks at the clock, at worst
INTERRUPT_SECONDS = 10


def run(command: Sequence[str], seconds: float, log: Path, meanwhile: Callable[[], None] | None = None) -> int:
    """A command with a time limit, its output in a log and the end of it on the screen.

    Args:
        command: what to run; the processes that it starts end with it.
        seconds: how long it may take; then it is interrupted, so that it can write what it has, and soon after killed.
        log: where its output goes.
        meanwhile: called now and then while it runs, and at its end.

    Returns:
        Its exit status; 124 where the time ran out.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a command inherits SIG_IGN
    print(f"$ {' '.join(command)}  (at most {seconds:.0f} s)", flush=True)
    end = time.monotonic() + seconds
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = _wait(process, end, meanwhile)
        finally:
            if process.poll() is None:
                _stop(process)
    if meanwhile:
        meanwhile()
    print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:]), flush=True)
    return status


def _wait(process: subprocess.Popen[bytes], end: float, meanwhile: Callable[[], None] | None) -> int:
    while time.monotonic() < end:
        try:
            return process.wait(max(0.0, min(COPY_EVERY, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            if meanwhile:
                meanwhile()
    return 124


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started: a worker left behind would run beside what is timed next."""
    for way, patience in ((signal.SIGINT, INTERRUPT_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, way)
            process.wait(patience)
        except (subprocess.TimeoutExpired, ProcessLookupError):
            continue


def archive(folders: Sequence[Path], out: Path | None) -> None:
    """The files of the folders as `<out>/gpu.tar.gz`: one file, as a place that collects results may take but a few."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    fresh = out / "gpu.tar.gz.part"
    with tarfile.open(fresh, "w:gz") as tar:
        for folder in folders:
            for path in sorted(folder.glob("*")):
                if path.is_file():
                    tar.add(path, f"{folder.name}/{path.name}")
    fresh.replace(out / "gpu.tar.gz")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="a folder for an archive of the results and logs")
    parser.add_argument("--dry", action="store_true", help="the commands on small layers, on any device")
    parser.add_argument("--skip-tests", action="store_true", help="take the last run's report of the tests")
    options = parser.parse_args(argv)
    start = time.monotonic()
    logs = ROOT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    results = (logs / "dry") if options.dry else ROOT / "bench" / "results" / folder_name(options.device)
    junit = ROOT / "build" / "gpu-operations.xml"
    statuses: dict[str, int] = {}

    def left() -> float:
        return options.seconds - (time.monotonic() - start) - RESERVE

    python = sys.executable

    def save() -> None:
        archive([results, logs], options.out)

    if not (options.skip_tests or options.dry):
        junit.unlink(missing_ok=True)
        command = verify.command("cuda", junit, "-n", "8")
        statuses["tests"] = run(command, min(TEST_SECONDS, left()), logs / "tests.log", save)
    for suite, share in SHARES:
        seconds = left() * share
        command = [python, "-m", "bench.run", "--suite", suite, "--device", options.device, "--out", str(results)]
        command += ["--seconds", f"{seconds - IMPORT_SECONDS:.0f}"]
        command += ["--dry", "--profile", "dry"] if options.dry else ["--junit", str(junit)]
        statuses[suite] = run(command, seconds, logs / f"{suite}.log", save)
    statuses["report"] = run([python, "-m", "bench.report", str(results)], RESERVE, logs / "report.log", save)
    print(", ".join(f"{name}: {'ok' if status == 0 else status}" for name, status in statuses.items()))
    return 1 if any(statuses.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
