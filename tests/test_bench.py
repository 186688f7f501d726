"""The benchmark suites: runs every case once; bookkeeping, refusals, targets, tuning. Does not measure speed."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import COMPILE_BACKEND

from bench import contenders, environment, gpu, pack, report, run, session, targets, timing, verify
from bench.limits import Limits
from bench.model import Cost
from bench.problem import Problem, Setting
from bench.session import Case, Job, Session
from bench.suites import PROFILES, cases, layer
from hqq_oft.ops.backends import OPERATIONS

LIMITS = Limits(bandwidth=1e10, rate=1e11)
CPU, META = torch.device("cpu"), torch.device("meta")


def dry(tmp_path, *options):
    return run.main(["--device", "cpu", "--dry", "--out", str(tmp_path), *options])


# --- Every case ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["ops", "layer", "merge", "model"])
def test_every_gpu_case_runs_on_small_layers(tmp_path, suite):
    assert dry(tmp_path, "--profile", "dry", "--suite", suite) == 0
    rows = report.read_rows(tmp_path / "raw.jsonl")
    expected = cases(suite, PROFILES["dry"])
    assert {row["case"] for row in rows} == {case.name for case in expected}
    absent = {row["contender"] for row in rows if row["status"].startswith("not run")}
    peaks = [row["peak_mib"] for row in rows if row["phase"] == "training process"]
    assert len(peaks) == (2 if suite == "model" else 0)
    assert all(peak > 50 for peak in peaks)
    uncompiled = set() if COMPILE_BACKEND == "inductor" else {"plain_compiled", "peft_oft_compiled"}
    assert absent <= {"native_decode", "gemlite", "peft_oft_aten", "int4"} | uncompiled
    timed = {row["contender"] for row in rows if row["status"] == "measured"}
    assert "hqq_oft" in timed
    if suite == "layer":
        assert {name for name in timed if not name.startswith("hqq_oft")} <= set(report.BASELINES)
    with (tmp_path / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(rows)
    page = (tmp_path / "README.md").read_text()
    assert "A dry run" in page
    assert f"## Suite {suite}" in page


@pytest.mark.parametrize("suite", ["ops", "layer", "merge"])
def test_every_gpu_case_has_consistent_shapes_at_full_size(suite):
    measuring = Session(META, LIMITS, dry=True)
    for case in cases(suite, PROFILES["gpu"]):
        rows = list(measuring.run(case))
        assert any(row["status"] == "measured" for row in rows) or "compiled" in case.name, case.name
        # the model predicts every contender of every layer and operation
        assert all(row["predicted_us"] > 0 for row in rows if row["status"] == "measured")


def test_the_cpu_cases_run(tmp_path):
    assert dry(tmp_path, "--profile", "dry-cpu", "--suite", "layer", "--match", "M=1 4-bit g64 axis 1 b=32 bf16") == 0
    rows = report.read_rows(tmp_path / "raw.jsonl")
    assert "PyTorch int4" in {row["contender"] for row in rows if row["status"] == "measured"}
    assert all(row["error"] < 1e-2 for row in rows if row["status"] == "measured")


def test_gpu_cases_cover_the_layers_of_both_models_and_all_settings():
    names = [case.name for case in cases("layer", PROFILES["gpu"])]
    for n, k in [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (8192, 28672)]:
        for m in [2**power for power in range(15)]:
            assert f"{n}x{k} M={m} {Setting().label}" in names
    for text in (
        "2-bit",
        "3-bit",
        "8-bit",
        "axis 0",
        "g128",
        "b=16",
        "b=64",
        "b=96",
        "b=256",
        "shared",
        "exact",
        "fp16",
    ):
        assert any(text in name for name in names), text
    # cases are in order of value
    assert names[0] == f"4096x4096 M=1 {Setting().label}"


def test_a_contender_that_computes_something_else_is_not_timed(monkeypatch):
    problem = Problem(64, 64, Setting(dtype="fp32", group=32, block=16), CPU)
    x = problem.inputs(3)[0]
    good = contenders.ours(problem)
    assert layer.error(good, problem, x) < 1e-5
    good.rotates = False
    with pytest.raises(RuntimeError, match=r"hqq_oft is .* off float64"):
        layer.error(good, problem, x)


@pytest.mark.parametrize("setting", [Setting(dtype="fp32"), Setting(dtype="fp32", share=True, exact=True)])
def test_contenders_that_rotate_agree_on_gradients(setting):
    problem = Problem(96, 128, setting, CPU)
    x = problem.inputs(5)[0].requires_grad_()
    grads = {}
    for build in (contenders.ours, contenders.peft_oft, contenders.plain, contenders.scratch):
        contender = build(problem)
        grads[build] = torch.autograd.grad(contender.layers[0](x).square().sum(), [x, contender.parameters[0]])
    for name, pair in grads.items():
        for mine, theirs in zip(grads[contenders.ours], pair, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3, msg=str(name))


# --- Bookkeeping -----------------------------------------------------------------------------------------------------


def case_of(call, name="a case", operations=("linear",)):
    job = lambda _: [Job("hqq_oft", "forward", call, (Cost(1e6, 1e6),))]  # noqa: E731
    return Case("ops", name, 0, frozenset(operations), {"M": 1}, job)


def test_a_killed_run_resumes(tmp_path):
    some = ["--profile", "dry", "--suite", "ops", "--match", "cayley"]
    assert dry(tmp_path, *some, "--seconds", "0") == 0
    assert report.read_rows(tmp_path / "raw.jsonl") == []
    assert dry(tmp_path, *some) == 0
    raw = tmp_path / "raw.jsonl"
    lines = raw.read_text().splitlines()
    cut = next(number for number, line in enumerate(lines) if "K=512" in line)
    raw.write_text("\n".join(lines[:cut]) + '\n{"suite": "ops", "ca')
    kept = report.read_rows(raw)
    assert 0 < len(kept) < len(lines)
    assert dry(tmp_path, *some) == 0
    rows = report.read_rows(raw)
    assert rows[: len(kept)] == kept
    assert len(rows) == len(lines)


def test_a_failed_case_is_reported_and_retried(tmp_path, capsys):
    measuring = Session(CPU, LIMITS, budget=0.001, identity={"device": "here"})

    def broken(number):
        raise ValueError("no such thing\nat all")

    raw = tmp_path / "raw.jsonl"
    todo = [case_of(broken, "first"), case_of(lambda _: None, "second")]
    failed = run.measure(todo, measuring, raw, float("inf"))
    assert failed == ["ops: first: ValueError: no such thing\nat all"]
    rows = report.read_rows(raw)
    assert [row["status"] for row in rows] == ["failed: ValueError: no such thing", "measured"]
    assert run.finished(raw, {"device": "here"}) == {("ops", "second")}
    assert run.finished(raw, {"device": "elsewhere"}) == set()


def test_a_failing_baseline_loses_only_its_own_row(tmp_path):
    def broken(number):
        raise TypeError("its interface has changed")

    jobs = [Job("hqq_oft", "forward", lambda _: None), Job("PEFT OFT", "forward", broken)]
    case = Case("ops", "a case", 0, frozenset(), {}, lambda _: jobs)
    raw = tmp_path / "raw.jsonl"
    measuring = Session(CPU, LIMITS, budget=0.001, identity={"device": "here"})
    assert run.measure([case], measuring, raw, float("inf")) == [
        "ops: a case: PEFT OFT: TypeError: its interface has changed"
    ]
    assert {row["contender"]: row["status"] for row in report.read_rows(raw)} == {
        "PEFT OFT": "failed: TypeError: its interface has changed",
        "hqq_oft": "measured",
    }
    # not retried: it would fail again
    assert run.finished(raw, {"device": "here"}) == {("ops", "a case")}


def test_a_contender_that_cannot_be_built_loses_only_its_own_row():
    def broken(problem):
        raise ImportError("no such module")

    problem = Problem(64, 64, Setting(dtype="fp32", group=32, block=16), CPU)
    able, absent = layer.build_all(problem, (contenders.ours, broken))
    assert [contender.name for contender in able] == ["hqq_oft"]
    assert [job.columns["status"] for job in absent] == ["failed: ImportError: no such module"]


def test_rotations_are_not_recomputed_while_a_layer_is_timed(monkeypatch):
    problem = Problem(64, 64, Setting(dtype="fp32", group=32, block=16), CPU)
    ((ours,), _) = layer.build_all(problem, (contenders.ours,))
    x = problem.inputs(3)[0]
    layer.error(ours, problem, x)
    monkeypatch.setattr("hqq_oft.functional.cayley", None)
    with torch.no_grad():
        ours.layers[0](x)


def test_changed_sources_are_measured_again(tmp_path, monkeypatch):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    code, table = tmp_path / "bench" / "run.py", tmp_path / "bench" / "results" / "results.json"
    code.write_text("1")
    first = environment.sources()
    table.write_text("a result changes nothing")
    assert environment.sources() == first
    code.write_text("2")
    assert environment.sources() != first


def test_operations_with_failing_tests_are_not_measured(tmp_path):
    report_file = tmp_path / "junit.xml"

    def red(*cases):
        report_file.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
        return verify.red_operations(report_file)

    passed = '<testcase name="test_it[linear]"/>'
    skipped = '<testcase name="test_it[linear]"><skipped/></testcase>'
    failed = '<testcase name="test_it[rotate_backward-bf16]"><failure/></testcase>'
    assert red(passed) == frozenset()
    assert red(passed, failed) == {"rotate_backward"}
    assert red(passed, '<testcase name="test_other"><error/></testcase>') == set(OPERATIONS)
    assert red(skipped) == set(OPERATIONS)
    called = []
    measuring = Session(CPU, LIMITS, red=frozenset({"linear"}))
    (row,) = measuring.run(case_of(called.append))
    assert row["status"] == "refused: the tests of linear fail"
    assert not called
    assert "p50_us" not in row


def test_a_row_compares_its_time_with_the_prediction():
    measuring = Session(CPU, LIMITS, budget=0.01, identity={"commit": "abc"})
    (row,) = measuring.run(case_of(lambda _: sum(range(20000))))
    assert row["status"] == "measured"
    assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    assert row["predicted_us"] == pytest.approx(100)  # 1 MB at 10 GB/s
    assert row["over_predicted"] == pytest.approx(row["p50_us"] / 100)
    assert row["gb_per_s"] == pytest.approx(1e-3 * 1e6 / row["p50_us"])
    assert row["commit"] == "abc"


def test_alternatives_are_timed_in_turn_with_all_their_buffers():
    seen = []
    clock = timing.Clock(CPU, budget=1e-5, most=6)
    found = clock.take_turns({"a": (lambda i: seen.append(("a", i)), 2), "b": (lambda i: seen.append(("b", i)), 1)})
    assert all(value.repeats >= 3 for value in found.values())
    timed = seen[-(found["a"].repeats + found["b"].repeats) :]
    assert {name for name, _ in timed[:4]} == {"a", "b"}
    assert {i for name, i in timed if name == "a"} == {0, 1}


def test_memory_saved_for_backward_is_counted_once_and_without_parameters():
    x, w = torch.randn(10, 100, requires_grad=True), torch.randn(100, 100, requires_grad=True)
    assert timing.kept_bytes(lambda: x @ w, [x, w]) == 0
    assert timing.kept_bytes(lambda: (x @ w).exp().square(), [x, w]) == 10 * 100 * 4


# --- The parts that only a GPU runs, on a stand-in --------------------------------------------------------------------


class Event:
    now = 0
    capturing = False

    def __init__(self, enable_timing):
        assert enable_timing
        self.at = None

    def record(self):
        Event.now += 1
        self.at = Event.now

    def elapsed_time(self, end):
        return (end.at - self.at) * 0.001


class Graph:
    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1
        Event.now += 80


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda as far as timing uses it; tensors stay on the CPU."""
    Event.now = 0
    empty = torch.empty

    @contextmanager
    def graph(captured):
        Event.capturing = True
        try:
            yield
        finally:
            Event.capturing = False

    stand_in = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "synchronize": lambda device: None,
        "memory_allocated": lambda device: 1 << 20,
        "max_memory_allocated": lambda device: 3 << 20,
        "reset_peak_memory_stats": lambda device: None,
        "empty_cache": lambda: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=64),
    }
    for name, value in stand_in.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", lambda *args, device=None, **kwargs: empty(*args, **kwargs))
    return torch.device("cuda")


def test_a_gpu_is_timed_with_events_and_graphs(cuda):
    measuring = Session(cuda, LIMITS)
    job = Job("hqq_oft", "forward", lambda i: None, (Cost(1e3, 0),), copies=3, graph=True)
    eager, graph = measuring.run(Case("ops", "a case", 0, frozenset(), {}, lambda _: [job]))
    assert (eager["mode"], eager["p50_us"], eager["peak_mib"]) == ("eager", pytest.approx(1), 2.0)
    # an event to the next is 1 us, a replay 80 us, and it holds three sets of buffers three times
    assert (graph["mode"], graph["p50_us"]) == ("graph", pytest.approx(81 / 9))


def test_all_of_a_phase_are_replayed_where_one_is_short_and_a_failed_capture_is_one_row(cuda, monkeypatch):
    def slow(number):
        Event.now += 500  # time of the launches only: the device needs far less

    def uncapturable(number):
        if Event.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        Event.now += 500

    jobs = [
        Job("hqq_oft", "forward", slow, (Cost(1e4, 0),), graph=True),
        Job("dense", "forward", slow, (Cost(1e9, 0),), graph=True),
        Job("PEFT OFT", "forward", uncapturable, (Cost(1e4, 0),), graph=True),
        Job("hqq_oft", "backward", slow, (Cost(1e9, 0),), graph=True),
    ]
    rows = list(Session(cuda, LIMITS).run(Case("ops", "a case", 0, frozenset(), {}, lambda _: jobs)))
    found = {(row["contender"], row["phase"], row["mode"]): row["status"] for row in rows}
    assert [key for key in found if key[2] == "graph"] == [(j.contender, "forward", "graph") for j in jobs[:3]]
    assert found["PEFT OFT", "forward", "graph"].startswith("failed: RuntimeError: operation not permitted")
    assert found["PEFT OFT", "forward", "eager"] == found["dense", "forward", "graph"] == "measured"


# --- Targets and tables ----------------------------------------------------------------------------------------------


def row_of(case, contender, p50, phase="forward", mode="eager", suite="layer", **more):
    row = {"suite": suite, "case": case, "contender": contender, "phase": phase, "mode": mode, "status": "measured"}
    return row | {"p50_us": p50} | more


def test_targets_are_judged_by_their_worst_value():
    first = targets.GPU[0]
    assert first.verdict(targets.Results([])) == ("not measured", "")
    where = [f"4096x4096 M={m} {targets.MAIN}" for m in (4096, 8192)]
    rows = [row_of(where[0], "hqq_oft", 110, "full"), row_of(where[0], "dense", 100, "full")]
    assert first.verdict(targets.Results(rows)) == ("reached", f"1.1x at {where[0]} (of 1)")
    rows += [row_of(where[1], "hqq_oft", 250, "full"), row_of(where[1], "dense", 200, "full")]
    assert first.verdict(targets.Results(rows)) == ("missed", f"1.25x at {where[1]} (of 2)")
    # a graph is compared with a graph
    decode = f"28672x8192 M=1 {targets.MAIN}"
    rows = [row_of(decode, "hqq_oft", 40, mode="graph"), row_of(decode, "hqq_oft", 90), row_of(decode, "dense", 120)]
    assert list(targets.Results(rows).ratio("layer", decode, "forward", "dense", "hqq_oft")) == [(decode, 120 / 90)]
    rows.append(row_of(decode, "dense", 110, mode="graph"))
    assert list(targets.Results(rows).ratio("layer", decode, "forward", "dense", "hqq_oft")) == [(decode, 110 / 40)]


@pytest.mark.parametrize(("profile", "wanted"), [("gpu", targets.GPU), ("cpu", targets.CPU)])
def test_every_target_finds_its_rows(profile, wanted):
    """Rows with every name that the suites of a profile produce leave no target unmeasured."""
    phases = ("forward", "backward", "full", "dequantize", "dequantize_rotate", "rotate", "rotate without requantizing",
              "training process")  # fmt: skip
    names = ("hqq_oft", "hqq_oft, no rotation", *report.BASELINES)
    columns = {"limit_percent": 50.0, "kept_mib": 0.1, "peak_mib": 300.0}
    rows = [
        row_of(case.name, name, 10.0, phase, suite=suite, **columns)
        for suite in ("ops", "layer", "merge", "model")
        for case in cases(suite, PROFILES[profile])
        for name in names
        for phase in phases
    ]
    results = targets.Results(rows)
    assert [target.text for target in wanted if target.verdict(results)[0] == "not measured"] == []


def test_a_table_has_ratios_and_the_last_run_of_each_case():
    first, second, third = row_of("a", "hqq_oft", 30.0), row_of("a", "dense", 60.0), row_of("a", "hqq_oft", 20.0)
    other = row_of("b", "HQQ", 1.0)
    assert report.latest([first, second, third, other]) == [third, other]
    assert [row["x dense"] for row in report.with_ratios(report.latest([first, second]))] == [2.0, 1.0]


# --- Running on a GPU machine ----------------------------------------------------------------------------------------


def test_a_part_that_runs_too_long_is_stopped_and_its_output_kept(tmp_path, capsys):
    log = tmp_path / "log"
    code = "import time; print('begun', flush=True); time.sleep(60)"
    assert gpu.run([gpu.sys.executable, "-c", code], 3, log) == 124
    assert log.read_text().startswith("begun\n")
    assert gpu.run([gpu.sys.executable, "-c", "raise SystemExit(3)"], 30, log) == 3


def test_stopping_a_part_kills_its_child_processes(tmp_path):
    """Remaining workers of a test run would compete for the GPU with the next measurement."""
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
        "print(p.pid, flush=True); p.wait()"
    )
    log, calls = tmp_path / "log", []
    assert gpu.run([gpu.sys.executable, "-c", parent], 4, log, lambda: calls.append(1)) == 124
    status = Path(f"/proc/{int(log.read_text().split()[0])}/status")
    end = time.monotonic() + 10  # a killed process takes a moment to exit
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert time.monotonic() < end
    assert calls


@pytest.fixture
def sigint():
    """Sets the SIGINT handler of this process until the end of the test."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_a_part_can_be_interrupted_if_the_runner_was_started_with_sigint_ignored(tmp_path, sigint):
    sigint(signal.SIG_IGN)
    code = (
        "import time\ntry: print('started', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('interrupted')"
    )
    assert gpu.run([gpu.sys.executable, "-c", code], 3, tmp_path / "log") == 124
    assert (tmp_path / "log").read_text() == "started\ninterrupted\n"


def test_an_interrupted_test_run_still_reports(tmp_path, sigint):
    sigint(signal.default_int_handler)  # a child of a process that ignores SIGINT would ignore it too
    slow = (
        "import pathlib, time\ndef test_linear(): pass\ndef test_rotate(): pathlib.Path({!r}).touch(); time.sleep(60)\n"
    )
    begun, junit = tmp_path / "begun", tmp_path / "junit.xml"
    (tmp_path / "test_slow.py").write_text(slow.format(str(begun)))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", f"--junitxml={junit}", str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 100
    while not begun.exists() and time.monotonic() < end:
        time.sleep(0.1)
    gpu._stop(process)
    assert process.poll() is not None
    assert 'name="test_linear"' in junit.read_text()


def test_results_are_packed_in_one_archive(tmp_path):
    for name in ("results", "logs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "raw.jsonl").write_text(name)
    gpu.archive([tmp_path / "results", tmp_path / "logs"], tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as tar:
        assert sorted(tar.getnames()) == ["logs/raw.jsonl", "results/raw.jsonl"]


def test_packing_refuses_missing_and_platform_specific_wheels(tmp_path, monkeypatch):
    def wheels(*names):
        def pip(*arguments):
            for name in names:
                (tmp_path / name).write_bytes(b"x")

        monkeypatch.setattr(pack, "pip", pip)
        return pack.pack(tmp_path)

    plain = [f"p{number}-1-py3-none-any.whl" for number in range(len(pack.PACKAGES))]
    assert [wheel.name for wheel in wheels(*plain)] == plain
    with pytest.raises(RuntimeError, match=r"one platform alone: q-1-cp311-cp311-linux_x86_64\.whl"):
        wheels("q-1-cp311-cp311-linux_x86_64.whl")
    with pytest.raises(RuntimeError, match="1 wheels"):
        wheels(plain[0])


def test_columns_of_a_row_are_in_the_table():
    measuring = Session(CPU, LIMITS, budget=0.001, identity={"device": "d", "commit": "c", "torch": "t", "triton": "3"})
    (row,) = measuring.run(case_of(lambda _: None))
    assert set(row) <= set(session.COLUMNS)
    assert json.loads(json.dumps(row)) == row
