from __future__ import annotations

import os
from pathlib import Path

# The settings of the package are read from the environment; a test sets those that it needs.
for _name in [name for name in os.environ if name.startswith("HQQ_OFT_")]:
    del os.environ[_name]
# Read when a kernel is decorated, that is before the first import of the kernels. Under `auto` the CPU is not served by
# interpreted kernels, so only tests that select the triton backend by name run them.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what every launch sets for itself; silences a warning

import pytest
import torch
from gpu import available

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_addoption(parser):
    group = parser.getgroup("hqq_oft")
    group.addoption(
        "--backend",
        action="append",
        metavar="NAME",
        help="the backend on which tests/layer runs; may be repeated (default: auto, and triton if installed)",
    )
    group.addoption(
        "--all-targets",
        action="store_true",
        help="compile for every GPU architecture and in every state of a layer, not only a representative set",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "all_targets: runs with --all-targets only; the rest is a representative set")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all-targets"):
        return
    left_out = [item for item in items if item.get_closest_marker("all_targets")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_ignore_collect(collection_path):
    return True if GPU_TESTS in collection_path.parents and available.reason_to_skip() else None


def pytest_terminal_summary(terminalreporter):
    reason = available.reason_to_skip()
    if reason:
        files = len(list(GPU_TESTS.glob("test_*.py")))
        terminalreporter.write_line(f"tests/gpu: {files} files not collected: {reason}")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # The tensors are small, and pytest-xdist runs one process per core.
    torch.set_num_threads(1)
