from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hqq_oft import backend
from hqq_oft.ops import backends
from hqq_oft.ops import native as _native

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if _native.REASON and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=_native.REASON))


def pytest_generate_tests(metafunc):
    if "instruction_set" in metafunc.fixturenames:
        names = [] if _native.REASON else _native.cpu.instruction_sets()
        metafunc.parametrize("instruction_set", names, indirect=True)


@pytest.fixture
def instruction_set(request):
    """Run a test that uses this fixture on the kernels of every instruction set that the CPU supports."""
    before = _native.cpu.instruction_set()
    _native.cpu.use_instruction_set(request.param)
    yield request.param
    _native.cpu.use_instruction_set(before)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def fresh_plans():
    """For a test that replaces what plans hold: they are made again in it, and again after it."""
    backends.forget_plans()
    yield
    backends.forget_plans()


@pytest.fixture(autouse=True)
def _on_native():
    with backend("native"):
        yield


@pytest.fixture(autouse=True)
def _poisoned():
    """PyTorch fills what it allocates with NaN, or the largest integer, in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
