from __future__ import annotations

import pytest
import torch
from helpers import around_operations
from small_llama import VOCABULARY

import hqq_oft


@pytest.fixture(autouse=True)
def _patched():
    with hqq_oft.patch_peft():
        yield
    hqq_oft.unpatch_peft()


@pytest.fixture
def tokens():
    return torch.randint(0, VOCABULARY, (3, 12))


@pytest.fixture
def launches():
    """The name of each operation that runs."""
    seen = []
    with around_operations(lambda name, function, args: (seen.append(name), function(*args))[1]):
        yield seen
