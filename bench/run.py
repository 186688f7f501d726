"""Run suites on a device: `python -m bench.run --suite layer --device cuda --out bench/results/<device>`.

Rows go to `raw.jsonl` case by case, so that a run can be killed at any point and goes on where it was; tables and plots
are written at the end, or by `python -m bench.report`. Nothing is reported of an operation whose tests are red.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import environment, limits, report, verify
from .session import Case, Row, Session, failure
from .suites import PROFILES, SUITES, cases

RAW = "raw.jsonl"


def finished(raw: Path, identity: Row) -> set[tuple[str, str]]:
    """Suite and name of the cases that this very code has measured on this device, without those that failed whole.

    A contender that failed alone fails again: its case is not measured anew for it.
    """
    return {
        (row["suite"], row["case"])
        for row in report.read_rows(raw)
        if all(row.get(key) == value for key, value in identity.items()) and row["status"] == "measured"
    }


def end_last_line(raw: Path) -> None:
    """End a line that a killed run has left unfinished, so that the next row does not become part of it."""
    if raw.exists() and raw.stat().st_size and not raw.read_bytes().endswith(b"\n"):
        with raw.open("a") as file:
            file.write("\n")


def measure(todo: list[Case], session: Session, raw: Path, until: float) -> list[str]:
    """Run cases and append their rows; what failed, in words. Stops at `until`, on the monotonic clock."""
    failed = []
    end_last_line(raw)
    with raw.open("a") as file, tqdm(todo, unit="case", mininterval=0.1 if sys.stderr.isatty() else 10) as progress:
        for case in progress:
            if time.monotonic() > until:
                progress.write(f"out of time: {len(todo) - progress.n} cases are left; the same command goes on there")
                break
            progress.set_description(f"{case.suite}: {case.name}"[:60], refresh=False)
            try:
                rows = list(session.run(case))
            except Exception as error:  # one case must not cost the others; the report shows it, the exit status too
                failed.append(f"{case.suite}: {case.name}: {type(error).__name__}: {error}")
                rows = [{"suite": case.suite, "case": case.name, **case.facts, "status": failure(error)}]
                rows[0] |= session.identity
                session.keep(None, lambda: None)
            failed += [
                f"{case.suite}: {case.name}: {row['contender']}: {row['status'].removeprefix('failed: ')}"
                for row in rows
                if "contender" in row and row["status"].startswith("failed")
            ]
            # At once, so that a case is there whole or, where the process is killed, as a last line without an end.
            file.write("".join(json.dumps(row) + "\n" for row in rows))
            file.flush()
    return failed


def red(device: torch.device, junit: Path | None, dry: bool) -> frozenset[str]:
    """Operations that must not be reported; none in a dry run, which reports no time."""
    if dry:
        return frozenset()
    if junit is not None and not junit.exists():
        raise SystemExit(f"{junit} is not there: the tests of the operations did not run, so nothing is measured")
    if junit is None:
        junit = environment.ROOT / "build" / f"verify-{device.type}.xml"
        junit.parent.mkdir(exist_ok=True)
        print("running the tests of the operations first", flush=True)
        verify.run_tests(device.type, junit)
    return verify.red_operations(junit)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    parser.add_argument("--suite", nargs="+", choices=list(SUITES), default=[*SUITES][:4])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: bench/results/<device>")
    parser.add_argument("--profile", choices=list(PROFILES), help="sizes; default: those for the device")
    parser.add_argument("--match", default="", help="only cases with this text in their names")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after this long")
    parser.add_argument("--budget", type=float, help="seconds for the repeats of one time (default 0.05, CPU 0.5)")
    parser.add_argument("--junit", type=Path, help="a report of the operations' tests, in place of running them")
    parser.add_argument("--again", action="store_true", help="measure anew what is measured")
    parser.add_argument("--dry", action="store_true", help="call everything once and time nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    until = time.monotonic() + options.seconds
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    profile = PROFILES[options.profile or ("gpu" if gpu else "cpu")]
    out = options.out or environment.ROOT / "bench" / "results" / environment.folder_name(str(device))
    out.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = environment.describe(str(device))
    identity = {key: facts[key] for key in ("device", "commit", "sources", "torch", "triton")} | {"dry": options.dry}
    todo = [case for suite in options.suite for case in cases(suite, profile) if options.match in case.name]
    refused = red(device, options.junit, options.dry or not any(case.operations for case in todo))
    dtype = torch.bfloat16
    session = Session(
        device,
        limits.measure(device, dtype, small=options.dry),
        options.budget or (0.05 if gpu else 0.5),
        refused,
        identity,
        options.dry,
    )
    facts |= {"bandwidth_gb_per_s": session.limits.bandwidth / 1e9, "rate_tflops": session.limits.rate / 1e12}
    (out / "environment.json").write_text(json.dumps(facts, indent=1) + "\n")
    done = finished(out / RAW, identity) if not options.again else set()
    todo = [case for case in todo if (case.suite, case.name) not in done]
    failed = measure(todo, session, out / RAW, until)
    report.write(out)
    for line in failed:
        print(f"FAILED {line}")
    if refused:
        print(f"REFUSED: the tests of {', '.join(sorted(refused))} fail; nothing of them was timed")
    return 1 if failed or refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
