"""The runner: resuming, failures, refusals, what a row has; and how it times on a GPU, on a stand-in."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from bench import environment, report, run, timing
from bench.cases import Case, Job, Kind
from bench.model import Cost
from bench.run import Session
from bench.timing import Limits
from hqq_oft.ops.table import OPERATIONS

LIMITS = Limits(bandwidth=1e10, rate=1e11)
CPU = torch.device("cpu")


def session(**options):
    return Session(CPU, LIMITS, 0.001, 1, identity={"device": "here"}, **options)


def case_of(*calls, name="a case", operations=("linear",), names=("hqq_oft", "PEFT OFT")):
    def jobs(session):
        return [Job(who, "forward", call, (Cost(1e6, 1e6),)) for who, call in zip(names, calls, strict=False)]

    return Case(Kind("ops", name, frozenset(operations), jobs), 0, {})


def broken(number):
    raise ValueError("no such thing\nat all")


def nothing(number):
    return None


def test_a_killed_run_resumes(tmp_path):
    raw, identity = tmp_path / "raw.jsonl", {"device": "here"}
    todo = [case_of(nothing, nothing, name=name) for name in ("a", "b", "c")]
    assert run.measure(todo, session(), raw, until=0) == []
    assert run.read_rows(raw) == []
    assert run.measure(todo, session(), raw) == []
    lines = raw.read_text().splitlines()
    raw.write_text("\n".join(lines[:2]) + '\n{"suite": "ops", "ca')
    kept = run.read_rows(raw)
    assert len(kept) == 2
    done = run.finished(raw, identity)
    assert done == {("ops", "a")}
    assert run.measure([case for case in todo if ("ops", case.name) not in done], session(), raw) == []
    rows = run.read_rows(raw)
    assert rows[:2] == kept
    assert [row["case"] for row in rows] == ["a", "a", "b", "b", "c", "c"]


def test_the_command_measures_reports_and_does_not_repeat(tmp_path, monkeypatch):
    case = case_of(nothing, nothing, operations=())
    monkeypatch.setattr(run, "cases", lambda suite, device: [case] if suite == "ops" else [])
    monkeypatch.setattr(Limits, "measure", lambda device: LIMITS)
    command = ["--device", "cpu", "--out", str(tmp_path), "--budget", "0"]
    for _ in range(2):
        assert run.main(command) == 0
        assert len(run.read_rows(tmp_path / "raw.jsonl")) == 2
    assert run.main([*command, "--again"]) == 0
    assert len(run.read_rows(tmp_path / "raw.jsonl")) == 4
    assert "a case" in (tmp_path / "README.md").read_text()


def test_a_failed_case_is_reported_and_tried_again(tmp_path):
    raw, measuring = tmp_path / "raw.jsonl", session()
    todo = [case_of(broken, name="first"), case_of(nothing, name="second")]
    assert run.measure(todo, measuring, raw) == ["ops: first: all: ValueError: no such thing"]
    rows = run.read_rows(raw)
    assert [row["status"] for row in rows] == ["failed: ValueError: no such thing", "measured"]
    assert run.finished(raw, {"device": "here"}) == {("ops", "second")}
    assert run.finished(raw, {"device": "elsewhere"}) == set()
    page = report.latest(rows)
    assert list(page.case) == ["first", "second"]
    assert run.measure([case_of(nothing, name="first")], measuring, raw) == []
    assert set(report.latest(run.read_rows(raw)).status) == {"measured"}


def test_a_baseline_that_fails_costs_its_own_row_only(tmp_path):
    raw = tmp_path / "raw.jsonl"
    assert run.measure([case_of(nothing, broken)], session(), raw) == [
        "ops: a case: PEFT OFT: ValueError: no such thing"
    ]
    found = {row["contender"]: row["status"] for row in run.read_rows(raw)}
    assert found == {"PEFT OFT": "failed: ValueError: no such thing", "hqq_oft": "measured"}
    assert run.finished(raw, {"device": "here"}) == {("ops", "a case")}  # it would fail again


def test_changed_sources_are_measured_again(tmp_path, monkeypatch):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    code, result = tmp_path / "bench" / "run.py", tmp_path / "bench" / "results" / "results.json"
    code.write_text("1")
    first = environment.sources()
    result.write_text("a result changes nothing")
    assert environment.sources() == first
    code.write_text("2")
    assert environment.sources() != first


def test_operations_with_failing_tests_are_refused(tmp_path):
    junit = tmp_path / "junit.xml"

    def red(*cases):
        junit.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
        return run.red_operations("cpu", junit)

    passed = '<testcase name="test_it[linear]"/>'
    failed = '<testcase name="test_it[rotate_backward-bf16]"><failure/></testcase>'
    assert red(passed) == frozenset()
    assert red(passed, failed) == {"rotate_backward"}
    assert red(passed, '<testcase name="test_other"><error/></testcase>') == set(OPERATIONS)
    assert red('<testcase name="test_it[linear]"><skipped/></testcase>') == set(OPERATIONS)
    called = []
    (row,) = session(red=frozenset({"linear"})).run(case_of(called.append))
    assert row["status"] == "refused: the tests of linear fail"
    assert not called
    assert "p50_us" not in row
    with pytest.raises(FileNotFoundError):
        run.red_operations("cpu", tmp_path / "lost.xml")


def test_a_row_compares_its_time_with_the_prediction():
    (row,) = session().run(case_of(lambda _: sum(range(20000))))
    assert row["status"] == "measured"
    assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    assert row["predicted_us"] == pytest.approx(100)  # 1 MB at 10 GB/s
    assert row["over_predicted"] == pytest.approx(row["p50_us"] / 100)
    assert row["gb_per_s"] == pytest.approx(1e-3 * 1e6 / row["p50_us"])
    assert row["device"] == "here"
    assert json.loads(json.dumps(row)) == row


def test_contenders_take_turns_with_all_their_buffers():
    seen = []
    calls = {"a": (lambda i: seen.append(("a", i)), 2), "b": (lambda i: seen.append(("b", i)), 1)}
    found = timing.take_turns(calls, CPU, 0.001, rounds=3)
    assert all(value.repeats >= 3 for value in found.values())
    names = [name for name, _ in seen]
    assert sum(first != second for first, second in itertools.pairwise(names)) == 5
    assert {i for name, i in seen if name == "a"} == {0, 1}


def test_memory_kept_for_backward_is_counted_without_what_stays_anyway():
    x, w = torch.randn(256, 1024, requires_grad=True), torch.randn(1024, 1024, requires_grad=True)
    assert timing.kept_mib(lambda: x @ w) == 0
    assert timing.kept_mib(lambda: (x @ w).exp().square()) == 1


# --- The parts that only a GPU runs, on a stand-in -------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch):
    """A session on a GPU whose calls say what they take: eager, and of the device alone."""
    testing = pytest.importorskip("triton.testing")
    monkeypatch.setattr(testing, "do_bench", lambda call, **_: [call()[0] / 1e3] * 3)
    monkeypatch.setattr(testing, "do_bench_cudagraph", lambda call, *_, **__: [call()[1] / 1e3] * 3)
    for name, value in {"synchronize": None, "memory_allocated": 1 << 20, "max_memory_allocated": 3 << 20,
                        "reset_peak_memory_stats": None, "empty_cache": None}.items():  # fmt: skip
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    return Session(torch.device("cuda"), LIMITS, 0.01)


def test_a_phase_is_replayed_from_graphs_where_a_call_is_short_and_a_failed_capture_is_one_row(cuda):
    def slow(number):
        return 500, 8  # launches only: the device needs far less

    def uncapturable(number):
        raise RuntimeError("operation not permitted when stream is capturing")

    capturing = []

    def peft(number):
        capturing.append(number)
        return slow(number) if len(capturing) < 6 else uncapturable(number)

    jobs = [
        Job("hqq_oft", "forward", slow, (Cost(1e4, 0),), 3, graph=True),
        Job("dense", "forward", slow, (Cost(1e9, 0),), graph=True),
        Job("PEFT OFT", "forward", peft, (Cost(1e4, 0),), graph=True),
        Job("hqq_oft", "backward", slow, (Cost(1e9, 0),), graph=True),
    ]
    cuda.rounds = 3
    case = Case(Kind("ops", "a case", frozenset(), lambda session: jobs), 0, {})
    rows = list(cuda.run(case))
    found = {(row["contender"], row["phase"], row["mode"]): row["status"] for row in rows}
    assert [key for key in found if key[2] == "graph"] == [(job.contender, "forward", "graph") for job in jobs[:3]]
    assert found["PEFT OFT", "forward", "graph"].startswith("failed: RuntimeError: operation not permitted")
    assert found["PEFT OFT", "forward", "eager"] == found["dense", "forward", "graph"] == "measured"
    first = rows[0]
    assert (first["mode"], first["p50_us"], first["peak_mib"]) == ("eager", pytest.approx(500), 2.0)
    assert next(row["p50_us"] for row in rows if row["mode"] == "graph") == pytest.approx(8)
