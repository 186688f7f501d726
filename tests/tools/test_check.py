"""`hqq-oft check`: it passes on this CPU, finds what can be wrong with a kernel, and warns where nobody ran it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace

import calls
import pytest
import torch

import hqq_oft
from hqq_oft import check, cli
from hqq_oft.check.cases import Case, all_cases
from hqq_oft.check.measure import Outcome, compile_kernels, worst
from hqq_oft.ops import backends, reference, verified
from hqq_oft.ops.table import OPERATIONS

ROOT = Path(__file__).parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ONE_EACH = [Case(name, m=2) for name in OPERATIONS]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified, "_warned", set())


@pytest.fixture
def small(monkeypatch):
    """`hqq-oft check` of one case of each operation, without times."""
    monkeypatch.setattr(check, "run", partial(check.run, cases=ONE_EACH, tokens=()))


def records():
    return [json.loads(path.read_text()) for path in Path(os.environ["XDG_CACHE_HOME"]).rglob("*.json")]


def changed(operation, change):
    """A context in which the first result of an operation, on whatever backend `auto` takes, is changed."""
    name = next(name for name, backend in backends.registry().items() if backend.why_not(operation) is None)
    kernels = backends.registry()[name]

    def plan(by_name, *args):
        function = kernels.operations[operation](by_name, *args)

        def broken(*args):
            out = function(*args)
            return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

        return broken

    return calls.planners_of(name, **{operation: plan})


def alternating():
    """Adds nothing to one result and the smallest step to the next one."""
    turns = iter(range(1000))
    return lambda out: out if next(turns) % 2 else torch.nextafter(out, torch.full_like(out, 100))


WRONG = {
    "a value that is a percent off": (lambda out: out * 1.01, ", tolerance "),
    "memory that no kernel wrote": (torch.empty_like, "error nan"),
    "a result that differs in one bit": (alternating(), "two runs differ"),
    "a shape that is wrong": (lambda out: out[:-1], "ValueError: a result has shape"),
}


# --- The check -------------------------------------------------------------------------------------------------------


def test_the_command_passes_on_this_processor(tmp_path):
    command = [sys.executable, "-m", "hqq_oft.cli", "check", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("### hqq-oft check: no faults on ")
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert {row[0].removeprefix("| ") for row in rows} >= {*OPERATIONS, "1", "8", "16", "64", "512"}
    (record,) = records()
    assert record["faults"] == []
    assert len(record["outcomes"]) == len(all_cases())
    assert all(outcome["repeats"] and outcome["error"] < 6e-3 for outcome in record["outcomes"])
    assert all(microseconds > 0 for times in record["times"] for microseconds in times.values())
    versions = [torch.__version__, hqq_oft.__version__]
    assert all(version.replace(".", "_").replace("+", "_") in done.stderr for version in versions)


@pytest.mark.parametrize(
    ("wrong", "operation"),
    [
        (wrong, name)
        for wrong, name in product(WRONG, OPERATIONS)
        # the first result of `quantize` is bytes, and `project_` has none
        if name != "project_"
        and (name != "quantize" or wrong in ("a value that is a percent off", "a shape that is wrong"))
    ],
)
def test_a_broken_kernel_is_a_fault_of_its_operation(small, capsys, operation, wrong):
    change, message = WRONG[wrong]
    with changed(operation, change):
        assert cli.main(["check", "--device", "cpu"]) == 1
    said = capsys.readouterr()
    faults = [line for line in said.out.splitlines() if line.startswith("- ")]
    assert len(faults) == 1, said.out
    assert faults[0].startswith(f"- {operation} ")
    assert message in faults[0]
    table = {line.split()[1]: line.split(" | ")[-1] for line in said.out.splitlines() if line.startswith("| ")}
    assert {name for name in OPERATIONS if table[name] != "0 |"} == {operation}
    assert said.err.startswith("hqq-oft: 1 fault(s), recorded in ")
    assert len(records()[0]["faults"]) == 1


def test_a_wrong_result_in_place_is_a_fault(small, capsys):
    name = next(name for name, backend in backends.registry().items() if backend.why_not("project_") is None)
    with calls.planners_of(name, project_=lambda by_name, *args: lambda v, max_norm: v.mul_(0.9)):
        assert cli.main(["check", "--device", "cpu"]) == 1
    assert "- project_ " in capsys.readouterr().out


def test_an_exception_is_a_fault_and_does_not_stop_the_rest(small, capsys):
    def raising(out):
        raise IndexError("off\nby one")

    with changed("rotate", raising):
        assert cli.main(["check", "--device", "cpu"]) == 1
    assert "- rotate bf16 b=32 M=2: IndexError: off by one\n" in capsys.readouterr().out
    outcomes = {outcome["case"]["operation"]: outcome for outcome in records()[0]["outcomes"]}
    assert [name for name, outcome in outcomes.items() if outcome["error"] is None] == ["rotate"]


def test_nan_is_the_largest_error_whichever_result_has_it():
    assert str(worst([0.1, float("nan")])) == str(worst([float("nan"), 0.1])) == "nan"
    assert worst([0.1, 0.2]) == 0.2


def test_times_that_cannot_be_taken_are_a_fault():
    def raising(out):
        raise IndexError("off by one")

    with changed("linear_backward", raising):
        report = check.run(CPU, ONE_EACH[:1], tokens=(1,))
    assert report.faults == ["times of M=1: IndexError: off by one"]


def test_what_a_backend_selected_by_name_does_not_support_is_not_a_fault():
    with calls.planners_of("native", rotate=None), hqq_oft.backend("native"):
        if backends.registry()["native"].why_not("cayley") is None:
            report = check.run(CPU, ONE_EACH, tokens=())
            assert report.faults == []
            assert "| rotate | none |" in report.markdown()
        report = check.run(CPU, [Case("rotate")], tokens=())
    assert report.faults == ["nothing was checked: the native backend supports no case"]


def test_a_cache_folder_that_cannot_be_written_is_reported(small, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file")
    assert cli.main(["check", "--device", "cpu"]) == 0
    assert "hqq-oft: not recorded: " in capsys.readouterr().err


def test_the_cases_are_the_formats_that_people_use():
    cases = all_cases()
    assert len(cases) == len(set(cases))
    assert {case.operation for case in cases} == set(OPERATIONS)
    formats = [*product((8, 4, 3, 2, 1), (64, 128), (1,)), (4, 64, 0), (4, 128, 0)]
    wanted = {"format": set(formats), "dtype": {"bf16", "fp16", "fp32"}, "block": {16, 32, 64}, "m": {1, 64, 512}}
    for name in ("linear", "linear_backward"):
        rows = [
            {"format": (c.bits, c.group, c.axis), "dtype": c.dtype, "block": c.block, "m": c.m}
            for c in cases
            if c.operation == name
        ]
        for left, right in combinations(wanted, 2):
            pairs = {(row[left], row[right]) for row in rows}
            assert pairs >= set(product(wanted[left], wanted[right])), (left, right)
        assert {row["m"] for row in rows if row["dtype"] == "bf16"} == {1, 8, 16, 64, 512}


def test_random_arguments_leave_the_random_state_alone():
    before = torch.get_rng_state()
    report = check.run(CPU, ONE_EACH[:2], tokens=())
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()
    assert check.run(CPU, ONE_EACH[:2], tokens=()).outcomes == report.outcomes


def test_kernels_are_compiled_by_a_call_of_every_case():
    called = []
    with changed("rotate", lambda out: called.append(tuple(out.shape)) or out):
        compile_kernels([Case("rotate", m=m) for m in (1, 3)] + [Case("linear", bits=7)], CPU, "auto")
    assert sorted(called) == [(1, 1024), (3, 1024)]


@pytest.mark.parametrize("device", ["nowhere", "cuda:77", "meta", "mps"])
def test_an_unusable_device_exits_with_2_and_says_which_are_there(capsys, device):
    assert cli.main(["check", "--device", device]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"hqq-oft: there is no device '{device}' to check. torch finds cpu")
    assert "hqq-oft env" in error


def test_the_default_device_is_the_first_gpu_or_the_cpu(monkeypatch):
    for available, expected in ((True, GPU), (False, CPU)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        assert check.usable_device(None) == expected


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="there is no C compiler")
def test_over_a_driver_that_does_nothing_every_operation_is_launched_and_faulty():
    program = (
        "from functools import partial\n"
        "from hqq_oft import check, cli\n"
        "from hqq_oft.check.cases import Case\n"
        "from hqq_oft.ops.table import OPERATIONS\n"
        "from tests.stub_gpu import stub_gpu\n"
        "check.run = partial(check.run, cases=[Case(name, m=2) for name in OPERATIONS], tokens=(1,))\n"
        "with stub_gpu() as library:\n"
        "    status = cli.main(['check', '--device', 'cpu'])\n"
        "print(status, library.stub_launches())\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    *lines, last = done.stdout.splitlines()
    status, launches = map(int, last.split())
    assert status == 1, done.stderr
    assert launches > 2 * len(OPERATIONS)
    for name in OPERATIONS:
        error = "error " if name == "project_" else "error nan"  # in place, nothing is left unwritten
        assert any(line.startswith(f"- {name} ") and f"{error}" in line for line in lines), done.stdout
        assert any(line.startswith(f"| {name} | triton | 1 |") for line in lines)
    (record,) = records()
    assert record["backend"] == "triton"  # which says nothing about `auto`
    assert len(record["times"]) == 1


# --- The warning -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch):
    """Calls `auto` plans on a GPU of a given name, with kernels that serve it; the messages of its warnings."""
    monkeypatch.setitem(backends.registry(), "native", backends.Backend("native"))
    monkeypatch.setitem(
        backends.registry(), "triton", backends.Backend("triton", {"rotate": lambda by_name, *args: None})
    )

    def plan(name, device=GPU, operation="rotate"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            backends.plan(operation, "auto", (SimpleNamespace(device=device),))
        return [str(warning.message) for warning in caught]

    return plan


def save(monkeypatch, name, selected="auto", faulty=False):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    outcome = Outcome(Case("rotate"), "triton", 0.0, True, "a fault" * faulty)
    path = check.Report(GPU, {}, selected, [outcome], [], [], 1.0).save()
    assert path.name.startswith(f"{verified.table_name(name)}_driver_")


def test_auto_says_once_for_each_gpu_that_its_kernels_were_never_verified_there(on_gpu):
    message = (
        "the kernels of hqq_oft were never verified on this Some GPU with this driver and these versions of torch and "
        "triton. Run `hqq-oft check --device cuda:0` once: it compares them with float64 and records the result."
    )
    assert on_gpu("Some GPU") == [message]
    assert on_gpu("Some GPU") == []
    assert len(on_gpu("Some GPU", torch.device("cuda", 1))) == 1


def test_a_cpu_and_a_gpu_that_the_reference_serves_are_not_warned_about(on_gpu):
    assert on_gpu("Some GPU", CPU) == []
    assert on_gpu("Some GPU", operation="dequantize") == []


def test_a_record_of_auto_on_that_gpu_avoids_the_warning(on_gpu, monkeypatch):
    save(monkeypatch, "Other GPU")
    save(monkeypatch, "Some GPU", selected="reference")
    assert len(on_gpu("Some GPU")) == 1
    verified._warned.clear()
    save(monkeypatch, "Some GPU")
    assert on_gpu("Some GPU") == []
    verified._warned.clear()
    monkeypatch.setattr(torch, "__version__", "other")
    monkeypatch.setattr(verified, "version", lambda package: "another")
    assert len(on_gpu("Some GPU")) == 1


def test_a_record_of_faults_is_warned_about(on_gpu, monkeypatch):
    save(monkeypatch, "Some GPU", faulty=True)
    (message,) = on_gpu("Some GPU")
    assert "`hqq-oft check` found 1 fault(s) in the kernels on this Some GPU" in message
    assert "HQQ_OFT_BACKEND=reference avoids the kernels" in message


def test_a_tile_table_in_the_package_avoids_the_warning(on_gpu, monkeypatch):
    monkeypatch.setattr(verified, "own_table", lambda name: {"regimes": {}} if name == "some_gpu" else {})
    assert on_gpu("Some GPU") == []
    assert len(on_gpu("Other GPU", torch.device("cuda", 1))) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_damaged_record_counts_as_none(on_gpu, monkeypatch, content):
    save(monkeypatch, "Some GPU")
    verified.record_path(GPU).write_text(content)
    assert len(on_gpu("Some GPU")) == 1


def test_the_driver_is_read_where_the_system_tells_it(monkeypatch, tmp_path):
    version = tmp_path / "version"
    monkeypatch.setattr(verified, "_DRIVERS", ((version, verified._DRIVERS[0][1]),))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert verified.identity(GPU)["driver"] == "13.0"
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12.2 \n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (dvs-builder@U16)\n",
    ):
        version.write_text(line)
        assert verified.identity(GPU)["driver"] == "550.54.15"


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert str(verified.record_path(CPU)).startswith(f"{tmp_path}/cache/hqq_oft/check/")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):  # which the specification says to ignore
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert str(verified.record_path(CPU)).startswith(f"{tmp_path}/home/.cache/hqq_oft/check/")


def test_the_float64_reference_is_not_the_backend_under_test():
    with changed("rotate", lambda out: out * 2):
        report = check.run(CPU, [Case("rotate", m=2), Case("linear", m=2)], tokens=())
    assert [bool(outcome.fault) for outcome in report.outcomes] == [True, False]
    assert reference.OPERATIONS.keys() == OPERATIONS.keys()
