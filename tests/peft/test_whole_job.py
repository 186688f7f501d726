"""The whole workflow, in separate processes and on real text; every result is checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_llama import save_byte_llama

from examples.demo import corpus

SCRIPTS = Path(__file__).parent / "whole_job"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(script, folder, out, *, processes=1):
    command = [sys.executable, *(TORCHRUN if processes > 1 else []), str(SCRIPTS / script), str(folder), "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def facts(folder, out, name):
    return json.loads((folder / out / name).read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    save_byte_llama(folder / "model")
    for name, text in (("prose", corpus.prose()), ("code", corpus.code(200_000))):
        text = bytes(text.train[:12_000].tolist()).decode("utf-8", "ignore")
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    run("train.py", folder, "one")
    return folder


def test_training_learns(folder):
    found = facts(folder, "one", "facts.json")
    for name in ("prose", "code"):
        steps = found["steps"][name]
        assert len(steps) == 12
        assert sum(steps[-3:]) < sum(steps[:3]) - 0.3
        assert found["quantized"][name] == pytest.approx(found["plain"][name], rel=0.05)
        assert found["adapted"][name] < found["quantized"][name] - 0.1


def test_another_process_serves_and_merges_the_trained_adapters(folder):
    run("serve.py", folder, "one")
    trained, served = facts(folder, "one", "facts.json"), facts(folder, "one", "served.json")
    assert served["adapted"] == trained["adapted"]
    assert served["logits"] == trained["logits"]

    # The same prompt three times: each row of the batch matches the output of its own adapter, and of no other.
    assert served["together"] == served["one by one"]
    for row, differences in enumerate(served["off"].values()):
        assert differences.pop(row) < 1e-5
        assert min(differences) > 0.02

    merged, report = served["merged"], served["report"]
    adapted, quantized = trained["adapted"]["prose"], trained["quantized"]["prose"]
    # Four bits lose part of what the adapter has learned, eight almost nothing, a dense layer only rounding.
    assert report["dense"] < 1e-6 < report["8"] < 0.02 < report["None"] < 0.2
    assert merged["dense"]["logits off the adapter's"] < 1e-5
    assert merged["8"]["logits off the adapter's"] < 0.03 < merged["None"]["logits off the adapter's"]
    assert merged["dense"]["loss"] == pytest.approx(adapted, rel=1e-6)
    assert merged["8"]["loss"] == pytest.approx(adapted, rel=5e-3)
    assert adapted < merged["None"]["loss"] < quantized
    assert merged["None"]["classes"] == merged["8"]["classes"] == ["HQQLinear", "Linear"]  # Linear is lm_head
    assert merged["dense"]["classes"] == ["Linear"]
    assert merged["None"]["saved bit for bit"]
    assert merged["8"]["saved bit for bit"]


def test_two_processes_train_like_one(folder):
    run("train.py", folder, "two", processes=2)
    one, two = facts(folder, "one", "facts.json"), facts(folder, "two", "facts.json")
    for key in ("plain", "quantized"):
        assert two[key] == one[key]
    for name in ("prose", "code"):
        # Means of two halves round differently from the mean of the whole; logged with four decimals.
        assert two["steps"][name] == pytest.approx(one["steps"][name], abs=2e-4)
        assert two["adapted"][name] == pytest.approx(one["adapted"][name], rel=1e-4)
        ours, other = (load_file(folder / run / name / "adapter_model.safetensors") for run in ("one", "two"))
        assert ours.keys() == other.keys()
        for key in ours:
            torch.testing.assert_close(other[key], ours[key], rtol=0, atol=1e-4)
    base = [load_file(folder / run / "base" / "model.safetensors") for run in ("one", "two")]
    assert all(torch.equal(base[0][key], base[1][key]) for key in base[0])
