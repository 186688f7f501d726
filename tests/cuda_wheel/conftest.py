"""Tests with a CUDA build of PyTorch and without a GPU, of the installed package: `make test-cuda-wheel`.

The CUDA runtime and the driver are stubs (`libcudart_stub.c`, `../libcuda_stub.c`): tensors are on a device `cuda:0`
whose memory is the host's, kernels are compiled and launched and never run. Values are meaningless; shapes, dtypes,
strides, devices, the choice of backends and every line up to the launch are as on an H100.
"""

from __future__ import annotations

import ctypes

import pytest
import torch

from hqq_oft.ops import backends

DEVICE_NAME = "NVIDIA H100 80GB HBM3"  # of libcudart_stub.c


def pytest_sessionstart(session):
    if not torch.version.cuda or torch.cuda.get_device_name(0) != DEVICE_NAME:
        raise pytest.UsageError("these tests need a CUDA build of PyTorch over the stubs: run `make test-cuda-wheel`")


@pytest.fixture
def launches():
    """The number of kernels that Triton has launched, since it was last asked."""
    count = ctypes.CDLL("libcuda.so.1").stub_launches
    count.restype = ctypes.c_long
    last = count()

    def since():
        nonlocal last
        before, last = last, count()
        return last - before

    return since


@pytest.fixture(autouse=True)
def _fresh_plans():
    backends.forget_plans()
    yield
    backends.forget_plans()
