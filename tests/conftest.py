from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # The tensors are small, and pytest-xdist runs one process per core.
    torch.set_num_threads(1)
