"""Tile tables, refusals, and what the launchers decide without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import calls
import pytest
import torch
from hqq_oft.triton_kernels import _launch, _tiles, linear, linear_backward, rotate

from hqq_oft import BackendError, Unsupported, backend, functional
from hqq_oft.ops import backends, device_tables, reference


@pytest.fixture
def tables(tmp_path, monkeypatch):
    _tiles._forget()
    monkeypatch.setattr(device_tables.resources, "files", lambda package: tmp_path)
    yield tmp_path
    monkeypatch.undo()
    _tiles._forget()


def entry(m, **changes):
    return {"m": m, "bm": 16, "bn": 64, "bk": 64, "warps": 4, "stages": 2, **changes}


def test_the_entry_with_the_next_larger_m_is_selected(tables):
    own = {"linear": [entry(64, bn=128), entry(16)]}
    (tables / "default.json").write_text(json.dumps({"linear": [entry(1)], "rotate": [entry(8)], "regimes": {"r": 7}}))
    (tables / "interpreter.json").write_text(json.dumps(own))
    x = torch.empty(0)
    assert [_tiles.choose(x, "linear", m).bn for m in (1, 16, 17, 64, 1000)] == [64, 64, 128, 128, 128]
    assert _tiles.choose(x, "rotate", 99).m == 8  # from the default table
    assert _tiles.regime(x, "r") == 7


def test_a_malformed_entry_is_refused(tables):
    (tables / "default.json").write_text(json.dumps({"linear": [{"m": 1, "bm": 16}]}))
    with pytest.raises(
        ValueError, match=r"a tile of 'linear' for 'interpreter' must have .*'stages'.*got \['bm', 'm'\]"
    ):
        _tiles.choose(torch.empty(0), "linear", 1)


def test_the_shipped_tables_serve_every_operation():
    products = ("linear", "linear_rotated", "linear_general", "linear_backward", "linear_backward_general")
    for operation in (*products, "rotate", "rotate_backward", "dequantize", "dequantize_rotate"):
        assert _tiles.tiles("default", operation)


def test_the_backward_takes_the_scratch_from_a_threshold_of_its_own():
    regimes = {"scratch_from_m": 128, "backward_scratch_from_m": 64}
    with _tiles.using({"regimes": regimes}):
        for m in (63, 64, 127, 128):
            x = torch.empty(m, 8)
            assert linear.takes_one_launch(x) == (m < 128)
            assert linear_backward.takes_one_launch(x) == (m < 64)


@pytest.mark.parametrize(
    ("programs", "steps", "splits"), [(1, 1, 1), (1, 3, 1), (1, 4, 2), (1, 100, 16), (8, 100, 2), (16, 100, 1)]
)
def test_splits_fill_the_device_and_keep_work_for_each(programs, steps, splits):
    assert _launch.splits_for(programs, steps, torch.empty(0)) == splits


def test_unsupported_devices_are_refused():
    tensor = SimpleNamespace(device=torch.device("xpu", 0))
    with pytest.raises(Unsupported, match="run on CUDA and ROCm devices, but the tensor is on xpu"):
        _launch.check_device(tensor, by_name=True)


def test_auto_does_not_interpret_kernels_on_the_cpu():
    x, d = torch.randn(3, 8), torch.randn(2, 4, 4)
    refusals = []

    def spied(by_name, *args):
        try:
            return rotate.plan_rotate(by_name, *args)
        except Unsupported as refusal:
            refusals.append(str(refusal))
            raise

    with calls.planners_of("native", rotate=None), calls.planners_of("triton", rotate=spied), backend("auto"):
        assert torch.equal(functional.rotate(x, d), reference.rotate(x, d, None, False))
    assert refusals == ["on the CPU Triton only interprets its kernels, for tests: select it explicitly"]


def test_without_the_interpreter_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    backends.forget_plans()  # another test may have made such a call
    with pytest.raises(BackendError, match="the tensor is on the CPU; Triton needs a GPU"):
        functional.rotate(torch.randn(3, 8), torch.randn(2, 4, 4))


def test_tf32_only_where_the_user_allowed_it():
    program = (
        "import torch, triton.language as tl\n"
        "from hqq_oft.triton_kernels._launch import product_precision as precision\n"
        "print(precision(tl.float32))\n"
        "{allow}\n"
        "print(precision(tl.float32), precision(tl.float64), precision(tl.bfloat16))\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    for allow in ("allow_tf32 = True", "fp32_precision = 'tf32'"):  # PyTorch's older and newer way to say so
        source = program.format(allow=f"torch.backends.cuda.matmul.{allow}")
        run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment)
        assert run.stdout.split() == ["tf32x3", "tf32", "ieee", "ieee"], run.stderr
