from __future__ import annotations

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*"]
else:
    from hqq_oft import backend, triton_kernels
    from hqq_oft.ops import backends

    MODULES = (
        triton_kernels.cayley,
        triton_kernels.rotate,
        triton_kernels.dequantize,
        triton_kernels.linear,
        triton_kernels.linear_backward,
        triton_kernels.quantize,
    )

    @pytest.fixture(autouse=True)
    def _on_triton():
        with backend("triton"):
            yield

    @pytest.fixture(autouse=True)
    def _poisoned(monkeypatch):
        """Every output is NaN, or the largest integer, before a kernel runs."""

        def poisoned(like, shape, dtype=None):
            dtype = dtype or like.dtype
            poison = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
            return torch.full(shape, poison, dtype=dtype, device=like.device)

        for module in (*MODULES, triton_kernels._launch):
            monkeypatch.setattr(module, "empty", poisoned)
        backends.forget_plans()
        yield
        backends.forget_plans()
