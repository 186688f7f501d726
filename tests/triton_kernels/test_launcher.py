"""A machine on which Triton cannot build its launcher, such as a container image without a C compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import logging, os, sys, types
from unittest import mock
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
import torch
from tests import stub_gpu
stub_gpu.build()  # a driver with a device
os.environ["PATH"] = sys.argv[1]
import triton
from triton.backends.nvidia.driver import CudaDriver
from torch._subclasses.fake_tensor import FakeTensorMode
from hqq_oft import BackendError
from hqq_oft.ops import backends, reference
from hqq_oft.triton_kernels import _launch
triton.knobs.nvidia.libcuda_path = str(stub_gpu.LIBRARY.parent)
CudaDriver.is_active = staticmethod(lambda: True)
backends.warn_if_unverified = lambda device: None  # which asks torch for the device's name
_launch._properties = lambda index: types.SimpleNamespace(major=9, name="", multi_processor_count=132)
with FakeTensorMode():
    args = torch.empty(4, 32, device="cuda"), torch.empty(2, 16, 16, device="cuda"), None, False
for _ in range(2):
    print(backends.plan("rotate", "auto", args) is reference.rotate)
try:
    backends.plan("rotate", "triton", args)
except BackendError as error:
    print(error)
"""

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
]


def run(folder, path):
    """The program's output with the programs in `path`, and an empty cache."""
    environment = {k: v for k, v in os.environ.items() if k != "CC"}
    environment |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "cache"), "CC": "cc"}
    command = [sys.executable, "-c", "import os; os.environ.pop('CC')\n" + PROGRAM, path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_compiler_auto_warns_once_and_uses_the_reference(tmp_path):
    warning, first, second, error = run(tmp_path, str(tmp_path))
    assert warning.startswith(
        "hqq_oft runs without its Triton kernels: Triton cannot build its launcher (Failed to find"
    )
    assert "install gcc and Python's headers, or set CC" in warning
    assert first == second == "True"
    assert error.startswith("the triton backend does not support rotate: Triton cannot build its launcher (Failed to")


def test_with_a_compiler_the_kernels_are_used(tmp_path):
    assert run(tmp_path, os.environ["PATH"]) == ["False", "False"]
