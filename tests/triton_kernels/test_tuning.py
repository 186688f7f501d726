"""`bench.tune` in the interpreter: it writes a valid table, resumes, and leaves out wrong tiles."""

from __future__ import annotations

import json
from dataclasses import replace

import torch
from hqq_oft.triton_kernels import _tiles, linear

from bench import tune

SMALL = ((128, 128),)


def test_tuning_writes_a_table_and_resumes(tmp_path):
    log, shipped = tmp_path / "tune.jsonl", dict(_tiles.table("default"))
    ranges = [replace(target, m=min(target.m, 64)) for target in tune.RANGES]
    plan = {target: target.candidates("default")[:2] for target in ranges}

    def tuned():
        return tune.tuned(tune.Tuner(torch.device("cpu"), log, float("inf"), SMALL, "fp16"), plan, (64,))

    table = json.loads(tune.table_text(tuned()))
    assert set(table) == set(_tiles.table("default")) - {"linear_backward_general"}  # of rare layouts
    with _tiles.using(table):
        for operation in set(table) - {"regimes"}:
            assert len(_tiles.tiles("default", operation)) == len([t for t in plan if t.operation == operation])
        regimes = _tiles.table("default")["regimes"]
        assert set(regimes) == {"scratch_from_m", "backward_scratch_from_m"}
        assert all(rows in (64, 128) for rows in regimes.values())
    assert _tiles.table("default") == shipped
    trials = log.read_text().splitlines()
    assert len(trials) >= len(plan)
    tuned()
    assert log.read_text().splitlines() == trials


def test_each_threshold_is_measured_on_its_own_operation(tmp_path, monkeypatch):
    tuner = tune.Tuner(torch.device("cpu"), tmp_path / "log", float("inf"), SMALL, "fp16")

    def mean(operation, m):
        """The fused forward is faster up to 100 rows, the fused backward up to 40."""
        scratch = _tiles.table("default")["regimes"]["scratch_from_m"] == 0
        return {"linear_rotated": 100, "linear_backward": 40}[operation] if scratch else m

    monkeypatch.setattr(tuner, "_mean", mean)
    regimes = tune.tuned(tuner, {}, (32, 64, 128, 256))["regimes"]
    assert regimes == {"scratch_from_m": 128, "backward_scratch_from_m": 64}


def test_the_text_of_a_table_has_a_tile_to_a_line():
    text = (tune.ROOT / "kernels" / "configs" / "default.json").read_text()
    assert tune.table_text(json.loads(text)) == text


def test_a_tile_with_wrong_results_is_left_out(tmp_path, monkeypatch, capsys):
    plan = linear.plan_fused_linear

    def broken(x, *args):
        product, right = plan(x, *args), _tiles.choose(x, "linear", 16).bn == 128
        return lambda *call: product(*call) if right else product(*call) + 1

    monkeypatch.setattr(linear, "plan_fused_linear", broken)
    target = next(t for t in tune.RANGES if (t.operation, t.m) == ("linear", 16))
    tuner = tune.Tuner(torch.device("cpu"), tmp_path / "log", float("inf"), SMALL, "fp16")
    first, *others = target.candidates("default")
    wrong = next(tile for tile in others if tile.bn == 256)
    assert tuner.best(target, [first, wrong]) == first
    assert tuner.time(target, wrong) is None
    assert tuner.time(target, first) is not None
    assert "WRONG: linear" in capsys.readouterr().out


def test_changes_of_tiles_end_with_their_block():
    before = _tiles.tiles("default", "linear")
    with _tiles.using({"linear": [dict(vars(before[0]), m=7)]}):
        assert [tile.m for tile in _tiles.tiles("default", "linear")] == [7]
    assert _tiles.tiles("default", "linear") == before
