"""Which operations have red tests: a figure of such an operation is not reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from hqq_oft.ops.backends import OPERATIONS

from .environment import ROOT

OPS = [f"tests/ops/test_{name}.py" for name in ("values", "gradients", "operators", "bad_input")]
TESTS = {"cuda": ["tests/gpu/test_operations.py"], "cpu": [*OPS, "tests/native"]}


def command(device: str, report: Path, *options: str) -> list[str]:
    """What runs the tests of the operations on a kind of device, into a JUnit report."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return [*pytest, f"--junitxml={report}", *TESTS[device]]


def run_tests(device: str, report: Path) -> None:
    """Run the tests of the operations on a kind of device, into a JUnit report.

    Raises:
        RuntimeError: no test ran.
    """
    report.unlink(missing_ok=True)
    done = subprocess.run(command(device, report), cwd=ROOT, capture_output=True, text=True)
    if not report.exists():
        raise RuntimeError(f"the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def red_operations(report: Path) -> frozenset[str]:
    """Operations with a failing test; all of them where a failing test names none, or none passed.

    Args:
        report: a JUnit report; of a run that was interrupted, what had ended counts.
    """
    red: set[str] = set()
    passed = 0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            named = _named(f"{case.get('name')}")
            red |= {named} if named else set(OPERATIONS)
        elif case.find("skipped") is None:
            passed += 1
    return frozenset(red if passed else OPERATIONS)


def _named(test: str) -> str | None:
    """The longest operation's name in a test's name: `rotate_backward` rather than `rotate`."""
    found = [operation for operation in OPERATIONS if operation in test]
    return max(found, key=len, default=None)
