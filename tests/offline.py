"""Compile every kernel, as its launcher would launch it, for GPUs that are not here, and read the resources it takes.

`python -m tests.offline` prints a table and writes it to `bench/results/offline.md`. Launchers are called with tensors
that have shapes and no memory; what they would launch is compiled for each target by Triton's own tool chain, and the
bundled `cuobjdump` reads the result. Needs no GPU and no interpreter (TRITON_INTERPRET unset).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from hqq_oft.triton_kernels import _launch, _tiles, cayley, dequantize, linear, linear_backward, rotate
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hqq_oft import QuantizedWeight
from hqq_oft.ops.backends import registry
from hqq_oft.ops.device_tables import CONFIGS
from hqq_oft.ops.packing import LEVELS_PER_ELEMENT

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227}  # KiB per block
MULTIPROCESSORS = 132
GEMMS = ("linear_fwd_kernel", "linear_bwd_kernel")
ROTATIONS = ("rotate_fwd_kernel", "rotate_bwd_kernel")


@dataclass(frozen=True)
class Launch:
    """One kernel with the types and constants of a launch."""

    name: str
    label: str
    module: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, Any], ...]


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


# --- What would be launched ------------------------------------------------------------------------------------------


def _describe(kernel: JITFunction, label: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The specialization that Triton would make of these arguments."""
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in kwargs}
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if isinstance(value, Tensor):
            signature[name] = "*" + {"torch.bool": "i1"}.get(str(value.dtype), _type_name(value.dtype))
            divisible.append(name)
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
            if not parameter.do_not_specialize and value % 16 == 0:
                divisible.append(name)
    return Launch(
        kernel.fn.__name__,
        label,
        kernel.fn.__module__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(options.items()),
    )


def _type_name(dtype: torch.dtype) -> str:
    names = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
    return names.get(dtype) or str(dtype).removeprefix("torch.").replace("uint", "u").replace("int", "i")


def _repeated(launch: Launch) -> bool:
    """Whether to compile it for every dtype: every tile that multiplies, on one storage of the weight."""
    constants = dict(launch.constants)
    four_bits = (constants.get("BITS"), constants.get("AXIS")) == (4, 1)
    return launch.name in ROTATIONS or (launch.name in GEMMS and four_bits)


def launches(device: str, dtypes: tuple[torch.dtype, ...]) -> list[Launch]:
    """Every distinct launch of the cases below, with the tiles of `device`; after the first dtype `_repeated` ones."""
    found: dict[Launch, None] = {}
    label = ""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = _describe(kernel, label, args, kwargs)
        if dtype == dtypes[0] or _repeated(launch):
            found[launch] = None

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        patches.enter_context(mock.patch.object(_launch, "multiprocessors", return_value=MULTIPROCESSORS))
        patches.enter_context(mock.patch.object(_tiles, "device_name", return_value=device))
        for module in (cayley, dequantize, linear, linear_backward, rotate):
            patches.enter_context(mock.patch.object(module, "check_device", return_value=None))
        for dtype in dtypes:
            for label, call in _cases(device, dtype):  # noqa: B007 (`run` reads it)
                call()
    # What differs in its label alone is one launch.
    unique: dict[tuple[Any, ...], Launch] = {}
    for launch in found:
        unique.setdefault((launch.name, launch.signature, launch.constants, launch.divisible, launch.options), launch)
    return list(unique.values())


def _planned(planner: Callable[..., Any], *args: Any) -> Callable[[], object]:
    """What computes a call, and the call; the planners of operations, called `plan_<operation>`, are told `by_name`."""
    operations = registry()["triton"].operations.values()
    return lambda: planner(*((True,) if planner in operations else ()), *args)(*args)


def _cases(device: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Label and call: every kernel, at every tile of the device's table, on the layers of an 8B Llama."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def packed(n: int, k: int, bits: int, axis: int, group: int = 64) -> QuantizedWeight:
        levels = (n * k // group, group) if axis == 1 else (group, n * k // group)
        storage = torch.int32 if bits == 3 else torch.uint8
        w = tensor(-(-levels[0] // LEVELS_PER_ELEMENT[bits]), levels[1], dtype=storage)
        return QuantizedWeight(w, tensor(n * k // group), tensor(n * k // group), n, k, bits, group, axis)

    def rows(operation: str) -> list[int]:
        return [tile.m for tile in _tiles.tiles(device, operation)]

    n, k, f32 = 14336, 4096, torch.float32
    for b in (16, 32, 64, 96, 128, 256):
        v, grad = tensor(k // b, b * (b - 1) // 2, dtype=f32), tensor(k // b, b, b, dtype=f32)
        yield f"b={b}", _planned(cayley.plan_cayley, v, b, 5, None, None, dtype)
        yield f"b={b}", _planned(cayley.plan_cayley_backward, grad, v, b, 5, None, None)
    v, keep = tensor(k // 32, 496, dtype=f32), tensor(k // 32, dtype=torch.bool)
    grad = tensor(k // 32, 32, 32, dtype=f32)
    yield "b=32 coft dropout", _planned(cayley.plan_cayley, v, 32, 5, keep, 0.1, dtype)
    yield "b=32 coft dropout", _planned(cayley.plan_cayley_backward, grad, v, 32, 5, keep, 0.1)
    yield "b=32 coft", _planned(cayley.plan_project_, v, 0.1)
    yield "b=32 8 terms", _planned(cayley.plan_cayley, v, 32, 8, None, None, dtype)
    yield "b=32 8 terms", _planned(cayley.plan_cayley_backward, grad, v, 32, 8, None, None)

    index = tensor(16, dtype=torch.int64)
    for b in (32, 96, 256):
        d = tensor(k // b, b, b)
        for m in [*rows("rotate"), 4096]:
            yield f"M={m} b={b}", _planned(rotate.plan_rotate, tensor(m, k), d, None, False)
        for m in [*rows("rotate_backward"), 4096]:
            back = (tensor(m, k), tensor(m, k), d, None, False, True, True)
            yield f"M={m} b={b}", _planned(rotate.plan_rotate_backward, *back)
    yield "M=16 b=32 mixed", _planned(rotate.plan_rotate, tensor(16, k), tensor(8, k // 32, 32, 32), index, False)

    # Rotations in float32: float32 layers, and every merge.
    four = packed(n, k, 4, 1)
    for b in (32, 96, 128):
        d, x = tensor(k // b, b, b, dtype=f32), tensor(4096, k, dtype=f32)
        yield f"float32 b={b}", _planned(rotate.plan_rotate, x, d, None, False)
        yield f"float32 b={b}", _planned(rotate.plan_rotate_backward, x, x, d, None, False, True, True)
        yield f"float32 b={b}", _planned(dequantize.plan_dequantize_rotate, four, d, f32)
    d32 = tensor(k // 32, 32, 32)
    product, gradient = linear.plan_fused_linear, linear_backward.plan_fused_input_gradient
    for bits, axis in ((4, 1), (4, 0), (8, 1), (3, 1), (2, 1), (1, 1)):
        weight, label, main = packed(n, k, bits, axis), f"{bits} bits axis {axis}", (bits, axis) == (4, 1)
        yield label, _planned(dequantize.plan_dequantize, weight, dtype)
        yield f"{label} b=32", _planned(dequantize.plan_dequantize_rotate, weight, d32, dtype)
        for m in rows("linear_rotated") if main else [16]:
            yield f"{label} M={m} b=32", _planned(product, tensor(m, k), weight, d32, tensor(n), None)
        for m in rows("linear_backward") if main else [16]:
            yield f"{label} M={m}", _planned(gradient, tensor(m, n), weight)
    for b in (64, 96, 128):
        yield f"4 bits axis 1 b={b}", _planned(dequantize.plan_dequantize_rotate, four, tensor(k // b, b, b), dtype)
    yield "4 bits axis 1 M=16 b=64", _planned(product, tensor(16, k), four, tensor(64, 64, 64), None, None)
    for m in rows("linear"):
        yield f"4 bits axis 1 M={m}", _planned(product, tensor(m, k), four, None, None, None)
    mixed, small = tensor(8, k // 32, 32, 32), packed(1024, k, 4, 1)
    yield "4 bits axis 1 M=16 b=32 mixed", _planned(product, tensor(16, k), four, mixed, None, index)
    yield "4 bits axis 1 N=1024 M=16 b=32", _planned(product, tensor(16, k), small, d32, None, None)


# --- What it takes ---------------------------------------------------------------------------------------------------


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile one launch for one target and read its resources."""
    kernel = getattr(sys.modules[launch.module], launch.name)
    constants = dict(launch.constants)
    if target.startswith("gfx") and constants.get("PRECISION") == "tf32x3":
        constants["PRECISION"] = "ieee"
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(position[name],): value for name, value in constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=dict(launch.options))
    if target.startswith("gfx"):
        return Compiled(launch, target, shared=compiled.metadata.shared, matrix=_amd_matrix(compiled.asm["amdgcn"]))
    ptx = compiled.asm["ptx"]
    registers, spills = _resources(compiled.asm["cubin"])
    return Compiled(
        launch, target, registers, spills, compiled.metadata.shared, _nvidia_matrix(ptx), _global_loads(ptx)
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources:\n{out}")
    return int(found[1]), int(found[2])


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
    folder = resources.files(CONFIGS)
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".json"))


def faults(compiled: Compiled) -> list[str]:
    """What is not as it must be: spills, too much shared memory, no matrix unit, narrow loads of packed weights."""
    if compiled.target.startswith("gfx"):
        return []
    found = []
    constants = dict(compiled.launch.constants)
    if compiled.spills:
        found.append(f"{compiled.spills} bytes spilled")
    if compiled.shared > SHARED_LIMIT[compiled.target] * 1024:
        found.append(f"{compiled.shared} bytes of shared memory, the limit is {SHARED_LIMIT[compiled.target]} KiB")
    gemm = compiled.launch.name in GEMMS
    if gemm and not compiled.matrix:
        found.append("no matrix instruction")
    if gemm and compiled.target == "sm_90" and constants["BM"] >= 64 and compiled.matrix != "wgmma":
        found.append(f"{compiled.matrix} in place of wgmma")
    # Three-bit words are fetched level by level.
    decode = gemm and constants["BM"] <= 32 and constants["BANDED"]
    packed = decode or (compiled.launch.name == "dequantize_kernel" and constants["BANDED"] and constants["BITS"] > 1)
    if decode and not re.search(r"cp\.async 16\b|ld 16\b", compiled.loads):
        found.append(f"no 16-byte loads, but {compiled.loads}")
    if packed and re.search(r"ld (?:\d+/)*1\b", compiled.loads):
        found.append("loads of single bytes")
    return found


def table(results: list[Compiled]) -> str:
    """All results as Markdown."""
    lines = [
        "| kernel | case | tile | warps | target | registers | spills | shared, KiB | matrix | global loads, bytes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        constants = dict(result.launch.constants)
        sizes = "x".join(str(constants[name]) for name in ("BM", "BN", "BK") if name in constants)
        types = next((t for n, t in result.launch.signature if n in ("x_ptr", "g_ptr", "out_ptr")), "")
        case = f"{result.launch.label}{' ' + types.lstrip('*') if types else ''}"
        warps = dict(result.launch.options).get("num_warps", 4)
        lines.append(
            f"| {result.launch.name.removesuffix('_kernel')} | {case} | {sizes} | {warps} | {result.target} | "
            f"{result.registers or ''} | {result.spills} | {result.shared / 1024:.0f} | {result.matrix} | "
            f"{result.loads} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compile everything, print the table, exit with 1 where something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=["fp16", "bf16"],
        default=["bf16", "fp16"],
        help="everything in the first, the 4-bit products and the rotations in the others too",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the table there too")
    options = parser.parse_args()
    if _launch.INTERPRETED:
        raise SystemExit("TRITON_INTERPRET is set: kernels are interpreted, not compiled. Unset it.")
    dtypes = tuple({"fp16": torch.float16, "bf16": torch.bfloat16}[name] for name in options.dtypes)
    jobs = [(launch, t) for device in devices() for launch in launches(device, dtypes) for t in options.targets]
    results = compile_all(jobs, options.processes)
    text = table(results)
    print(text)
    wrong = [(result, fault) for result in results for fault in faults(result)]
    for result, fault in wrong:
        print(f"FAULT {result.launch.name} ({result.launch.label}) on {result.target}: {fault}", file=sys.stderr)
    print(f"{len(results)} compiled with Triton {triton.__version__}, {len(wrong)} faults")
    if options.out is not None:
        options.out.write_text(
            "# Kernels compiled without a GPU\n\n"
            f"Written by `make offline` with Triton {triton.__version__}: what each kernel takes at every shipped tile "
            "choice. No time is measured here. Spills are bytes of stack.\n\n" + text + "\n"
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
