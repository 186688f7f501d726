"""`make gpu-test`: the tests of this folder, compute-sanitizer where it is found, and a summary in build/gpu-test.txt.

The exit status is 0 if tests ran, all passed, and no sanitizer found an error.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO
from xml.etree import ElementTree

import torch

from bench.environment import commit, version

from . import available

BUILD = Path("build")


def logged(command: list[str], log: Path, **environment: str) -> int:
    """Run a command; write its output to the terminal and to a file."""
    with (
        log.open("w") as file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **environment},
        ) as process,
    ):
        try:
            copy(process.stdout, file)
        except KeyboardInterrupt:
            # the command got the signal too: keep its pipe open until it has written its report
            copy(process.stdout, file)
            raise
    return process.returncode


def copy(lines: Iterable[str], file: TextIO) -> None:
    for line in lines:
        print(line, end="", flush=True)
        file.write(line)


def tests(arguments: list[str]) -> tuple[bool, list[str]]:
    """Run pytest. Returns whether it succeeded, and lines for the summary."""
    xml = BUILD / "gpu-test.xml"
    xml.unlink(missing_ok=True)
    command = [sys.executable, "-u", "-m", "pytest", "tests/gpu", f"--junitxml={xml}", *arguments]
    status = logged(command, BUILD / "gpu-test.log")
    if not xml.exists():
        return False, [f"tests: none ran (pytest ended with status {status})"]
    suite = ElementTree.parse(xml).getroot().find("testsuite")
    count = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    lines = [
        f"tests: {passed} passed, {count['failures']} failed, {count['errors']} errors, {count['skipped']} skipped, "
        f"in {float(suite.get('time')):.0f} s"
    ]
    reasons: dict[str, int] = {}
    for case in suite.iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            lines.append(f"  failed: {case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            reason = case.find("skipped").get("message")
            reasons[reason] = reasons.get(reason, 0) + 1
    failed = len(lines) - 1
    if failed > 30:
        lines[31:] = [f"  and {failed - 30} more"]
    if available.reason_to_skip():
        lines.append(f"  not collected: {available.reason_to_skip()}")
    lines += [f"  skipped {number}: {reason}" for reason, number in reasons.items()]
    return status == 0 and passed > 0, lines


def sanitizers() -> tuple[bool, list[str]]:
    """Run compute-sanitizer. Returns whether it succeeded, and lines for the summary."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        return True, ["sanitizers: not run, compute-sanitizer was not found"]
    if not torch.cuda.is_available():
        return True, ["sanitizers: not run, there is no GPU"]
    well, lines = True, []
    for tool in ("memcheck", "racecheck"):
        log = BUILD / f"gpu-{tool}.log"
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "gpu.sanitize"]
        # a separate allocation for each tensor, so that out-of-bounds reads are detected
        status = logged(command, log, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        last = [line.strip() for line in log.read_text().splitlines() if line.startswith("=========")][-1:]
        lines.append(f"{tool}: {'clean' if status == 0 else f'status {status}'} {' '.join(last)}")
        well = well and status == 0
    return well, lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu.run", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for copies of the summary and the logs")
    parser.add_argument("--only", choices=["tests", "sanitizers"], help="do half of it")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    options = parser.parse_args()
    # Started in the background, this process and its children would ignore SIGINT and could not end with a report.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if importlib.util.find_spec("hqq_oft.triton_kernels") is None:
        raise SystemExit("hqq_oft.triton_kernels is not found: first `pip install --no-deps --no-build-isolation -e .`")
    BUILD.mkdir(exist_ok=True)
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    summary = [
        f"device: {', '.join(devices) or 'none that torch can use'}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda}), triton {version('triton')}, hqq {version('hqq')}, "
        f"peft {version('peft')}, Python {platform.python_version()}",
        f"commit: {commit()}",
        "",
    ]
    well = True
    if options.only != "sanitizers":
        well, lines = tests(options.arguments)
        summary += lines
    if options.only != "tests":
        clean, lines = sanitizers()
        well, summary = well and clean, summary + lines
    text = "\n".join(summary) + "\n"
    (BUILD / "gpu-test.txt").write_text(text)
    print(f"\n{text}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        for file in BUILD.glob("gpu-*"):
            shutil.copy(file, options.out)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
