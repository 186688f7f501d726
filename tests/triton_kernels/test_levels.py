"""Levels by bit operations: exact for every byte in the interpreter; the PTX form computes the same bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from hqq_oft.triton_kernels import _levels

DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
FIELDS = [(bits, field) for bits in (8, 4, 2, 1) for field in range(8 // bits)]


@triton.jit
def digits_kernel(p, out, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    o = tl.arange(0, 256)
    DIGITS: tl.constexpr = _levels.digits(BITS, DTYPE)
    packed = tl.load(p + o)
    for field in tl.static_range(8 // BITS):
        for i in tl.static_range(DIGITS):
            tl.store(out + (field * DIGITS + i) * 256 + o, _levels.digit(packed, field, i, BITS, DTYPE, PTX))


@triton.jit
def float32_kernel(p, out, BITS: tl.constexpr, PTX: tl.constexpr):
    o = tl.arange(0, 256)
    packed = tl.load(p + o)
    for field in tl.static_range(8 // BITS):
        tl.store(out + field * 256 + o, _levels.level_float32(packed, field, BITS, PTX))


@triton.jit
def halves_kernel(p, out, DTYPE: tl.constexpr):
    o = tl.arange(0, 16)
    word = tl.load(p.to(tl.pointer_type(tl.uint32)) + o)
    tl.store(out + 2 * o, _levels.half_of(word, 0, DTYPE))
    tl.store(out + 2 * o + 1, _levels.half_of(word, 1, DTYPE))


def expected(bits, field):
    return (torch.arange(256) >> (8 - bits * (field + 1))) & ((1 << bits) - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_digits_add_up_to_the_level_and_its_bias(dtype, bits):
    count = int(_levels.digits(bits, DTYPES[dtype]))
    assert count == (2 if (bits, dtype) == (8, torch.bfloat16) else 1)
    out = torch.full((8 // bits, count, 256), float("nan"), dtype=dtype)
    digits_kernel[(1,)](torch.arange(256, dtype=torch.uint8), out, bits, DTYPES[dtype], False)
    for field in range(8 // bits):
        bias = float(_levels.level_bias(field, bits, DTYPES[dtype]))
        assert torch.equal(out[field].double().sum(0) - bias, expected(bits, field).double())


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_levels_in_float32(bits):
    out = torch.full((8 // bits, 256), float("nan"))
    float32_kernel[(1,)](torch.arange(256, dtype=torch.uint8), out, bits, False)
    levels = torch.stack([expected(bits, field) for field in range(8 // bits)])
    assert torch.equal(out - float(_levels.float32_bias(bits)), levels.float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_of_halves(dtype):
    values, out = torch.randn(32).to(dtype), torch.full((32,), float("nan"))
    halves_kernel[(1,)](values, out, DTYPES[dtype])
    assert torch.equal(out, values.float())


def run_ptx(source: str, byte_word: int, outputs: int) -> list[int]:
    """Evaluate the few PTX instructions that the decode uses on one register of four bytes."""
    registers = {f"${outputs}": byte_word}
    value = lambda name: registers[name] if name in registers else int(name, 0)  # noqa: E731
    for line in source.strip("{} \n").replace("\n", " ").split(";"):
        operation, _, operands = line.strip().partition(" ")
        names = [name.strip() for name in operands.split(",")]
        if operation == "prmt.b32":
            both = value(names[1]) | value(names[2]) << 32
            parts = [(both >> 8 * ((value(names[3]) >> 4 * i) & 7)) & 255 for i in range(4)]
            registers[names[0]] = int.from_bytes(bytes(parts), "little")
        elif operation == "shr.u32":
            registers[names[0]] = value(names[1]) >> value(names[2])
        elif operation == "and.b32":
            registers[names[0]] = value(names[1]) & value(names[2])
        elif operation == "mov.b32":
            registers[names[0]] = value(names[1])
        elif operation == "lop3.b32":
            assert value(names[4]) == 0xEA  # (a & b) | c
            registers[names[0]] = (value(names[1]) & value(names[2])) | value(names[3])
        else:
            assert operation in ("", ".reg"), operation
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize(("bits", "field"), FIELDS)
def test_the_ptx_computes_the_same_bits(bits, field):
    levels = expected(bits, field)
    for dtype, name in DTYPES.items():
        count = int(_levels.digits(bits, name))
        for first in range(0, 256, 4):
            word = int.from_bytes(bytes(range(first, first + 4)), "little")
            total = torch.zeros(4, dtype=torch.float64)
            for i in range(count):
                lanes = run_ptx(_levels._digit_ptx(field, i, bits, name), word, 2)
                total += torch.tensor(lanes, dtype=torch.uint32).view(dtype).double()
            assert torch.equal(total - float(_levels.level_bias(field, bits, name)), levels[first : first + 4].double())
    for first in range(0, 256, 4):
        word = int.from_bytes(bytes(range(first, first + 4)), "little")
        floats = torch.tensor(run_ptx(_levels._float32_ptx(field, bits), word, 4), dtype=torch.uint32).view(
            torch.float32
        )
        assert torch.equal(floats - (128.0 if bits < 8 else 2.0**23), levels[first : first + 4].float())


@triton.jit
def rows_kernel(p, out, FIELD: tl.constexpr, BITS: tl.constexpr):
    o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    q = _levels.row_digit(tl.load(p + o), FIELD, 0, BITS, tl.float16, False)
    tl.store(out + o, _levels.original_columns(q))


@pytest.mark.parametrize(("bits", "field"), FIELDS)
def test_levels_of_pairs_of_rows(bits, field):
    out = torch.full((256,), float("nan"), dtype=torch.float16)
    rows_kernel[(1,)](torch.arange(256, dtype=torch.uint8), out, field, bits)
    bias = float(_levels.level_bias(field, bits, tl.float16))
    assert torch.equal(out.double() - bias, expected(bits, field).double())


@pytest.mark.parametrize(("bits", "field"), FIELDS)
def test_the_ptx_pairs_the_rows(bits, field):
    """Each output holds a column of both rows, the even one in its low half."""
    for dtype, name in DTYPES.items():
        count = int(_levels.digits(bits, name))
        for first in range(0, 256, 8):
            even, odd = (int.from_bytes(bytes(range(i, i + 4)), "little") for i in (first, first + 4))
            total = torch.zeros(8, dtype=torch.float64)
            for i in range(count):
                source = _levels._row_digit_ptx(field, i, bits, name).replace("$5", hex(odd))
                total += torch.tensor(run_ptx(source, even, 4), dtype=torch.uint32).view(dtype).double()
            levels = torch.stack(expected(bits, field)[first : first + 8].split(4), 1).flatten()
            assert torch.equal(total - float(_levels.level_bias(field, bits, name)), levels.double())


COMPILE = """
import sys
sys.path.insert(0, {folder!r})
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from test_levels import digits_kernel, float32_kernel

def ptx(kernel, out, **constants):
    source = ASTSource(kernel, dict(p="*u8", out="*" + out), constexprs=dict(constants, PTX=True))
    text = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "cvt.rn" not in text, text
    return text

for bits in (8, 4, 2, 1):
    for dtype, name in ((tl.bfloat16, "bf16"), (tl.float16, "fp16")):
        assert ptx(digits_kernel, name, BITS=bits, DTYPE=dtype).count("lop3.b32") >= 2 * (8 // bits)
    assert ptx(float32_kernel, "fp32", BITS=bits).count("prmt.b32") >= 4 * (8 // bits)
"""


def test_the_ptx_compiles_without_conversions():
    source = COMPILE.format(folder=os.path.dirname(__file__))
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
