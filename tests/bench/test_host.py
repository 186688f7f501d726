"""`make bench-host` as a user runs it: every contender on both paths, launches counted, nothing about speed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import run

ROOT = Path(__file__).parents[2]
CONTENDERS = {"hqq_oft", "dense", "HQQ", "PEFT OFT", "PEFT LoRA r=16"}

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no C compiler"),
]


def python(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def test_every_contender_is_timed_on_both_paths(tmp_path):
    options = ["--device", "cpu", "--suite", "host", "--budget", "0.001", "--out", str(tmp_path)]
    done = python("-m", "bench.run", *options)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    rows = run.read_rows(tmp_path / "raw.jsonl")
    found = {(row["case"].split(",")[0], row["phase"]): set() for row in rows}
    for row in rows:
        assert row["status"] == "measured"
        assert row["note"]
        found[row["case"].split(",")[0], row["phase"]].add(row["contender"])
    assert len(found) == 4
    assert all(contenders == CONTENDERS for contenders in found.values())
    assert "stub" in next(row["note"] for row in rows if "GPU" in row["case"] and row["contender"] == "hqq_oft")


def test_launches_reach_the_stub_and_compute_nothing():
    done = python(
        "-c",
        "import torch, hqq_oft\n"
        "from hqq_oft.ops import table as ops\n"
        "from tests.stub_gpu import stub_gpu\n"
        "from bench.problem import Problem, Setting\n"
        "problem = Problem(128, 128, Setting(), torch.device('cpu'))\n"
        "with stub_gpu() as library:\n"
        "    before = library.stub_launches()\n"
        "    y = ops.linear(problem.inputs(1)[0], problem.weights[0], problem.d, None, None)\n"
        "    print(library.stub_launches() - before, tuple(y.shape))\n",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split(maxsplit=1) == ["1", "(1, 128)\n"]
