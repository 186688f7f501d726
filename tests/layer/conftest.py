from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from calls import planners_of
from helpers import around_operations

from hqq_oft.ops import backends


def pytest_generate_tests(metafunc):
    """Every test of this folder runs once on each backend."""
    names = metafunc.config.getoption("--backend")
    if not names:
        compiles = "_fresh_compiler" in metafunc.fixturenames
        names = ["auto", pytest.param("triton", marks=[pytest.mark.all_targets] if compiles else [])]
        del names[2 if find_spec("triton") else 1 :]
    metafunc.parametrize("_on_backend", names, indirect=True)


@pytest.fixture(autouse=True)
def _on_backend(request, monkeypatch):
    monkeypatch.setenv("HQQ_OFT_BACKEND", request.param)
    if request.param != "triton":
        yield
        return
    # Interpreted, the quantizer's iterations take seconds; tests/triton_kernels merges with it.
    with planners_of("triton", quantize=backends.registry()["reference"].operations["quantize"]):
        yield


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()  # compilations of one function are counted across tests


@pytest.fixture
def cayleys():
    """The number of blocks of each `cayley` that runs."""
    seen = []

    def counted(operation, function, args):
        if operation == "cayley":
            seen.append(args[0].shape[0])
        return function(*args)

    with around_operations(counted):
        yield seen
