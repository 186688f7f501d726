"""Which operations have failing tests: a figure of such an operation is not reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from hqq_oft.ops.table import OPERATIONS

from .environment import ROOT

OPS = [f"tests/ops/test_{name}.py" for name in ("values", "gradients", "operators", "bad_input")]
TESTS = {"cuda": ["tests/gpu/test_operations.py"], "cpu": [*OPS, "tests/native"]}


def command(device: str, junit: Path, *options: str) -> list[str]:
    """What runs the tests of the operations on a kind of device, into a JUnit report."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return [*pytest, f"--junitxml={junit}", *TESTS[device]]


def report(device: str, junit: Path | None) -> Path:
    """The given report, or that of the tests, run now.

    Raises:
        RuntimeError: no test ran.
    """
    if junit is None:
        print("running the tests of the operations first", flush=True)
        junit = ROOT / "build" / f"verify-{device}.xml"
        junit.parent.mkdir(exist_ok=True)
        junit.unlink(missing_ok=True)
        done = subprocess.run(command(device, junit), cwd=ROOT, capture_output=True, text=True)
        if not junit.exists():
            raise RuntimeError(f"the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    if not junit.exists():
        raise RuntimeError(f"{junit} does not exist: the tests of the operations did not run, so nothing is measured")
    return junit


def red_operations(junit: Path) -> frozenset[str]:
    """Operations with a failing test; all of them where a failing test names none, or none passed."""
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
