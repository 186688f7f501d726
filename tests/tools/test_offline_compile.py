"""Every kernel compiles for every target as its launcher launches it, without spills; the checks detect faults."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
REPRESENTATIVE = ("sm_90", "gfx942")  # without --all-targets: NVIDIA with wgmma, and AMD


@pytest.fixture
def offline():
    return importlib.import_module("offline")


def kernels():
    """Names of all kernels in the sources, without `_kernel`."""
    found = set()
    for file in (ROOT / "kernels" / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                assert any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list), node.name
                found.add(node.name.removesuffix("_kernel"))
    return found


def tables(page):
    """Heading -> the rows of the table below it, by column."""
    found = {}
    for part in page.split("\n## ")[1:]:
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line[:2] == "| "]
        found[part.splitlines()[0]] = [dict(zip(cells[0], row, strict=True)) for row in cells[1:]] if cells else []
    return found


def test_kernels_compile_for_every_target_within_their_limits(offline, pytestconfig):
    targets = TARGETS if pytestconfig.getoption("--all-targets") else REPRESENTATIVE
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)  # compiled, not interpreted
    command = [sys.executable, "-m", "tests.offline", "--targets", *targets]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    found = tables(done.stdout)
    resources = {row["kernel"]: row for row in found["Resources of all kernels"]}
    assert "linear_fwd" in kernels()
    assert set(resources) == kernels()
    assert all(row[target] for row in resources.values() for target in targets)
    for kernel in (name for name in kernels() if name.startswith(("linear", "rotate"))):
        dtypes = {"fp16", "bf16", "fp32"} if kernel.startswith("rotate") else {"fp16", "bf16"}
        assert set(resources[kernel]["dtypes"].split()) == dtypes, kernel
    hot = {(row["kernel"].partition(",")[0], row["target"]) for row in found["Rooflines of the hot kernels"]}
    rooflines = [target for target in targets if target in ("sm_80", "sm_90", "sm_100")]
    assert hot >= {(case.name, target) for case in offline.hot_kernels.MAIN for target in rooflines}
    formats = {row["kernel"].partition(",")[0] for row in found["Other formats and blocks, on sm_90"]}
    assert formats == {case.name for case in offline.hot_kernels.FORMATS}


def compiled(offline, target="sm_90", **changes):
    """A compiled decode product without faults."""
    constants = (("BM", 16), ("BN", 128), ("BK", 64), ("BANDED", True), ("BITS", 4), ("AXIS", 1))
    launch = offline.Launch("linear_fwd_kernel", "M=16", "", (("x_ptr", "*bf16"),), constants, (), (("num_warps", 4),))
    good = offline.Compiled(launch, target, 128, 0, 64 * 1024, "mma.sync", "cp.async 16, ld 16/2")
    return replace(good, **changes)


def with_constants(result, **changes):
    constants = {**dict(result.launch.constants), **changes}
    return replace(result, launch=replace(result.launch, constants=tuple(constants.items())))


def test_a_correct_kernel_has_no_faults(offline):
    assert offline.faults(compiled(offline)) == []
    wide = with_constants(compiled(offline, matrix="wgmma", loads="ld 8/2"), BM=64)
    assert offline.faults(wide) == []


def test_spills_are_a_fault(offline):
    assert offline.faults(compiled(offline, spills=8)) == ["8 bytes spilled"]


def test_a_product_contracted_with_a_sum_where_it_must_not_be_is_a_fault(offline):
    assert offline.faults(compiled(offline, fused=True)) == ["a product contracted with a sum"]


@pytest.mark.parametrize(("target", "limit"), [("sm_80", 163), ("sm_89", 99), ("sm_90", 227), ("sm_100", 227)])
def test_too_much_shared_memory_is_a_fault(offline, target, limit):
    assert offline.faults(compiled(offline, target, shared=limit * 1024)) == []
    (fault,) = offline.faults(compiled(offline, target, shared=limit * 1024 + 1))
    assert f"the limit is {limit} KiB" in fault


def test_a_product_without_matrix_units_is_a_fault(offline):
    assert offline.faults(compiled(offline, matrix="")) == ["no matrix instruction"]


def test_a_high_tile_without_wgmma_on_hopper_is_a_fault(offline):
    high = with_constants(compiled(offline), BM=64)
    assert offline.faults(high) == ["mma.sync in place of wgmma"]
    assert offline.faults(replace(high, target="sm_80")) == []
    assert offline.faults(with_constants(high, BM=32)) == []


@pytest.mark.parametrize("loads", ["", "ld 8/2", "cp.async 8, ld 4/2", "cp.async 4"])
def test_narrow_loads_are_a_fault_in_decoding(offline, loads):
    narrow = compiled(offline, loads=loads)
    assert offline.faults(narrow) == [f"no 16-byte loads, but {loads}"]
    assert offline.faults(with_constants(narrow, BANDED=False)) == []


def test_loads_of_single_bytes_are_a_fault_in_decoding(offline):
    assert offline.faults(compiled(offline, loads="cp.async 16, ld 4/1")) == ["loads of single bytes"]


def test_a_fault_gives_exit_status_1(offline, monkeypatch, capsys):
    monkeypatch.setattr(offline._launch, "INTERPRETED", False)
    monkeypatch.setattr(offline, "launches", lambda *_: [])
    monkeypatch.setattr(offline.hot_kernels, "rows", lambda *_, **__: [])
    monkeypatch.setattr(sys, "argv", ["offline", "--processes", "1"])
    for spills, status in ((0, 0), (8, 1)):
        monkeypatch.setattr(offline, "compile_all", lambda *_, spills=spills: [compiled(offline, spills=spills)])
        with pytest.raises(SystemExit) as exited:
            offline.main()
        assert exited.value.code == status
        assert ("FAULT linear_fwd_kernel (M=16) on sm_90: 8 bytes spilled" in capsys.readouterr().err) == bool(status)


def row(offline, name="linear M=16", target="sm_90", ratio=0.7, faults=()):
    """A roofline of a given ratio."""
    sass = offline.hot_kernels.sass
    cycles = dict.fromkeys(sass.PIPES, 1.0) | {"alu": 100.0}
    rates = sass.RATES[target]
    streamed = rates.memory / ratio * 100 / (rates.multiprocessors * rates.clock / 1e3)
    roofline = sass.Roofline(target, streamed, cycles, dict.fromkeys(sass.PIPES, 0.0), 3, 2, faults)
    return offline.hot_kernels.Row(name, " ".join(name.split()[:2]), "linear_fwd", roofline)


def test_limits_hold_with_the_pinned_triton(offline):
    pinned = re.search(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert offline.hot_kernels.HELD or version("triton") != pinned


@pytest.fixture
def allowed(offline, monkeypatch):
    """Sets what is allowed."""

    def change(*entries):
        monkeypatch.setattr(offline.hot_kernels, "ALLOWED", tuple(offline.hot_kernels.Allowed(*e) for e in entries))

    change()
    return change


def test_a_ratio_above_the_target_is_a_fault_on_sm_90(offline, allowed):
    assert row(offline, ratio=0.74).roofline.ratio == pytest.approx(0.74)
    assert row(offline, ratio=0.74).faults() == []
    assert row(offline, ratio=0.76).faults() == ["ratio 0.76, the limit is 0.75"]
    assert row(offline, ratio=0.76, target="sm_100").faults() == []
    assert row(offline, "linear M=16 fp16", ratio=0.76).faults() == ["ratio 0.76, the limit is 0.75"]


def test_what_is_allowed_is_no_fault(offline, allowed):
    allowed(("linear M=16", 0.9, "CALL", "divides"))
    assert row(offline, ratio=0.89, faults=("2 CALL",)).faults() == []
    assert row(offline, ratio=0.91).faults() == ["ratio 0.91, the limit is 0.9"]
    assert row(offline, faults=("2 CALL", "2 STS.U16")).faults() == ["2 STS.U16"]
    assert row(offline, "linear M=16 fp16", faults=("2 CALL",)).faults() == ["2 CALL"]
    assert "- linear M=16: divides" in offline.report([], [row(offline)], [])


def test_a_limit_without_faults_allows_none(offline, allowed):
    allowed(("linear M=16", 0.9, "", "slow"))
    assert row(offline, faults=("2 CALL",)).faults() == ["2 CALL"]


def test_limits_that_became_loose_are_named(offline, allowed):
    allowed(("linear M=16", 1.5, "CALL", "divides"))
    assert len(offline.hot_kernels.loose([row(offline, ratio=0.8)])) == 2
    assert offline.hot_kernels.loose([row(offline, ratio=1.45, faults=("1 CALL",))]) == []


def test_a_hot_kernel_over_its_limit_gives_exit_status_1(offline, allowed, monkeypatch, capsys):
    monkeypatch.setattr(offline._launch, "INTERPRETED", False)
    monkeypatch.setattr(offline, "launches", lambda *_: [])
    monkeypatch.setattr(offline, "compile_all", lambda *_: [])
    monkeypatch.setattr(sys, "argv", ["offline", "--processes", "1"])
    for ratio, held, status in ((0.7, True, 0), (0.8, True, 1), (0.8, False, 0)):
        monkeypatch.setattr(offline.hot_kernels, "HELD", held)
        monkeypatch.setattr(offline.hot_kernels, "rows", lambda *_, ratio=ratio, **__: [row(offline, ratio=ratio)])
        with pytest.raises(SystemExit) as exited:
            offline.main()
        assert exited.value.code == status
        printed = capsys.readouterr()
        assert ("FAULT linear M=16 on sm_90: ratio 0.80" in printed.err) == bool(status)
        assert ("\n- linear M=16 on sm_90: ratio 0.80" in printed.out) == bool(status)


def test_the_page_is_short():
    page = ROOT / "bench" / "results" / "offline.md"
    assert len(page.read_text().splitlines()) <= 150


def test_interpreted_kernels_are_refused(offline, monkeypatch):
    monkeypatch.setattr(offline._launch, "INTERPRETED", True)
    monkeypatch.setattr(sys, "argv", ["offline"])
    with pytest.raises(SystemExit, match="Unset it"):
        offline.main()


def test_single_bytes_of_packed_weights_are_a_fault_in_dequantizing_too():
    offline = pytest.importorskip("offline")
    good = compiled(offline)
    for loads, faulty in (("ld 8/2", False), ("ld 8/1", True)):
        dequantize = replace(good, launch=replace(good.launch, name="dequantize_kernel"), matrix="", loads=loads)
        assert (offline.faults(dequantize) == ["loads of single bytes"]) is faulty
