"""Modelled times of whole launches on sm_90, layer by layer, to be held against the first run on such a GPU.

Every launch of a call is recorded with its grid. A block takes what its hot loop takes times the iterations that its
share of the bytes needs, and once the rest of its code (all its branches, so short loops are overestimated). Blocks
are dealt out evenly; the multiprocessor with most of them ends last, which includes the tail of the last wave and the
blocks of split sums. Products by the vendor's GEMM take their operations at the full rate of the tensor cores.

Not modelled: latencies, so that grids of few blocks take longer; gaps between launches; buffers that PyTorch fills or
adds; caches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest import mock

import torch
from hqq_oft.triton_kernels import linear, linear_backward, quantize
from torch import Tensor

from bench.table import SHAPES
from tests import hot_kernels, sass
from tests.hot_kernels import PRODUCTS, Case, header, line
from tests.launches import Launch, compile_for, packed, planned, read_cubin, record, tensor

TARGET = "sm_90"
TOKENS = (1, 8, 16, 64, 512, 4096)
MEMORY = {"H100": 3.35, "H200": 4.8}  # TB/s
B = 32


@dataclass(frozen=True)
class Part:
    """One launch of a call: microseconds that its instructions take, bytes from and to memory, blocks."""

    operation: str
    instructions: float
    bytes: float
    blocks: int = 0

    def time(self, memory: float) -> float:
        """Microseconds, at TB/s of the memory."""
        return max(self.instructions, self.bytes / memory / 1e6)


def _operation(launch: Launch) -> str:
    """What a launch computes, by the module of its kernel (`linear...`, `rotate...`) and its constants."""
    module = launch.module.rsplit(".", 1)[-1]
    operations = ("linear_backward", "linear", "dequantize", "rotate")
    name = next(operation for operation in operations if module.startswith(operation))
    if name == "dequantize" and dict(launch.constants).get("B", 1) > 1:
        return "dequantize_rotate"
    return "rotate_backward" if name == "rotate" and "bwd" in launch.name else name


@functools.cache
def _roofline(launch: Launch) -> sass.Roofline:
    return hot_kernels.roofline(launch, _operation(launch), Case("linear").weight_bytes, TARGET)


def _launched(launch: Launch, grid: tuple[int, ...], m: int, n: int, k: int) -> Part:
    """A recorded launch on a layer of [n, k] with m tokens, or on the chunk of it that its grid covers."""
    operation, element = _operation(launch), 2
    weight_bytes = Case("linear").weight_bytes
    found = _roofline(replace(launch, label=""))
    constants, blocks = dict(launch.constants), math.prod(grid)
    if operation in PRODUCTS:
        passes = math.ceil(m / constants["BM"])  # over the weight
        needed = n * k * weight_bytes
        moved = needed + m * (n + k) * element
        iterations = math.ceil(needed * passes / blocks / found.streamed)
    else:
        if operation.startswith("dequantize"):
            moved = n * k * (weight_bytes + element)
        else:
            moved = m * k * element * (3 if operation == "rotate_backward" else 2)
        iterations = max(1, round(moved / blocks / found.streamed))
    cycles = {pipe: found.rest[pipe] + iterations * value for pipe, value in found.cycles.items()}
    rates = sass.RATES[TARGET]
    of_the_busiest = math.ceil(blocks / rates.multiprocessors)
    return Part(operation, of_the_busiest * max(cycles.values()) / rates.clock / 1e3, moved, blocks)


def _multiplied(m: int, n: int, k: int) -> Part:
    """A product by the vendor's GEMM."""
    rates = sass.RATES[TARGET]
    return Part(
        "GEMM", m * n * k / (rates.group_mma * rates.multiprocessors * rates.clock * 1e3), 2 * (m * n + m * k + n * k)
    )


def _call(m: int, n: int, k: int, backward: bool) -> Callable[[], object]:
    """Forward, or the backward of x and the rotation, of a layer with blocks of 32."""
    halves = functools.partial(tensor, dtype=torch.bfloat16)
    weight, x, d = packed(n, k, 4, 1, 64, torch.bfloat16), halves(m, k), halves(k // B, B, B)
    if backward:
        return planned(linear_backward.plan_linear_backward, halves(m, n), x, weight, d, None, True, True)
    return planned(linear.plan_linear, x, weight, d, None, None)


def parts(m: int, n: int, k: int, backward: bool) -> list[Part]:
    """The launches of one call, in order; chunks of a scratch are launches of their own."""
    products: list[Part] = []

    def multiply(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        products.append(_multiplied(a.shape[0], b.shape[1], a.shape[1]))
        return out

    def multiply_add(bias: Tensor, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return multiply(a, b, out=out)

    with mock.patch.object(torch, "mm", multiply), mock.patch.object(torch, "addmm", multiply_add):
        launched = record([("", _call(m, n, k, backward))])
    chunks = max(1, sum(_operation(launch).startswith("dequantize") for launch, _ in launched))
    sizes = {True: (n, k / chunks), False: (n / chunks, k)}[backward]
    return [
        _launched(launch, grid, m, *(sizes if _operation(launch).startswith("dequantize") else (n, k)))
        for launch, grid in launched
    ] + products


def _cells(found: list[Part]) -> Iterator[str]:
    names: dict[str, int] = {}
    for part in found:
        names[part.operation] = names.get(part.operation, 0) + 1
    yield " + ".join(f"{count} {name}" if count > 1 else name for name, count in names.items())
    yield str(max((part for part in found if part.blocks), key=lambda part: part.instructions).blocks)
    yield f"{sum(part.instructions for part in found):.1f}"
    for memory in MEMORY.values():
        yield f"{sum(part.bytes for part in found) / memory / 1e6:.1f}"
    for memory in MEMORY.values():
        yield f"{sum(part.time(memory) for part in found):.1f}"


def table() -> str:
    """Forward and backward of six layers of Llama, as Markdown."""
    columns = ["layer", "M", "", "launches", "blocks", "instructions"]
    columns += [f"bytes, {name}" for name in MEMORY] + [f"modelled, {name}" for name in MEMORY]
    lines = [header(columns)]
    for shape in SHAPES:
        for m in TOKENS:
            for name, backward in (("forward", False), ("backward", True)):
                lines.append(line([shape, m, name, *_cells(parts(m, shape.n, shape.k, backward))]))
    return "\n".join(lines)


def quantizing(iterations: int = 20) -> str:
    """Quantizing 4096x4096 in bfloat16 to 4 bits, group 64, as Markdown: every tile takes that many iterations."""
    n, k, bits, group = 4096, 4096, 4, 64
    groups, rates = n * k // group, sass.RATES[TARGET]
    columns = ["axis", "instructions per weight and iteration", "solver", "packing"]
    columns += [f"bytes, {name}" for name in MEMORY] + [f"modelled, {name}" for name in MEMORY]
    lines = [header(columns)]
    for axis in (1, 0):
        w = tensor(n, k, dtype=torch.bfloat16)
        settings = 2**bits, bits, group, axis, True, iterations, torch.bfloat16, None
        call = planned(quantize.plan_quantize, w, *settings)
        (solve, solvers), _, (pack, packers) = record([("", call)])
        times = []
        for launch, grid in ((solve, solvers), (pack, packers)):
            compiled = compile_for(launch, TARGET)
            code = sass.parse(read_cubin(compiled.asm["cubin"], "nvdisasm", "-c"))
            loop = max(sass._loops(code), key=len, default=frozenset()) if launch is solve else frozenset()
            warps = compiled.metadata.num_warps
            hot = sass.cycles([code[i] for i in loop], TARGET, warps)
            once = sass.cycles([each for i, each in enumerate(code) if i not in loop], TARGET, warps)
            cycles = max(once[pipe] + iterations * hot[pipe] for pipe in hot)
            times.append(math.ceil(math.prod(grid) / rates.multiprocessors) * cycles / rates.clock / 1e3)
            if launch is solve:
                per_weight = len(loop) / group
        moved = [2 * n * k + 4 * groups * (iterations + 2), n * k * (2 + bits / 8) + groups * (4 + 4 + 2 + 2)]
        cells = [f"{sum(moved) / memory / 1e6:.1f}" for memory in MEMORY.values()]
        whole = [sum(map(max, times, (m / memory / 1e6 for m in moved))) for memory in MEMORY.values()]
        cells += [f"{time:.1f}" for time in whole]
        lines.append(line([axis, f"{per_weight:.1f}", *(f"{time:.1f}" for time in times), *cells]))
    return "\n".join(lines)


def report(versions: str) -> str:
    """The page: what the figures are, and the table."""
    rates = sass.RATES[TARGET]
    return f"""# Modelled times of whole calls

Written by `make offline` with {versions}, to be held against the first run on a GPU.
**Modelled, not measured**: no GPU has run this code. One layer, 4 bits, group 64, block 32, bfloat16, on {TARGET} with
{rates.multiprocessors} multiprocessors at {rates.clock} GHz; times in microseconds. *instructions*: the busiest pipe of
the multiprocessor with most blocks, summed over the launches; *bytes*: what the launches must move, at the rate of the
memory ({", ".join(f"{name} {rate} TB/s" for name, rate in MEMORY.items())}); *modelled*: the larger of the two for each
launch, summed; *blocks*: of the longest launch. `tests/modelled.py` says what is left out.

{table()}

## Quantizing

4096x4096 in bfloat16 to 4 bits, group 64, all 20 iterations in every tile; *solver*, *packing*: instructions of the two
launches. Tiles of a language model's weights keep their zeros earlier. Left out: the launch for residuals that may be
shrunk, whose programs end at once here, and PyTorch's sums of errors.

{quantizing()}
"""
