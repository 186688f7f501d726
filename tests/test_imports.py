"""The packages of `hqq_oft` import downwards only, and the check of `make check` finds a violation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint(folder, *contents):
    """Run `lint-imports` on a copy of the package to which each `(module, code)` is appended."""
    shutil.copytree(ROOT / "hqq_oft", folder / "hqq_oft", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for module, code in contents:
        with (folder / "hqq_oft" / module).open("a") as file:
            file.write(f"\n{code}\n")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_package_keeps_its_contracts(tmp_path):
    done = lint(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("ops/autocast.py", "from ..tuner import layer", "hqq_oft.ops is not allowed to import hqq_oft.tuner"),
        (
            "_config.py",
            "def f():\n    from .ops import backends",
            "hqq_oft._config is not allowed to import hqq_oft.ops",
        ),
        (
            "checkpoint/files.py",
            "from ..tuner import fold",
            "hqq_oft.checkpoint is not allowed to import hqq_oft.tuner",
        ),
        ("tuner/fold.py", "from . import merge", "No import circles between the modules of a package BROKEN"),
        ("new.py", "import torch", "Packages import downwards only BROKEN"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, module, code, message):
    done = lint(tmp_path, (module, code))
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout
