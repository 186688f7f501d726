"""Runs the tests of the layer with every operation on interpreted Triton kernels."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("file", ["test_layer.py", "test_merge.py"])
def test_the_layers_tests_pass_on_triton(file):
    environment = {**os.environ, "HQQ_OFT_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--durations=0",
        str(TESTS / file),
    ]
    run = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 100
