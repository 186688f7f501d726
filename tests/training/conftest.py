"""Runs in the environment of `make test-training`."""

from __future__ import annotations

import pytest

import hqq_oft


@pytest.fixture
def patched():
    with hqq_oft.patch_peft():
        yield
