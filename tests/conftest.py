from __future__ import annotations

import os

# Read when a kernel is decorated, that is before the first import of the kernels. Under `auto` the CPU is not served by
# interpreted kernels, so only tests that select the triton backend by name run them.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what every launch sets for itself; silences a warning

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # The tensors are small, and pytest-xdist runs one process per core.
    torch.set_num_threads(1)
