"""What the launchers of the Triton kernels would launch, recorded without a GPU, and compiled for one that is not here.

Launchers are called with tensors that have shapes and no memory. Needs no interpreter (TRITON_INTERPRET unset).
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import hqq_oft.triton_kernels
import torch
import triton
from hqq_oft.triton_kernels import _launch, _tiles
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from hqq_oft import QuantizedWeight
from hqq_oft.ops.backends import registry
from hqq_oft.ops.packing import LEVELS_PER_ELEMENT

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MULTIPROCESSORS = 132
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


def describe(kernel: JITFunction, label: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
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


@contextmanager
def recording(device: str, run: Callable[..., None], multiprocessors: int = MULTIPROCESSORS) -> Iterator[None]:
    """Launches call `run(kernel, *args, grid=..., warmup=..., **constants)` instead, with the tiles of `device`."""
    names = [name for _, name, _ in pkgutil.iter_modules(hqq_oft.triton_kernels.__path__)]
    modules = [importlib.import_module(f"{hqq_oft.triton_kernels.__name__}.{name}") for name in names]
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        patches.enter_context(mock.patch.object(_launch, "multiprocessors", return_value=multiprocessors))
        patches.enter_context(mock.patch.object(_tiles, "device_name", return_value=device))
        # What launchers find out about the device; `compile_for` corrects it for targets without wgmma.
        for module, (name, value) in itertools.product(modules, (("check_device", None), ("has_wgmma", True))):
            if hasattr(module, name):
                patches.enter_context(mock.patch.object(module, name, return_value=value))
        yield


def record(
    calls: Iterable[tuple[str, Callable[[], object]]], device: str = "default", multiprocessors: int = MULTIPROCESSORS
) -> list[tuple[Launch, tuple[int, ...]]]:
    """Every launch of labelled calls, in order, with its grid."""
    found: list[tuple[Launch, tuple[int, ...]]] = []
    label = ""

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((describe(kernel, label, args, kwargs), tuple(grid)))

    with recording(device, run, multiprocessors):
        for label, call in calls:  # noqa: B007 (`run` reads it)
            call()
    return found


def planned(planner: Callable[..., Any], *args: Any) -> Callable[[], object]:
    """What computes a call, and the call; the planners of operations, called `plan_<operation>`, are told `by_name`."""
    operations = registry()["triton"].operations.values()
    return lambda: planner(*((True,) if planner in operations else ()), *args)(*args)


def tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    """Without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def packed(n: int, k: int, bits: int, axis: int, group: int, dtype: torch.dtype) -> QuantizedWeight:
    """A quantized weight without memory."""
    levels = (n * k // group, group) if axis == 1 else (group, n * k // group)
    storage = torch.int32 if bits == 3 else torch.uint8
    w = tensor(-(-levels[0] // LEVELS_PER_ELEMENT[bits]), levels[1], dtype=storage)
    scale, zero = (tensor(n * k // group, dtype=dtype) for _ in range(2))
    return QuantizedWeight(w, scale, zero, n, k, bits, group, axis)


def compile_for(launch: Launch, target: str) -> Any:
    """The compiled kernel of a launch."""
    kernel = getattr(sys.modules[launch.module], launch.name)
    constants = dict(launch.constants)
    # What its launcher would have chosen on the target.
    elsewhere: dict[str, dict[Any, Any]] = {"PERMUTED": {True: target == "sm_90"}}  # the operand layout of wgmma
    if target.startswith("gfx"):
        elsewhere |= {"PTX": {True: False}, "PRECISION": {"tf32x3": "ieee"}}
    constants |= {n: elsewhere[n].get(v, v) for n, v in constants.items() if n in elsewhere}
    position = {name: i for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={(position[name],): value for name, value in constants.items()},
        attrs={(position[name],): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    return triton.compile(source, target=TARGETS[target], options=dict(launch.options))


def read_cubin(cubin: bytes, tool: str, *options: str) -> str:
    """What one of the tools that come with Triton prints about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    out = read_cubin(cubin, "cuobjdump", "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources:\n{out}")
    return int(found[1]), int(found[2])
