"""Run suites on a device: `python -m bench.run --suite layer --device cuda --out bench/results/<device>`.

Rows go to `raw.jsonl` case by case: the same command resumes a killed run. Nothing is reported of an operation whose
tests fail.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from tqdm import tqdm

from hqq_oft.ops.table import OPERATIONS

from . import environment, timing
from .cases import Case, Job
from .contenders import OURS, failure
from .model import predicted_seconds
from .table import SUITES, cases
from .timing import Limits, Timing

Row = dict[str, Any]
RAW = "raw.jsonl"
GRAPH_BELOW_US = 100.0  # what an eager call takes less than may be all launches
OPS = [f"tests/ops/test_{name}.py" for name in ("values", "gradients", "operators", "bad_input")]
TESTS = {"cuda": ["tests/gpu/test_operations.py"], "cpu": [*OPS, "tests/native"]}


@dataclass
class Session:
    """Runs cases on one device."""

    device: torch.device
    limits: Limits  # of the device, measured in this run
    budget: float  # seconds for the repeats of one job, in `rounds` turns
    rounds: int = 5
    red: frozenset[str] = frozenset()  # operations whose tests fail; cases that need them are refused
    identity: Row = field(default_factory=dict)  # columns of every row: device, commit, sources, versions
    _kept: tuple[Any, Any] = (None, None)

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, kept until another key is used: cases of one layer share what they need."""
        if self._kept[0] != key:
            self._kept = (None, None)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._kept = (key, make())
        return self._kept[1]

    def run(self, case: Case) -> Iterator[Row]:
        """The case's rows. An error of ours fails the case; one of another contender is that contender's row."""
        red = sorted(case.kind.operations & self.red)
        if red:
            yield self._row(case, Job("all"), status=f"refused: the tests of {', '.join(red)} fail")
            return
        with case.kind.context():
            yield from self._measured(case)

    def _measured(self, case: Case) -> Iterator[Row]:
        able: dict[str, Job] = {}
        for job in case.kind.jobs(self, **case.parameters):
            if job.call is None:
                yield self._row(case, job)
                continue
            try:
                for number in range(job.copies):
                    job.call(number)
                job.columns = {**job.columns, "peak_mib": timing.peak_mib(job.call, self.device)}
                able[f"{job.contender}|{job.phase}"] = job
            except Exception as error:
                if job.contender == OURS:
                    raise
                yield self._row(case, job, status=failure(error))
        calls = {name: (job.call, job.copies) for name, job in able.items()}
        found = timing.take_turns(calls, self.device, self.budget, self.rounds)
        for name, job in able.items():
            yield self._row(case, job, found[name], "eager")
        if self.device.type != "cuda":
            return
        short = {job.phase for name, job in able.items() if job.graph and self._is_short(job, found[name].p50_us)}
        yield from (self._replayed(case, job) for job in able.values() if job.graph and job.phase in short)

    def _is_short(self, job: Job, us: float) -> bool:
        """Whether a call, or the least that the device needs for it, is short."""
        return min(us, self._predicted_us(job) if job.passes else math.inf) < GRAPH_BELOW_US

    def _predicted_us(self, job: Job) -> float:
        return 1e6 * predicted_seconds(job.passes, self.limits.bandwidth, self.limits.rate)

    def _replayed(self, case: Case, job: Job) -> Row:
        try:
            return self._row(case, job, timing.replay(job.call, job.copies, self.budget), "graph")
        except Exception as error:  # not every contender can be captured, and only the capture tells
            return self._row(case, job, None, "graph", status=failure(error))

    def _row(self, case: Case, job: Job, timing: Timing | None = None, mode: str = "", **columns: Any) -> Row:
        row: Row = {"suite": case.kind.suite, "case": case.name, **case.facts, "contender": job.contender}
        row |= {"phase": job.phase, "mode": mode, "status": "measured" if timing else "", **job.columns, **columns}
        if timing is not None:
            row |= timing._asdict()
            if job.passes:
                operations, moved = (sum(getattr(c, what) for c in job.passes) for what in ("operations", "bytes"))
                predicted, us = self._predicted_us(job), timing.p50_us
                row |= {"tflops": 1e-6 * operations / us, "gb_per_s": 1e-3 * moved / us, "predicted_us": predicted}
                row |= {"over_predicted": us / predicted, "limit_percent": 100 * predicted / us}
        row |= {"bandwidth_gb_per_s": self.limits.bandwidth / 1e9, "rate_tflops": self.limits.rate / 1e12}
        return row | self.identity


def red_operations(device: str, junit: Path | None = None) -> frozenset[str]:
    """Operations with a failing test, in a report of them or now; all if a failing test names none, or none passed."""
    if junit is None:
        print("running the tests of the operations first", flush=True)
        junit = environment.ROOT / "build" / f"verify-{device}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={junit}"]
        subprocess.run([*command, *TESTS[device]], cwd=environment.ROOT, stdout=subprocess.DEVNULL)
    red: set[str] = set()
    passed = 0
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            # The longest name counts: `rotate_backward` rather than `rotate`.
            named = max((name for name in OPERATIONS if name in f"{case.get('name')}"), key=len, default=None)
            red |= {named} if named else set(OPERATIONS)
        elif case.find("skipped") is None:
            passed += 1
    return frozenset(red if passed else OPERATIONS)


def read_rows(raw: Path) -> list[Row]:
    """All rows of `raw.jsonl`, without a last line that was cut off."""
    rows = []
    for line in raw.read_text().splitlines() if raw.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def finished(raw: Path, identity: Row) -> set[tuple[str, str]]:
    """Suite and name of the cases that the same code has measured on this device, at least one contender of them."""
    return {
        (row["suite"], row["case"])
        for row in read_rows(raw)
        if all(row.get(key) == value for key, value in identity.items()) and row["status"] == "measured"
    }


def measure(todo: list[Case], session: Session, raw: Path, until: float = math.inf) -> list[str]:
    """Run cases and append their rows; returns what failed. Starts no case after `until` on the monotonic clock."""
    failed = []
    if raw.exists() and raw.read_bytes()[-1:] not in (b"", b"\n"):  # a killed run's last line
        raw.write_text(raw.read_text() + "\n")
    with raw.open("a") as file, tqdm(todo, unit="case", mininterval=0.1 if sys.stderr.isatty() else 10) as progress:
        for case in progress:
            if time.monotonic() > until:
                progress.write(f"out of time: {len(todo) - progress.n} cases are left; the same command resumes there")
                break
            try:
                rows = list(session.run(case))
            except Exception as error:  # one case must not cost the others; the report and the exit status show it
                rows = [{"suite": case.kind.suite, "case": case.name, **case.facts, "status": failure(error)}]
                rows[0] |= session.identity
                session.keep(None, lambda: None)
            for row in rows:
                if row["status"].startswith("failed") and row.get("mode") != "graph":
                    failed.append(f"{row['suite']}: {row['case']}: {row.get('contender', 'all')}: {row['status'][8:]}")
            # In one write, so that a killed run leaves a whole case or a last line without an end.
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    add = parser.add_argument
    add("--suite", nargs="+", choices=SUITES, default=SUITES[:-1], help="default: all but host")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, help="default: bench/results/<device>")
    add("--match", default="", help="only cases with this text in their names")
    add("--again", action="store_true", help="measure cases that are measured already")
    add("--seconds", type=float, default=math.inf, help="start no case after this long")
    add("--budget", type=float, help="seconds for the repeats of one time (default 0.05, CPU 0.5)")
    add("--junit", type=Path, help="a report of the operations' tests, to use instead of running them")
    options = parser.parse_args(argv)
    until = time.monotonic() + options.seconds
    device = torch.device(options.device)
    out = options.out or environment.ROOT / "bench" / "results" / environment.folder_name(str(device))
    out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = environment.describe(str(device))
    identity = {key: facts[key] for key in environment.IDENTITY}
    done = set() if options.again else finished(out / RAW, identity)
    found = [case for suite in options.suite for case in cases(suite, device.type) if options.match in case.name]
    todo = [case for case in found if (case.kind.suite, case.name) not in done]
    needed = any(case.kind.operations for case in todo)
    red = red_operations(device.type, options.junit) if needed else frozenset()
    limits = Limits.measure(device)
    budget = options.budget if options.budget is not None else 0.05 if device.type == "cuda" else 0.5
    facts |= {"bandwidth_gb_per_s": limits.bandwidth / 1e9, "rate_tflops": limits.rate / 1e12}
    (out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    failed = measure(todo, Session(device, limits, budget, red=red, identity=identity), out / RAW, until)
    if importlib.util.find_spec("pandas") is None:
        print("without pandas there are no tables: run `python -m bench.report` where it is installed")
    else:
        importlib.import_module("bench.report").write(out)
    for line in failed:
        print(f"FAILED {line}")
    if red:
        print(f"REFUSED: the tests of {', '.join(sorted(red))} fail; nothing of them was timed")
    return 1 if failed or red else 0


if __name__ == "__main__":
    raise SystemExit(main())
