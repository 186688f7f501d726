"""Modelled times of whole calls: what is launched, what it moves, the multiprocessor with most blocks."""

from __future__ import annotations

import ast
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

ROOT = Path(__file__).parents[2]
MULTIPROCESSORS, CLOCK = 132, 1.755  # of sm_90
CASES = {
    "decode": (1, 4096, 4096, False),
    "backward": (16, 4096, 14336, True),
    "prefill": (4096, 28672, 8192, False),
    "training": (4096, 28672, 8192, True),
}
# A roofline of 1000 bytes and cycles per iteration and 500 cycles for the rest replaces compilation.
SCRIPT = f"""
from dataclasses import astuple
from tests import modelled, sass
once, hot = (dict.fromkeys(sass.PIPES, 0.0) | {{"alu": cycles}} for cycles in (500.0, 1000.0))
modelled._roofline = lambda launch: sass.Roofline("sm_90", 1000, hot, once, 3, 2, ())
quantizing = modelled.quantizing()
modelled.quantizing = lambda: ""
print({{name: [astuple(part) for part in modelled.parts(*case)] for name, case in {CASES!r}.items()}})
print(repr(modelled.report("Triton 0")))
print(repr(quantizing))
"""


@pytest.fixture(scope="module")
def printed():
    """In a process of its own, where kernels are not interpreted."""
    environment = {**os.environ, "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [ast.literal_eval(line) for line in done.stdout.splitlines()]


@pytest.fixture
def parts(printed):
    """Case -> operation, microseconds of instructions, bytes and blocks of each launch."""
    return printed[0]


@pytest.fixture
def page(printed):
    return printed[1]


def test_a_product_for_few_tokens_streams_the_packed_weight(parts):
    ((operation, instructions, moved, blocks),) = parts["decode"]
    weight = 4096 * 4096 * 0.5625
    assert operation == "linear"
    assert moved == weight + 2 * (4096 + 4096)
    of_the_busiest = math.ceil(blocks / MULTIPROCESSORS)
    cycles = 500 + 1000 * math.ceil(weight / blocks / 1000)
    assert instructions == pytest.approx(of_the_busiest * cycles / CLOCK / 1e3)


def test_backward_rotates_too(parts):
    product, rotation = parts["backward"]
    assert [product[0], rotation[0]] == ["linear_backward", "rotate_backward"]
    assert rotation[2] == 3 * 16 * 14336 * 2


@pytest.mark.parametrize("case", ["prefill", "training"])
def test_chunks_of_the_scratch_cover_the_weight(parts, case):
    m, n, k, _ = CASES[case]
    decoded = [moved for operation, _, moved, _ in parts[case] if operation.startswith("dequantize")]
    assert len(decoded) > 1
    assert sum(decoded) == pytest.approx(n * k * 2.5625)
    products = [instructions for operation, instructions, _, _ in parts[case] if operation == "GEMM"]
    assert sum(products) == pytest.approx(m * n * k / (2048 * MULTIPROCESSORS * CLOCK * 1e3))


def test_the_page_lists_every_layer_and_number_of_tokens(page):
    assert "Modelled, not measured" in page
    rows = [line.split("|") for line in page.splitlines() if "| forward |" in line or "| backward |" in line]
    assert len(rows) == 6 * 6 * 2
    for row in rows:  # no launch takes less than its bytes or its instructions
        instructions, h100, h200, modelled_h100, modelled_h200 = map(float, row[-6:-1])
        assert modelled_h100 >= max(instructions, h100) - 0.2
        assert modelled_h200 >= max(instructions, h200) - 0.2


def test_the_quantizer_takes_few_instructions_and_no_less_time_than_its_bytes(printed):
    rows = [list(map(float, line.split("|")[1:-1])) for line in printed[2].splitlines()[2:]]
    assert [row[0] for row in rows] == [1, 0]
    for _, per_weight, solver, packing, h100, h200, modelled_h100, modelled_h200 in rows:
        assert 8 < per_weight <= 18
        assert modelled_h100 >= max(solver + packing, h100) - 0.2
        assert modelled_h200 >= max(solver + packing, h200) - 0.2
