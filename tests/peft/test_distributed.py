"""Two processes under torchrun, over gloo on the CPU, train as one with the doubled batch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

SCRIPT = Path(__file__).parent / "distributed" / "train.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(mode: str, out: Path, *options: str) -> list[float]:
    """Losses of a run."""
    out.mkdir(exist_ok=True)
    start = TORCHRUN if mode != "single" else []
    command = [sys.executable, *start, str(SCRIPT), "--mode", mode, "--out", str(out), *options]
    # One thread each: more would compete for the cores and could add up in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "losses.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return launch("single", folder), load_file(folder / "adapter_model.safetensors")


def check(losses, adapter, alone):
    expected, expected_adapter = alone
    assert len(set(expected)) == len(expected) == 6  # it does train
    # Means of two halves round differently from the mean of the whole.
    assert losses == pytest.approx(expected[-len(losses) :], rel=1e-6)
    assert adapter.keys() == expected_adapter.keys()
    for name in adapter:
        assert_close(adapter[name], expected_adapter[name], rtol=0, atol=1e-5)


def test_ddp(tmp_path, alone):
    losses = launch("ddp", tmp_path, "--share")
    check(losses, load_file(tmp_path / "adapter_model.safetensors"), alone)


def test_fsdp_trains_saves_and_resumes(tmp_path, alone):
    first = tmp_path / "first"
    losses = launch("fsdp", first, "--share")
    check(losses, load_file(first / "adapter_model.safetensors"), alone)
    assert launch("fsdp", tmp_path / "second", "--resume", str(first), "--checkpointing") == losses[3:]
    assert launch("single", tmp_path / "alone", "--resume", str(first)) == pytest.approx(losses[3:], rel=1e-6)
