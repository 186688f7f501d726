"""The shared object: it loads with any PyTorch that it supports, and every symbol that it uses is bound then."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from hqq_oft.ops import native

# Weak by design: of the C library and the compiler's start-up files, which test for them.
OPTIONAL = {"__cxa_finalize", "__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


def test_every_symbol_is_bound_by_what_is_loaded_with_pytorch():
    program = "import ctypes, os, sys, torch; ctypes.CDLL(sys.argv[1], os.RTLD_NOW)"
    command = [sys.executable, "-c", program, str(native.LIBRARY)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_no_symbol_is_weak():
    """A weak symbol that nothing provides is a null pointer: the library loads, and fails where it is called."""
    command = ["nm", "--dynamic", "--undefined-only", str(native.LIBRARY)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = [line.split() for line in listing.splitlines()]
    weak = {name.split("@")[0] for kind, name in symbols if kind in "wv"}
    assert weak <= OPTIONAL
