"""Compiled kernels (csrc/), the table of operations that they implement, and the choice among them per call."""

from __future__ import annotations

from pathlib import Path

from ..._installation import describe, is_checkout
from ..backends import Planner

LIBRARY = Path(__file__).parent / "hqq_oft_native.so"
OPERATIONS: dict[str, Planner] = {}
REASON = ""

if not LIBRARY.exists():
    REASON = (
        f"the native kernels are not built in {describe()}; `make native` or `pip install -e .` builds them there"
        if is_checkout()
        else "hqq_oft was installed without its native kernels: no C++17 compiler, or no PyTorch, at build time; "
        "`pip install .` in a checkout builds them"
    )
else:
    from . import cpu

    cpu.load(LIBRARY)
    OPERATIONS.update(cpu.OPERATIONS)
