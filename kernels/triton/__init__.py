"""Triton kernels, one file per operation, and the table of operations that they implement."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

OPERATIONS: dict[str, Callable[..., Any]] = {}
REASON = ""

if find_spec("triton") is None:
    REASON = "Triton is not installed: `pip install triton`"
else:
    from . import cayley, dequantize, linear, linear_backward, quantize, rotate

    for _module in (cayley, rotate, dequantize, linear, linear_backward, quantize):
        OPERATIONS.update(_module.OPERATIONS)
