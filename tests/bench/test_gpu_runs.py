"""`make gpu`: parts with time limits, and results in one archive."""

from __future__ import annotations

import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench import gpu


def test_a_part_that_runs_too_long_is_stopped_and_its_output_kept(tmp_path, capsys):
    log = tmp_path / "log"
    code = "import time; print('begun', flush=True); time.sleep(60)"
    assert gpu.run([sys.executable, "-c", code], 3, log) == 124
    assert log.read_text().startswith("begun\n")
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 30, log) == 3


def test_stopping_a_part_kills_its_child_processes(tmp_path):
    """Remaining workers of a test run would compete for the GPU with the next measurement."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); p.wait()"
    )
    log, calls = tmp_path / "log", []
    assert gpu.run([sys.executable, "-c", parent], 4, log, lambda: calls.append(1)) == 124
    status = Path(f"/proc/{int(log.read_text().split()[0])}/status")
    end = time.monotonic() + 10  # a killed process takes a moment to exit
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert time.monotonic() < end
    assert calls


@pytest.fixture
def sigint():
    """Sets the SIGINT handler of this process until the end of the test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_a_part_can_be_interrupted_if_the_runner_was_started_with_sigint_ignored(tmp_path, sigint):
    sigint(signal.SIG_IGN)
    code = (
        "import time\ntry: print('started', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('interrupted')"
    )
    assert gpu.run([sys.executable, "-c", code], 3, tmp_path / "log") == 124
    assert (tmp_path / "log").read_text() == "started\ninterrupted\n"


def test_an_interrupted_test_run_still_reports(tmp_path, sigint):
    sigint(signal.default_int_handler)  # a child of a process that ignores SIGINT would ignore it too
    slow = (
        "import pathlib, time\ndef test_linear(): pass\ndef test_rotate(): pathlib.Path({!r}).touch(); time.sleep(60)\n"
    )
    begun, junit = tmp_path / "begun", tmp_path / "junit.xml"
    (tmp_path / "test_slow.py").write_text(slow.format(str(begun)))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", f"--junitxml={junit}", str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while not begun.exists() and time.monotonic() < end:
        time.sleep(0.1)
    gpu.stop(process)
    assert process.poll() is not None
    assert 'name="test_linear"' in junit.read_text()


def test_results_are_packed_in_one_archive(tmp_path):
    for name in ("results", "logs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "raw.jsonl").write_text(name)
    gpu.archive([tmp_path / "results", tmp_path / "logs"], tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["logs/raw.jsonl", "results/raw.jsonl"]
