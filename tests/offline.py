"""Compile every kernel, as its launcher would launch it, for GPUs that are not here: resources, rooflines, estimates.

`make offline` writes `bench/results/offline.md` and `modelled.md`. Launchers are called with tensors that have shapes
and no memory (`tests/launches.py`); what they would launch is compiled for each target by Triton's own tool chain, and
the tools that come with it read the result. `tests/hot_kernels.py` holds the hot kernels to limits of their rooflines
(`tests/sass.py`), `tests/modelled.py` estimates whole launches. While working on a kernel, in seconds:

    python -m tests.offline --kernel "linear M=16" --targets sm_90
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import triton
from hqq_oft.triton_kernels import _launch, _tiles, cayley, dequantize, linear, linear_backward, quantize, rotate
from triton.runtime.jit import JITFunction

from hqq_oft.ops.device_tables import CONFIGS
from tests import hot_kernels, modelled
from tests.hot_kernels import header, line
from tests.launches import TARGETS, Launch, compile_for, describe, packed, planned, recording, resources, tensor

SHARED_LIMIT = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227}  # KiB per block
ROTATIONS = ("rotate_fwd_kernel", "rotate_bwd_kernel")


@dataclass(frozen=True)
class Compiled:
    """What one launch takes on one target; spills are bytes of stack, `shared` is in bytes."""

    launch: Launch
    target: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    matrix: str = ""
    loads: str = ""
    fused: bool = False  # whether a product is contracted with a sum, against `enable_fp_fusion`


# --- What would be launched ------------------------------------------------------------------------------------------


def _repeated(launch: Launch) -> bool:
    """Whether to compile it for every dtype: every tile that multiplies, on one storage of the weight for each axis."""
    return launch.name in ROTATIONS or (launch.name.startswith("linear") and dict(launch.constants)["BITS"] == 4)


def launches(device: str, dtypes: tuple[torch.dtype, ...]) -> list[Launch]:
    """Every distinct launch of the cases below, with the tiles of `device`; after the first dtype `_repeated` ones."""
    found: dict[Launch, None] = {}
    label = ""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = describe(kernel, label, args, kwargs)
        if dtype == dtypes[0] or _repeated(launch):
            found[launch] = None

    with recording(device, run):
        for dtype in dtypes:
            for label, call in _cases(device, dtype):  # noqa: B007 (`run` reads it)
                call()
    # What differs in its label alone is one launch.
    unique: dict[tuple[Any, ...], Launch] = {}
    for launch in found:
        unique.setdefault((launch.name, launch.signature, launch.constants, launch.divisible, launch.options), launch)
    return list(unique.values())


def _cases(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Label and call: every kernel, at every tile of the device's table, on the layers of an 8B Llama."""

    halves = functools.partial(tensor, dtype=dtype)

    def rows(operation: str) -> list[int]:
        return [tile.m for tile in _tiles.tiles(device, operation)]

    n, k, f32 = 14336, 4096, torch.float32
    for b in (16, 32, 64, 96, 128, 256):
        v, grad = tensor(k // b, b * (b - 1) // 2, dtype=f32), tensor(k // b, b, b, dtype=f32)
        yield f"b={b}", planned(cayley.plan_cayley, v, b, 5, None, None, dtype)
        yield f"b={b}", planned(cayley.plan_cayley_backward, grad, v, b, 5, None, None)
    v, keep = tensor(k // 32, 496, dtype=f32), tensor(k // 32, dtype=torch.bool)
    grad = tensor(k // 32, 32, 32, dtype=f32)
    yield "b=32 coft dropout", planned(cayley.plan_cayley, v, 32, 5, keep, 0.1, dtype)
    yield "b=32 coft dropout", planned(cayley.plan_cayley_backward, grad, v, 32, 5, keep, 0.1)
    yield "b=32 coft", planned(cayley.plan_project_, v, 0.1)
    yield "b=32 8 terms", planned(cayley.plan_cayley, v, 32, 8, None, None, dtype)
    yield "b=32 8 terms", planned(cayley.plan_cayley_backward, grad, v, 32, 8, None, None)

    index = tensor(16, dtype=torch.int64)
    for b in (32, 96, 256):
        d = halves(k // b, b, b)
        for m in [*rows("rotate"), 4096]:
            yield f"M={m} b={b}", planned(rotate.plan_rotate, halves(m, k), d, None, False)
        for m in [*rows("rotate_backward"), 4096]:
            back = (halves(m, k), halves(m, k), d, None, False, True, True)
            yield f"M={m} b={b}", planned(rotate.plan_rotate_backward, *back)
    yield "M=16 b=32 mixed", planned(rotate.plan_rotate, halves(16, k), halves(8, k // 32, 32, 32), index, False)

    # Rotations in float32: float32 layers, and every merge.
    four = packed(n, k, 4, 1, 64, dtype)
    for b in (32, 96, 128):
        d, x = tensor(k // b, b, b, dtype=f32), tensor(4096, k, dtype=f32)
        yield f"float32 b={b}", planned(rotate.plan_rotate, x, d, None, False)
        yield f"float32 b={b}", planned(rotate.plan_rotate_backward, x, x, d, None, False, True, True)
        yield f"float32 b={b}", planned(dequantize.plan_dequantize_rotate, four, d, f32)
    d32 = halves(k // 32, 32, 32)
    product, gradient = linear.plan_fused_linear, linear_backward.plan_fused_input_gradient
    for bits, axis in ((4, 1), (4, 0), (8, 1), (3, 1), (2, 1), (1, 1)):
        weight, label, main = packed(n, k, bits, axis, 64, dtype), f"{bits} bits axis {axis}", (bits, axis) == (4, 1)
        yield label, planned(dequantize.plan_dequantize, weight, dtype)
        yield f"{label} b=32", planned(dequantize.plan_dequantize_rotate, weight, d32, dtype)
        for m in (8, 16):
            yield f"{label} M={m} b=32", planned(product, halves(m, k), weight, d32, halves(n), None)
        for m in (rows("linear"), rows("linear_general"))[axis == 0 or bits == 3]:
            yield f"{label} M={m}", planned(product, halves(m, k), weight, None, None, None)
        for m in rows("linear_backward") if main else [16]:
            yield f"{label} M={m}", planned(gradient, halves(m, n), weight)
    for b in (64, 96, 128):
        yield f"4 bits axis 1 b={b}", planned(dequantize.plan_dequantize_rotate, four, halves(k // b, b, b), dtype)
    for m, b in itertools.product((8, 16), (16, 64)):
        yield f"4 bits axis 1 M={m} b={b}", planned(product, halves(m, k), four, halves(k // b, b, b), None, None)
    for m, group in itertools.product(rows("linear"), (32, 128)):
        weight = packed(n, k, 4, 1, group, dtype)
        yield f"4 bits group {group} M={m}", planned(product, halves(m, k), weight, None, None, None)
    mixed, small = halves(8, k // 32, 32, 32), packed(1024, k, 4, 1, 64, dtype)
    yield "4 bits axis 1 M=16 b=32 mixed", planned(product, halves(16, k), four, mixed, None, index)
    yield "4 bits axis 1 N=1024 M=16 b=32", planned(product, halves(16, k), small, d32, None, None)
    for bits, group, axis in ((4, 64, 1), (4, 64, 0), (4, 128, 1), (8, 64, 1), (3, 64, 1), (3, 24, 1), (1, 1024, 1)):
        settings = 2**bits, bits, group, axis, bits == 4, 20, dtype, None
        yield f"{bits} bits group {group} axis {axis}", planned(quantize.plan_quantize, halves(3072, k), *settings)
    float32 = tensor(3072, k, dtype=f32)
    yield "float32 4 bits", planned(quantize.plan_quantize, float32, 16, 4, 64, 1, True, 20, dtype, None)


# --- What it takes ---------------------------------------------------------------------------------------------------


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile one launch for one target and read its resources."""
    compiled = compile_for(launch, target)
    if target.startswith("gfx"):
        return Compiled(launch, target, shared=compiled.metadata.shared, matrix=_amd_matrix(compiled.asm["amdgcn"]))
    ptx = compiled.asm["ptx"]
    registers, spills = resources(compiled.asm["cubin"])
    return Compiled(
        launch,
        target,
        registers,
        spills,
        compiled.metadata.shared,
        _nvidia_matrix(ptx),
        _global_loads(ptx),
        not dict(launch.options).get("enable_fp_fusion", True) and "fma.rn" in ptx,
    )


def _nvidia_matrix(ptx: str) -> str:
    for instruction in ("tcgen05.mma", "wgmma", "mma.sync"):
        if instruction in ptx:
            return instruction
    return ""


def _amd_matrix(assembly: str) -> str:
    return "mfma" if "v_mfma" in assembly else ""


def _global_loads(ptx: str) -> str:
    """Widths in bytes of the asynchronous copies and of the plain loads from global memory, widest first."""
    copies = {int(size, 0) for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^\n]*?\], (0x\w+|\d+)", ptx)}
    loads = set()
    for vector, bits in re.findall(r"ld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bufs](\d+)", ptx):
        loads.add(int(vector or 1) * int(bits) // 8)
    parts = [f"cp.async {'/'.join(map(str, sorted(copies, reverse=True)))}"] if copies else []
    parts += [f"ld {'/'.join(map(str, sorted(loads, reverse=True)))}"] if loads else []
    return ", ".join(parts)


def _compile_one(job: tuple[Launch, str]) -> Compiled:
    return compile_launch(*job)


def compile_all(jobs: list[tuple[Launch, str]], processes: int) -> list[Compiled]:
    """Compile in several processes; the first failure is raised."""
    if processes == 1:
        return [compile_launch(*job) for job in jobs]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(_compile_one, jobs, chunksize=8)


def devices() -> list[str]:
    """Every shipped table."""
    folder = files(CONFIGS)
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".json"))


def faults(compiled: Compiled) -> list[str]:
    """What is not as it must be: spills, too much shared memory, no matrix unit, narrow loads of packed weights."""
    if compiled.target.startswith("gfx"):
        return []
    found = []
    constants = dict(compiled.launch.constants)
    # The pinned Triton spills nothing; an older one may keep a few registers in local memory.
    if compiled.spills > (0 if hot_kernels.HELD else 16):
        found.append(f"{compiled.spills} bytes spilled")
    if compiled.fused:
        found.append("a product contracted with a sum")
    if compiled.shared > SHARED_LIMIT[compiled.target] * 1024:
        found.append(f"{compiled.shared} bytes of shared memory, the limit is {SHARED_LIMIT[compiled.target]} KiB")
    gemm = compiled.launch.name.startswith("linear")
    if gemm and not compiled.matrix:
        found.append("no matrix instruction")
    if gemm and compiled.target == "sm_90" and constants["BM"] >= 64 and compiled.matrix != "wgmma":
        found.append(f"{compiled.matrix} in place of wgmma")
    # Three-bit words are fetched level by level.
    decode = gemm and constants["BM"] <= 32 and constants.get("BANDED", True)
    dequantizes = compiled.launch.name.startswith("dequantize") and constants.get("BANDED", True)
    packed = decode or (dequantizes and constants["BITS"] > 1)
    if decode and not re.search(r"cp\.async 16\b|ld 16\b", compiled.loads):
        found.append(f"no 16-byte loads, but {compiled.loads}")
    if packed and re.search(r"ld (?:\d+/)*1\b", compiled.loads):
        found.append("loads of single bytes")
    return found


def table(results: list[Compiled]) -> str:
    """What the launches of every kernel take at most, as Markdown."""
    targets = [target for target in TARGETS if any(result.target == target for result in results)]
    lines = [header(("kernel", "launches", "dtypes", *targets))]
    for name in dict.fromkeys(result.launch.name for result in results):
        of_kernel = [result for result in results if result.launch.name == name]
        launched = {result.launch for result in of_kernel}
        types = sorted(
            {t[1:] for launch in launched for n, t in launch.signature if n in ("x_ptr", "g_ptr", "out_ptr")}
        )
        row = [name.removesuffix("_kernel"), len(launched), " ".join(types)]
        lines.append(line((*row, *(_most([r for r in of_kernel if r.target == target]) for target in targets))))
    return "\n".join(lines)


def _most(results: list[Compiled]) -> str:
    """`168 / 96 mma.sync`: registers, KiB of shared memory, matrix instructions."""
    registers = max(result.registers for result in results)
    shared = max(result.shared for result in results) / 1024
    matrix = sorted({result.matrix for result in results} - {""})
    return " ".join([*([f"{registers} /"] if registers else []), f"{shared:.0f}", *matrix])


def report(results: list[Compiled], rows: list[hot_kernels.Row], wrong: list[str]) -> str:
    """The page `bench/results/offline.md`, with the faults that are not allowed."""
    cuda = any(row.name.startswith(hot_kernels.CUDA) for row in rows)
    missing = "" if cuda else "\nThe CUDA kernel is left out: nvcc is not installed.\n"
    listed = "\n".join(f"- {fault}" for fault in wrong)
    return f"""# Kernels compiled without a GPU

Written by `make offline` with Triton {triton.__version__}. Everything is counted or modelled; nothing ran on a GPU.

## Rooflines of the hot kernels

Cycles that one iteration of the hot loop keeps each pipe of a multiprocessor busy, per block, the busiest in bold;
*bytes*: what it streams; *blocks*: resident on a multiprocessor; *ratio*: the memory's rate over the bound, so that
above 1 instructions limit the kernel and not the memory; *limit*: of the ratio, with the target in parentheses where a
row may be above it. Rates and their sources: `tests/sass.py`; calls, limits and reasons: `tests/hot_kernels.py`. 4
bits, group 64, axis 1, bfloat16 where nothing else is said.

{hot_kernels.table(rows)}
{missing}
## Other formats and blocks, on sm_90

{hot_kernels.table_of_formats(rows)}

## Above the target, and why

{hot_kernels.reasons(rows)}

## Resources of all kernels

Every kernel at every tile of the shipped tables: registers of a thread / KiB of shared memory of a block, at most, and
matrix instructions.

{table(results)}

## Faults

{listed or "None: no launch spills registers or exceeds what its target offers."}
"""


def main() -> None:
    """Compile everything, print the page, exit with 1 where something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["fp16", "bf16"],
        default=["bf16", "fp16"],
        help="everything in the first, the 4-bit products and the rotations in the others too",
    )
    parser.add_argument(
        "--kernel", nargs="+", metavar="WORD", help="only rooflines of hot kernels with one of these in their names"
    )
    parser.add_argument("--sass", type=Path, metavar="FOLDER", help="with --kernel: write the listings there")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write offline.md and modelled.md there")
    options = parser.parse_args()
    if _launch.INTERPRETED:
        raise SystemExit("TRITON_INTERPRET is set: kernels are interpreted, not compiled. Unset it.")
    if options.kernel:
        if options.sass is not None:
            options.sass.mkdir(parents=True, exist_ok=True)
        print(hot_kernels.HEADER)
        for row in hot_kernels.rows(options.targets, options.kernel, keep=options.sass):
            print(line(hot_kernels.cells(row)), flush=True)
        return
    dtypes = tuple({"fp16": torch.float16, "bf16": torch.bfloat16}[name] for name in options.dtypes)
    jobs = [(launch, t) for device in devices() for launch in launches(device, dtypes) for t in options.targets]
    results = compile_all(jobs, options.processes)
    rows = list(hot_kernels.rows(options.targets, processes=options.processes))
    wrong = [f"{r.launch.name} ({r.launch.label}) on {r.target}: {fault}" for r in results for fault in faults(r)]
    if hot_kernels.HELD:
        wrong += [f"{row.name} on {row.roofline.target}: {fault}" for row in rows for fault in row.faults()]
    text = report(results, rows, wrong)
    print(text)
    for fault in wrong:
        print(f"FAULT {fault}", file=sys.stderr)
    for entry in hot_kernels.loose(rows):
        print(f"LOOSE {entry}", file=sys.stderr)
    print(f"{len(results)} compiled with Triton {triton.__version__}, {len(wrong)} faults")
    if options.out is not None:
        (options.out / "offline.md").write_text(text)
        (options.out / "modelled.md").write_text(modelled.report(f"Triton {triton.__version__}"))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
