from __future__ import annotations

import pytest
import torch
from small_llama import VOCABULARY

import hqq_oft
from hqq_oft.ops import table as ops


@pytest.fixture(autouse=True)
def _patched():
    with hqq_oft.patch_peft():
        yield
    hqq_oft.unpatch_peft()


@pytest.fixture
def tokens():
    return torch.randint(0, VOCABULARY, (3, 12))


@pytest.fixture
def launches(monkeypatch):
    """The name of each operation that runs."""
    dispatch, seen = ops.dispatch, []
    monkeypatch.setattr(ops, "dispatch", lambda name, *args: (seen.append(name), dispatch(name, *args))[1])
    return seen
