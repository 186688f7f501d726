"""Compiled kernels (csrc/), the table of operations that they serve, and which of them suits a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).parent / "hqq_oft_native.so"
OPERATIONS: dict[str, Callable[..., Any]] = {}
REASON = ""

if not LIBRARY.exists():
    REASON = (
        "hqq_oft was installed without its native kernels, for want of a C++17 compiler or of PyTorch to build with; "
        "`pip install --no-build-isolation .` in a checkout builds them"
    )
else:
    from . import operations

    operations.load(LIBRARY)
    OPERATIONS.update(operations.OPERATIONS)
