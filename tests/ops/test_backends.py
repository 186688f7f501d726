"""Choosing a backend: by name, by environment, by what can serve a call."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hqq_oft
from hqq_oft import BackendError, Unsupported, functional
from hqq_oft.ops import backends, reference
from hqq_oft.ops.table import OPERATIONS


@pytest.fixture
def x_and_d():
    return torch.randn(3, 8), torch.randn(2, 4, 4)


@pytest.fixture
def registry(monkeypatch):
    """Empty backends for this test only; the test registers their planners."""
    tables = {"triton": {}, "native": {}, "reference": dict(reference.OPERATIONS)}
    for name, table in tables.items():
        monkeypatch.setitem(backends.registry(), name, backends.Backend(name, table))
    backends.forget_plans()
    yield tables
    backends.forget_plans()


def test_auto_selects_the_first_backend_that_supports_the_call_and_logs_each_reason_once(registry, caplog):
    calls, v = [], torch.randn(2, 6)  # the other tests leave `cayley` alone: its reasons are not logged yet

    def picky(by_name, v, *settings):
        calls.append((by_name, *v.shape))
        raise Unsupported("v has few rows, this kernel takes 16")

    preferred, other = [name for name in backends.registry() if name != "reference"]
    registry[preferred]["cayley"] = picky
    with caplog.at_level(logging.INFO, logger="hqq_oft"):
        first = functional.cayley(v, 4)
        second = functional.cayley(v, 4)
        functional.cayley(v[:1], 4)
    assert calls == [(False, 2, 6), (False, 1, 6)]  # once for each kind of call
    with hqq_oft.backend("reference"):
        assert torch.equal(first, functional.cayley(v, 4))
    assert torch.equal(first, second)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"cayley is not supported by the {preferred} backend: v has few rows, this kernel takes 16",
        f"cayley is not supported by the {other} backend: the {other} backend has no kernel for cayley",
    ]


def test_a_backend_that_serves_is_used(registry, x_and_d):
    def sevens(x, d, index, transpose):
        return torch.full_like(x, 7.0)

    registry["native"]["rotate"] = lambda by_name, *args: sevens
    assert torch.equal(functional.rotate(*x_and_d), torch.full((3, 8), 7.0))
    with hqq_oft.backend("reference"):
        assert torch.equal(functional.rotate(*x_and_d), reference.rotate(*x_and_d, None, False))


def test_an_exception_in_a_backend_propagates(registry, x_and_d):
    def buggy(*args):
        raise IndexError("off by one")

    registry["triton"]["rotate"] = buggy
    with pytest.raises(IndexError, match="off by one"):
        functional.rotate(*x_and_d)
    registry["triton"]["rotate"] = lambda by_name, *args: buggy
    with pytest.raises(IndexError, match="off by one"):
        functional.rotate(*x_and_d)


def test_a_backend_selected_by_name_has_no_fallback(registry, x_and_d):
    message = "the triton backend does not support rotate: the triton backend has no kernel"
    with pytest.raises(BackendError, match=message), hqq_oft.backend("triton"):
        functional.rotate(*x_and_d)

    def picky(by_name, *args):
        assert by_name == (backends.selected_backend() == "native")
        raise Unsupported("no tensor cores")

    registry["native"]["rotate"] = picky
    with pytest.raises(BackendError, match="does not support rotate: no tensor cores"), hqq_oft.backend("native"):
        functional.rotate(*x_and_d)
    functional.rotate(*x_and_d)  # the previous choice is restored, also after an exception


def test_choices_nest():
    before = backends.selected_backend()
    with hqq_oft.backend("reference"):
        with hqq_oft.backend("auto"):
            assert backends.selected_backend() == "auto"
        assert backends.selected_backend() == "reference"
    assert backends.selected_backend() == before


def test_backward_runs_on_the_chosen_backend_too(registry, x_and_d):
    served = []

    def spy(*args):
        served.append("rotate_backward")
        return reference.rotate_backward(*args)

    registry["native"]["rotate_backward"] = lambda by_name, *args: spy
    x, d = (t.requires_grad_() for t in x_and_d)
    functional.rotate(x, d).sum().backward()
    assert served == ["rotate_backward"]


def test_an_unknown_backend_name_raises():
    message = "unknown backend 'cuda'; choose one of auto, triton, native, reference"
    with pytest.raises(ValueError, match=message), hqq_oft.backend("cuda"):
        pass


def test_the_environment_chooses_for_the_process(monkeypatch):
    monkeypatch.setenv("HQQ_OFT_BACKEND", "Reference")
    assert backends.selected_backend() == "reference"
    with hqq_oft.backend("auto"):
        assert backends.selected_backend() == "auto"
    monkeypatch.setenv("HQQ_OFT_BACKEND", "fast")
    with pytest.raises(ValueError, match="HQQ_OFT_BACKEND='fast' is not understood"):
        backends.selected_backend()


def test_a_missing_package_is_reported_as_the_reason():
    loaded = backends.load_backends()
    assert loaded["triton"].why_not("linear") is None or "Triton is not installed" in loaded["triton"].reason
    assert loaded["native"].why_not("linear") is None or "without its native kernels" in loaded["native"].reason
    assert loaded["reference"].why_not("linear") is None


def test_a_package_of_kernels_is_found(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: SimpleNamespace())
    kernels = SimpleNamespace(OPERATIONS={"rotate": reference.OPERATIONS["rotate"]})
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: kernels)
    loaded = backends.load_backends()
    assert loaded["native"].why_not("rotate") is None
    assert "no kernel for linear" in loaded["native"].why_not("linear")


def test_every_operation_has_an_operator_and_a_reference():
    assert set(OPERATIONS) == set(reference.OPERATIONS)
    for name, operation in OPERATIONS.items():
        assert str(getattr(torch.ops.hqq_oft, name).default._schema) == f"hqq_oft::{name}{operation.schema}"
        assert callable(getattr(reference, name))


def test_environment_report():
    environment = {**os.environ, "HQQ_OFT_BACKEND": "auto"}
    run = subprocess.run([sys.executable, "-m", "hqq_oft.env"], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert f"hqq_oft {hqq_oft.__version__}" in run.stdout
    assert f"torch         {torch.__version__}" in run.stdout
    for name in OPERATIONS:
        assert f"\n{name:20}" in run.stdout
    assert "HQQ_OFT_BACKEND=auto" in run.stdout
    assert "HQQ_OFT_CPU_ISA=auto" in run.stdout
    native = "native" if backends.load_backends()["native"].operations else "reference"
    assert f"linear              {native}\n" in run.stdout.replace(f"{native:14}", native)


def test_environment_report_of_a_backend_without_kernels(monkeypatch, registry):
    from hqq_oft import env

    monkeypatch.setenv("HQQ_OFT_BACKEND", "native")
    report = env.report()
    assert "\nrotate              none\n" in report
    assert "  native on cpu: the native backend has no kernel for rotate (rotate)" in report


def test_without_a_compiled_library_everything_else_works(tmp_path):
    shutil.copytree(Path(hqq_oft.__file__).parent, tmp_path / "hqq_oft", ignore=shutil.ignore_patterns("*.so"))
    program = (
        "import torch, hqq_oft\n"
        "from hqq_oft import functional\n"
        "from hqq_oft.ops import backends\n"
        "print(backends.registry()['native'].why_not('linear'))\n"
        "print(functional.rotate(torch.ones(1, 4), torch.zeros(2, 2, 2)).sum().item())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HQQ_OFT_BACKEND"}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**environment, "PYTHONPATH": "."})
    assert run.returncode == 0, run.stderr
    reason, result = run.stdout.splitlines()
    assert reason.startswith("hqq_oft was installed without its native kernels: no C++17 compiler")
    assert result == "4.0"


def test_without_triton_everything_else_works():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hqq_oft\n"
        "from hqq_oft import functional\n"
        "from hqq_oft.ops import backends\n"
        "print(backends.registry()['triton'].why_not('linear'))\n"
        "print(functional.rotate(torch.ones(1, 4), torch.zeros(2, 2, 2)).sum().item())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HQQ_OFT_BACKEND"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["Triton is not installed: `pip install triton`", "4.0"]
