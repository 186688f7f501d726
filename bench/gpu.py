"""Everything a GPU can answer, in order of value and within a time: tests, suites, tables. `make gpu` calls it.

Each part is a process of its own with a share of the time left, and writes as it goes, so that killing this one loses
nothing; the same command resumes it. Results are in `bench/results/<device>/`, and in an archive in --out.
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
from contextlib import suppress
from pathlib import Path

from . import verify
from .environment import ROOT, folder_name

SHARES = (("layer", 0.5), ("ops", 0.45), ("model", 0.7), ("merge", 0.9))  # of the time left
TEST_SECONDS = 150
RESERVE = 20  # for the last tables
COPY_EVERY = 20.0
IMPORT_SECONDS = 15  # before a suite looks at the clock, at worst
INTERRUPT_SECONDS = 10


def run(command: Sequence[str], seconds: float, log: Path, meanwhile: Callable[[], None] = lambda: None) -> int:
    """Run a command with a time limit, its output in a log and the end of it on the screen.

    At the limit it is interrupted, so that it can write what it has, and soon after killed with all its processes.
    `meanwhile` is called now and then while it runs, and at its end.

    Returns:
        Its exit status; 124 if the time ran out.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a command inherits SIG_IGN
    print(f"$ {' '.join(command)}  (at most {seconds:.0f} s)", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"}
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    end, status = time.monotonic() + seconds, None
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, **options)
        try:
            while status is None and time.monotonic() < end:
                with suppress(subprocess.TimeoutExpired):
                    status = process.wait(max(0.0, min(COPY_EVERY, end - time.monotonic())))
                meanwhile()
        finally:
            if status is None:
                stop(process)
    meanwhile()
    print("".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:]), flush=True)
    return 124 if status is None else status


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started: a worker left behind would disturb what is timed next."""
    for way, patience in ((signal.SIGINT, INTERRUPT_SECONDS), (signal.SIGKILL, None)):
        with suppress(subprocess.TimeoutExpired, ProcessLookupError):
            os.killpg(process.pid, way)
            process.wait(patience)


def archive(folders: Sequence[Path], out: Path | None) -> None:
    """The files of the folders as `<out>/gpu.tar.gz`: one file, as a machine that returns results may return few."""
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "gpu.tar.gz.part", "w:gz") as tar:
        for path in (path for folder in folders for path in sorted(folder.glob("*")) if path.is_file()):
            tar.add(path, f"{path.parent.name}/{path.name}")
    (out / "gpu.tar.gz.part").replace(out / "gpu.tar.gz")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=520)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="a folder for an archive of the results and logs")
    parser.add_argument("--small", action="store_true", help="the commands on tiny layers, on any device")
    parser.add_argument("--skip-tests", action="store_true", help="take the last run's report of the tests")
    options = parser.parse_args(argv)
    end = time.monotonic() + options.seconds - RESERVE
    logs = ROOT / "build" / "gpu"
    logs.mkdir(parents=True, exist_ok=True)
    results = logs / "small" if options.small else ROOT / "bench" / "results" / folder_name(options.device)
    junit, statuses = ROOT / "build" / "gpu-operations.xml", {}

    def part(name: str, seconds: float, command: list[str]) -> None:
        statuses[name] = run(command, seconds, logs / f"{name}.log", lambda: archive([results, logs], options.out))

    if not (options.skip_tests or options.small):
        junit.unlink(missing_ok=True)
        part("tests", min(TEST_SECONDS, end - time.monotonic()), verify.command("cuda", junit, "-n", "8"))
    for suite, share in SHARES:
        seconds = (end - time.monotonic()) * share
        command = [sys.executable, "-m", "bench.run", "--suite", suite, "--device", options.device]
        command += ["--out", str(results), "--seconds", f"{seconds - IMPORT_SECONDS:.0f}"]
        command += ["--small", "--sizes", "cuda"] if options.small else ["--junit", str(junit)]
        part(suite, seconds, command)
    part("report", RESERVE, [sys.executable, "-m", "bench.report", str(results)])
    print(", ".join(f"{name}: {'ok' if status == 0 else status}" for name, status in statuses.items()))
    return 1 if any(statuses.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
