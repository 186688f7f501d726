"""The tests of this folder need a GPU; elsewhere they are not collected (`available.py`)."""

from __future__ import annotations

import pytest
import torch

from hqq_oft.ops import backends

DEVICE = "cuda"


@pytest.fixture
def device():
    return torch.device(DEVICE)


@pytest.fixture
def poisoned_outputs(monkeypatch):
    """Fill every output and every buffer of partial sums with NaN, or the largest integer, before it runs."""
    from hqq_oft.triton_kernels import _launch, cayley, dequantize, linear, linear_backward, quantize, rotate

    empty = _launch.empty

    def poisoned(like, shape, dtype=None):
        out = empty(like, shape, dtype)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

    for module in (_launch, cayley, dequantize, linear, linear_backward, quantize, rotate):
        monkeypatch.setattr(module, "empty", poisoned)
    backends.forget_plans()
    yield
    backends.forget_plans()
