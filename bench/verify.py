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


def red_operations(device: str, junit: Path | None = None) -> frozenset[str]:
    """Operations with a failing test; all of them if a failing test names none, or none passed.

    Args:
        device: a key of `TESTS`, which run now if no report is given.
        junit: a report of them.
    """
    if junit is None:
        print("running the tests of the operations first", flush=True)
        junit = ROOT / "build" / f"verify-{device}.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            f"--junitxml={junit}",
            *TESTS[device],
        ]
        subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
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
