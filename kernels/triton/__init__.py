"""Triton kernels, one file per operation, and the table of operations that they serve."""

from collections.abc import Callable
from typing import Any

OPERATIONS: dict[str, Callable[..., Any]] = {}
