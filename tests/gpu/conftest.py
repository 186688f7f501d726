"""The tests of this folder need a GPU; elsewhere they are collected and skipped."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

DEVICE = "cuda"
HERE = Path(__file__).parent


def reason_to_skip() -> str | None:
    if not torch.cuda.is_available():
        return "needs a GPU that torch can use"
    if find_spec("triton") is None:
        return "needs Triton"
    import triton

    if triton.knobs.runtime.interpret:
        return "Triton interprets its kernels in this process: run `make gpu-test`, or set TRITON_INTERPRET=0"
    return None


def pytest_collection_modifyitems(items):
    reason = reason_to_skip()
    for item in items:
        if reason is not None and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Fill every output and every buffer of partial sums with NaN before its kernel runs."""
    from hqq_oft.triton_kernels import _launch, cayley, dequantize, linear, linear_backward, rotate

    empty = _launch.empty

    def poisoned(like, shape, dtype=None):
        return empty(like, shape, dtype).fill_(float("nan"))

    for module in (_launch, cayley, dequantize, linear, linear_backward, rotate):
        monkeypatch.setattr(module, "empty", poisoned)
