"""transformers' Trainer with accelerate's FSDP2: two processes, over gloo on the CPU, train, save and resume as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import accelerate.accelerator
import pytest
from hqq.core.quantize import HQQLinear
from safetensors.torch import load_file
from torch.testing import assert_close

import hqq_oft

SCRIPT = Path(__file__).parent / "distributed" / "trainer.py"
CONFIG = Path(__file__).parents[2] / "examples" / "accelerate_fsdp.yaml"
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG)]


def train(out: Path, *options: str, launcher: tuple[str, ...] | None = None) -> list[float]:
    """Losses of the steps that a run makes, which also writes checkpoints and its adapter to `out`."""
    launch = (
        ["-m", "accelerate.commands.launch", "--config_file", str(CONFIG), *launcher] if launcher is not None else []
    )
    command = [sys.executable, *launch, str(SCRIPT), "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / "losses.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return train(folder), folder


def check_adapters(found: Path, expected: Path) -> None:
    assert_close(
        load_file(found / "adapter_model.safetensors"),
        load_file(expected / "adapter_model.safetensors"),
        rtol=0,
        atol=1e-5,
    )


def test_full_state_dicts_are_saved_and_resumed(tmp_path, alone):
    expected, folder = alone
    losses = train(tmp_path / "first", launcher=())
    assert losses == pytest.approx(expected, rel=1e-6)
    check_adapters(tmp_path / "first", folder)
    check_adapters(tmp_path / "first" / "checkpoint-3", folder / "checkpoint-3")
    check_adapters(tmp_path / "first" / "checkpoint-6", tmp_path / "first")
    again = train(tmp_path / "second", "--resume", str(tmp_path / "first" / "checkpoint-3"), launcher=())
    assert again == losses
    check_adapters(tmp_path / "second", tmp_path / "first")


def test_sharded_state_dicts_of_weights_that_only_the_first_process_has(tmp_path, alone):
    expected, folder = alone
    launcher = ("--fsdp_state_dict_type", "SHARDED_STATE_DICT", "--fsdp_cpu_ram_efficient_loading", "true")
    losses = train(tmp_path / "first", "--only-first", launcher=launcher)
    assert losses == pytest.approx(expected, rel=1e-6)
    check_adapters(tmp_path / "first", folder)
    resume = ("--resume", str(tmp_path / "first" / "checkpoint-3"))
    assert train(tmp_path / "second", "--only-first", *resume, launcher=launcher) == losses
    check_adapters(tmp_path / "second", tmp_path / "first")


def test_unpatching_restores_hqq_and_accelerate():
    def replaced():
        return HQQLinear.state_dict, HQQLinear._load_from_state_dict, accelerate.accelerator.fsdp2_prepare_model

    patched = replaced()
    hqq_oft.unpatch_peft()
    originals = replaced()
    assert all(hasattr(ours, "__wrapped__") for ours in patched)
    assert originals == tuple(ours.__wrapped__ for ours in patched)
