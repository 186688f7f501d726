"""The rooflines (`tests/sass.py`) of the kernels where the time goes, as they are launched, and their targets.

A row is one call on a layer of 14336x4096; the launch that reads the weight, or the only one, is analysed. Bytes are
those of the operation: a product streams the packed weight with its scales and zeros, the other operations their inputs
and outputs.
"""

from __future__ import annotations

import functools
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton
from hqq_oft.triton_kernels import dequantize, linear, linear_backward, rotate

from tests import native_build, sass
from tests.launches import Launch, compile_for, packed, planned, read_cubin, record, resources, tensor

TARGETS = tuple(sass.RATES)
N, K = 14336, 4096
STORED_BITS = {3: 3.2}  # ten levels to a word
CUDA = "CUDA linear"


@dataclass(frozen=True)
class Case:
    """A call: operation, tokens (0 if they do not matter), block of the rotation (0 for none), format of the weight."""

    operation: str
    m: int = 0
    b: int = 0
    bits: int = 4
    group: int = 64
    axis: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """`linear M=16 b=32`, then what differs from 4 bits, group 64, axis 1 and bfloat16."""
        parts = [self.operation, f"M={self.m}" if self.m else "", f"b={self.b}" if self.b else ""]
        parts += [f"{self.bits} bits" if self.bits != 4 else "", f"group {self.group}" if self.group != 64 else ""]
        parts += ["axis 0" if self.axis == 0 else "", "fp16" if self.dtype == torch.float16 else ""]
        return " ".join(part for part in parts if part)

    @property
    def weight_bytes(self) -> float:
        """Of one weight with its share of scale and zero."""
        return STORED_BITS.get(self.bits, self.bits) / 8 + 2 * self.dtype.itemsize / self.group

    def call(self, n: int = N, k: int = K) -> Callable[[], object]:
        """The call on tensors without memory."""
        halves = functools.partial(tensor, dtype=self.dtype)
        d = halves(k // self.b, self.b, self.b) if self.b else None
        weight = packed(n, k, self.bits, self.axis, self.group, self.dtype)
        if self.operation == "linear":
            return planned(linear.plan_fused_linear, halves(self.m, k), weight, d, None, None)
        if self.operation == "linear_backward":
            return planned(linear_backward.plan_fused_input_gradient, halves(self.m, n), weight)
        if self.operation == "dequantize":
            return planned(dequantize.plan_dequantize, weight, self.dtype)
        if self.operation == "dequantize_rotate":
            return planned(dequantize.plan_dequantize_rotate, weight, d, self.dtype)
        x = halves(self.m, k)
        if self.operation == "rotate":
            return planned(rotate.plan_rotate, x, d, None, False)
        return planned(rotate.plan_rotate_backward, x, x, d, None, False, True, True)


PRODUCTS = ("linear", "linear_backward")
MAIN = (
    *(Case("linear", m, b) for m in (8, 16, 32, 128) for b in (0, 32)),
    *(Case("linear_backward", m) for m in (8, 16, 32)),
    Case("dequantize"),
    Case("dequantize_rotate", b=32),
    *(Case("rotate", m, 32) for m in (16, 4096)),
    Case("rotate_backward", 4096, 32),
)
_FORMATS = (
    *({"bits": bits} for bits in (8, 3, 2, 1)),
    {"group": 128},
    {"axis": 0},
    {"dtype": torch.float16},
)
_VARIED = (Case("linear", 16, 32), Case("linear_backward", 16), Case("dequantize_rotate", b=32))
FORMATS = (
    *(replace(case, **changes) for case in _VARIED for changes in _FORMATS),
    *(replace(case, b=b) for case in (_VARIED[0], _VARIED[2]) for b in (16, 64)),
)

# Rate of the memory over the bound on sm_90, at most; other formats and blocks are held to the row they vary.
RATIOS = {
    "linear M=8": 0.6,
    "linear M=16": 0.75,
    "linear M=8 b=32": 0.8,
    "linear M=16 b=32": 0.85,
    "linear M=32": 1.3,
    "linear M=32 b=32": 1.3,
    "linear M=128": 1.4,
    "linear M=128 b=32": 1.4,
    "linear_backward M=8": 1.2,
    "linear_backward M=16": 1.2,
    "linear_backward M=32": 1.4,
    "dequantize": 0.6,
    "dequantize_rotate b=32": 0.5,
    "rotate M=16 b=32": 1.1,
    "rotate M=4096 b=32": 0.6,
    "rotate_backward M=4096 b=32": 0.6,
    f"{CUDA} M=8": 0.7,
    f"{CUDA} M=16": 0.7,
}


# The machine code of older ones is worse in ways that the kernels cannot change; there the limits do not hold.
HELD = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


@dataclass(frozen=True)
class Allowed:
    """Rows, by a pattern of whole names, that may have some faults and a ratio above their target, and why."""

    rows: str
    ratio: float | None  # None: the target
    faults: str  # a pattern
    reason: str


# The first that fits a row counts. Without an entry, a row must reach its target without faults.
ALLOWED = (
    Allowed(
        r"linear M=16 b=(32 group 128|64)", 0.9, "",
        "bound by shared memory, where x is rotated: as many cycles for fewer bytes, more for wider blocks.",
    ),
    Allowed(r"linear M=16 b=32 2 bits", 1.4, "", "as many instructions per level as at 4 bits, and half the bytes."),
    Allowed(
        r"linear M=16 b=32 1 bits", 1.2, "", "as many instructions per level as at 4 bits, and a quarter of the bytes."
    ),
    Allowed(r"linear_backward M=16 fp16", 1.35, "", "each field of a byte repeats `dy s` and the term of its zero."),
    Allowed(
        r"linear_backward M=16 2 bits", 1.95, "",
        "each field of a byte repeats `dy s` and the term of its zero, for half the bytes of 4 bits.",
    ),
    Allowed(
        r"linear_backward M=16 1 bits", 2.9, "",
        "each field of a byte repeats `dy s` and the term of its zero, for a quarter of the bytes of 4 bits.",
    ),
    Allowed(r"dequantize_rotate b=32 8 bits", 0.55, "", "in bfloat16 a level has two digits, which are two products."),
    Allowed(
        r"dequantize_rotate b=\d+( 1 bits| group 128| fp16)?", None, "STS",
        "with many fields, and on sm_80, sums change their layout before they are stored, in 16-bit parts.",
    ),
    Allowed(r"dequantize_rotate b=32 axis 0", 0.9, "", "every level has a scale and a zero of its own to load."),
    Allowed(
        r".* 3 bits", 7, "not asynchronous|CALL|times the products",
        "bands do not fall on rows: the word of every level is loaded again, at a place found by division.",
    ),
    Allowed(
        r".* axis 0", 5.5, "times the products|CALL|STS|LDS",
        "every level has a scale and a zero of its own to load; small tiles, which two groups of warps multiply twice.",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A case on a target; `base` is the row of `RATIOS` whose target it has."""

    name: str
    base: str
    kernel: str
    roofline: sass.Roofline
    launches: int = 1

    @property
    def allowed(self) -> Allowed | None:
        return next((each for each in ALLOWED if re.fullmatch(each.rows, self.name)), None)

    @property
    def limit(self) -> float | None:
        """Largest ratio, on sm_90."""
        if self.roofline.target != "sm_90":
            return None
        allowed = self.allowed
        return RATIOS[self.base] if allowed is None or allowed.ratio is None else allowed.ratio

    def faults(self) -> list[str]:
        """What is neither within its limits nor allowed."""
        allowed = self.allowed
        found = [f for f in self.roofline.faults if allowed is None or not re.search(allowed.faults or "$^", f)]
        if self.limit is not None and round(self.roofline.ratio, 2) > self.limit:
            found.append(f"ratio {self.roofline.ratio:.2f}, the limit is {self.limit}")
        return found


@dataclass(frozen=True)
class Machine:
    """The machine code of a launch, divided, and what a block of it takes."""

    listing: sass.Listing
    warps: int
    registers: int
    spilled: int
    shared: int


def disassemble(launch: Launch, target: str, keep: Path | None = None) -> Machine:
    """Compile a launch; its listing is also written into the folder `keep`."""
    compiled = compile_for(launch, target)
    listing = read_cubin(compiled.asm["cubin"], "nvdisasm", "-c")
    if keep is not None:
        (keep / f"{launch.label} {target}.sass".replace(" ", "_")).write_text(listing)
    code = sass.divide(sass.parse(listing))
    return Machine(code, compiled.metadata.num_warps, *resources(compiled.asm["cubin"]), compiled.metadata.shared)


def roofline(
    launch: Launch, operation: str, weight_bytes: float, target: str, keep: Path | None = None
) -> sass.Roofline:
    """The roofline of a launch of an operation.

    In one iteration of its hot loop a product decodes a tile of BN x BK weights; the other operations store what they
    compute from as many bytes as they need for it.
    """
    machine = disassemble(launch, target, keep)
    constants, code, warps = dict(launch.constants), machine.listing, machine.warps
    element = 2  # bytes of x, y and W
    stored = code.stored(warps)
    if operation in PRODUCTS:
        tile = constants["BN"] * constants["BK"]
        streamed, products = tile * weight_bytes, tile * constants["BM"]
    elif not stored:
        raise RuntimeError(f"{launch.label}: the hot part of {launch.name} stores nothing")
    elif operation.startswith("dequantize"):
        streamed = stored * (1 + weight_bytes / element)
        products = stored / element * constants["BK"]
    else:
        streamed, products = stored * (3 if operation == "rotate_backward" else 2), 0
    found = sass.roofline(
        code,
        target,
        streamed=streamed,
        warps=warps,
        registers=machine.registers,
        shared=machine.shared,
        spilled=machine.spilled,
        pipelined=operation in PRODUCTS,
        fmas=products,
    )
    # Twice at 8 bits, whose levels have two digits, and with a rotation that every warp computes for itself.
    most = 2 + (constants.get("BITS") == 8) + (constants.get("B", 1) > 1)
    if launch.name == "linear_bwd_bands_kernel":  # sixteen rows, in two parts
        most = 2 * most * max(16, constants["BM"]) // constants["BM"]
    times = code.fmas(warps) / products if operation in PRODUCTS else 1
    if times and not 1 <= times < most:
        found = replace(found, faults=(*found.faults, f"{times:.2g} times the products of its tile"))
    return found


def analyse(case: Case, target: str, keep: Path | None = None) -> Row:
    """The row of a case."""
    found = [launch for launch, _ in record([(case.name, case.call())])]
    launch = next((each for each in found if "BITS" in dict(each.constants)), found[-1])
    base = Case(case.operation, case.m, 32 if case.b else 0).name
    result = roofline(launch, case.operation, case.weight_bytes, target, keep)
    return Row(case.name, base, launch.name.removesuffix("_kernel"), result, len(found))


def _analyse(job: tuple[Case, str, Path | None]) -> Row:
    return analyse(*job)


def rows(
    targets: Iterable[str], words: Iterable[str] = ("",), processes: int = 1, keep: Path | None = None
) -> Iterator[Row]:
    """All rows whose names contain one of the words, those of the CUDA kernel last and only where nvcc is installed."""
    cases = [case for case in (*MAIN, *FORMATS) if any(word in case.name for word in words)]
    targets = [target for target in targets if target in TARGETS]
    jobs = [(case, target, keep) for case in cases for target in targets]
    if processes == 1:
        yield from map(_analyse, jobs)
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            yield from pool.imap(_analyse, jobs, chunksize=4)
    nvcc = native_build.load().nvcc()
    if nvcc is not None and any(word in CUDA for word in words):
        found = [row for target in targets for row in cuda_rows(target, nvcc, keep)]
        yield from sorted(found, key=lambda row: (len(row.name), row.name))


# --- The CUDA kernel -------------------------------------------------------------------------------------------------

_STAGES = 16  # of a tile of rows: a slice of 2048 columns
_INSTANCES = """
#include "ptx.cuh"

#include "decode.cuh"
namespace hqq_oft::cuda {
template __global__ void decode_kernel<BFloat16, 4, 64, 1>(DecodeArguments);
template __global__ void decode_kernel<BFloat16, 4, 64, 2>(DecodeArguments);
}
"""


def cuda_rows(target: str, nvcc: str, keep: Path | None = None) -> list[Row]:
    """The decode kernel of `csrc/cuda` for up to 8 and 16 tokens; each of its warps streams by itself.

    A stage of a warp is 16 packed rows of 128 columns. What begins a tile of rows is spread over its stages. How many
    blocks share a multiprocessor is decided by `plan.h`, two at most; here by their registers alone.
    """
    build = native_build.load()
    architecture = "sm_90a" if target == "sm_90" else target
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "decode.cu", Path(folder) / "decode.cubin"
        source.write_text(_INSTANCES)
        include = Path(build.__file__).parent / "cuda"
        command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-I", include, "-cubin", "-o", cubin, source]
        subprocess.run(command, check=True, capture_output=True, text=True)
        code = cubin.read_bytes()
    listing, usage = read_cubin(code, "nvdisasm", "-c"), read_cubin(code, "cuobjdump", "-res-usage")
    found = []
    for part in re.split(r"(?=^\s*\.section\s+\.text)", listing, flags=re.MULTILINE)[1:]:
        name = re.search(r"\.text\.([^\s,]+)", part)[1]
        tiles = int(re.search(r"Li64ELi(\d)E", name)[1])
        usage_of = re.search(rf"Function {re.escape(name)}:\s+REG:(\d+) STACK:(\d+)", usage)
        body = sass.divide(sass.parse(part), rare=r"LDGSTS(?!.*BYPASS)")
        if keep is not None:
            (keep / f"{CUDA}_M={8 * tiles}_{target}.sass".replace(" ", "_")).write_text(part)
        levels = 16 * 128
        of_a_warp = sass.roofline(
            body, target, streamed=levels + 2 * levels / 64 * 4, warps=1, registers=int(usage_of[1]), shared=0,
            spilled=int(usage_of[2]), pipelined=True,
        )  # fmt: skip
        begin = sass.cycles(body.rare, target, 1)
        spread = {pipe: value + begin[pipe] / _STAGES for pipe, value in of_a_warp.cycles.items()}
        blocks = min(2, sass.resident(target, 8, int(usage_of[1]), 0))
        name = f"{CUDA} M={8 * tiles}"
        found.append(Row(name, name, "decode_kernel", replace(of_a_warp, cycles=spread, resident=blocks)))
    return found


# --- The table -------------------------------------------------------------------------------------------------------

_COLUMNS = ("kernel", "target", "bytes", *sass.PIPES, "barriers", "blocks", "bound, TB/s", "ratio", "limit", "faults")


def line(cells: Iterable[object]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def header(columns: Iterable[str]) -> str:
    """The first two lines of a Markdown table."""
    columns = tuple(columns)
    return line(columns) + "\n|" + "---|" * len(columns)


HEADER = header(_COLUMNS)


def cells(row: Row) -> list[str]:
    """One line of the table: the busiest pipe and ratios above the target are bold."""
    found = row.roofline
    over = found.target == "sm_90" and round(found.ratio, 2) > RATIOS[row.base]
    return [
        row.name + (f", {row.launches} launches" if row.launches > 1 else ""),
        found.target,
        f"{found.streamed:.0f}",
        *(f"**{value:.0f}**" if pipe == found.pipe else f"{value:.0f}" for pipe, value in found.cycles.items()),
        str(found.barriers),
        str(found.resident),
        f"{found.bound:.2f}",
        f"**{found.ratio:.2f}**" if over else f"{found.ratio:.2f}",
        _limit(row),
        "; ".join(found.faults),
    ]


def _limit(row: Row) -> str:
    """The limit, after it the target where that is lower."""
    if row.limit is None:
        return ""
    return f"{row.limit}" if row.limit <= RATIOS[row.base] else f"{row.limit} ({RATIOS[row.base]})"


def table(rows: Iterable[Row]) -> str:
    """The rows of `MAIN` and of the CUDA kernel."""
    return "\n".join([HEADER, *(line(cells(row)) for row in rows if row.name == row.base)])


def table_of_formats(rows: list[Row]) -> str:
    """The other rows, on sm_90; of other targets the ratio, and faults that sm_90 does not have."""
    others = [target for target in TARGETS if target != "sm_90"]
    lines = [header((*(name for name in _COLUMNS if name != "target"), *(f"ratio, {target}" for target in others)))]
    by_name = {(row.name, row.roofline.target): row for row in rows if row.name != row.base}
    for row in by_name.values():
        if row.roofline.target != "sm_90":
            continue
        found, ratios = cells(row), []
        for target in others:
            other = by_name.get((row.name, target))
            ratios.append(f"{other.roofline.ratio:.2f}" if other else "")
            found[-1] += "".join(f"; {target}: {f}" for f in other.faults() if f not in found[-1]) if other else ""
        lines.append(line([found[0], *found[2:], *ratios]))
    return "\n".join(lines)


def loose(rows: list[Row]) -> list[str]:
    """Entries of `ALLOWED` that allow more than any row needs."""
    found = []
    for entry in ALLOWED:
        of_entry = [row for row in rows if row.allowed is entry]
        worst = max((r.roofline.ratio for r in of_entry if r.roofline.target == "sm_90"), default=0.0)
        faulty = any(row.roofline.faults for row in of_entry)
        if of_entry and (entry.ratio or 0) > 1.1 * worst:
            found.append(f"{entry.rows}: at most {entry.ratio} allowed, {worst:.2f} found")
        if of_entry and entry.faults and not faulty:
            found.append(f"{entry.rows}: faults allowed, none found")
    return found


def reasons(rows: list[Row]) -> str:
    """Why rows are above their targets or have faults."""
    found: dict[Allowed, list[str]] = {}
    for row in rows:
        if row.allowed is not None and row.roofline.target == "sm_90":
            found.setdefault(row.allowed, []).append(row.name)
    return "\n".join(f"- {', '.join(names)}: {allowed.reason}" for allowed, names in found.items()) or "None."
