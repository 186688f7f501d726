"""The CUDA decode kernel's source compiled for the host (emulation.cpp), called on CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqq_oft import QuantizedWeight

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
COMPILER = shutil.which("c++") or shutil.which("g++")


class Problem(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int)
        for name in ("tokens", "out_features", "in_features", "bits", "group_size", "block_size", "adapters")
    ]


class Device(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("multiprocessors", "shared_per_block", "shared_per_multiprocessor")]


class Plan(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_int)
            for name in (
                "warps", "token_tiles", "span", "tiles", "band_tiles", "bands", "slice", "splits", "scale_words",
                "scale_buffers", "resident",
            )
        ),
        ("chained", ctypes.c_bool),
    ]  # fmt: skip


class Planned(ctypes.Structure):
    _fields_ = [
        ("plan", Plan),
        ("shared_bytes", ctypes.c_int),
        ("partial_elements", ctypes.c_int64),
        ("tickets", ctypes.c_int64),
    ]


KIB = 1024
MOST_WARPS = 8  # of a block
A100 = Device(108, 163 * KIB, 164 * KIB)
L4 = Device(58, 99 * KIB, 100 * KIB)
H200 = Device(132, 227 * KIB, 228 * KIB)


@functools.lru_cache
def library() -> ctypes.CDLL:
    """The compiled emulation; once for each process."""
    assert COMPILER is not None
    folder = tempfile.TemporaryDirectory()
    out = Path(folder.name) / "emulation.so"
    command = [COMPILER, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command.append("-U_FORTIFY_SOURCE")  # it takes jumps between the threads' stacks for errors
    done = subprocess.run(
        [*command, "-I", str(SOURCES), "-o", str(out), str(HERE / "emulation.cpp")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(out))
    folder.cleanup()  # a loaded library stays mapped
    loaded.plan.restype = Planned
    loaded.emulate.restype = ctypes.c_bool
    return loaded


def planned(
    problem: Problem,
    device: Device = H200,
    cut: tuple[int, int] | None = None,
    chained: bool = False,
    warps: int = MOST_WARPS,
) -> Planned:
    """The plan for a device, or with `cut` (tiles of a band, stages of a slice) the given one."""
    given = (warps, *cut) if cut else (0, 0, 0)
    return library().plan(ctypes.byref(problem), ctypes.byref(device), *given, int(chained))


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    d: Tensor | None,
    bias: Tensor | None,
    index: Tensor | None,
    *,
    repeats: int = 2,
    **how: Any,
) -> Tensor:
    """`repeats` results [repeats, M, N] of `reference.linear` by the emulated kernel, each in another thread order.

    Before each run, outputs and the workspace are filled with NaN, and the tickets as an aborted run
    might leave them. `how` goes to `planned`.
    """
    assert weight.axis == 1
    tokens, n = x.shape[0], weight.out_features
    b = 0 if d is None else d.shape[-1]
    adapters = 1 if index is None else d.shape[0]
    problem = Problem(tokens, n, weight.in_features, weight.bits, weight.group_size, b, adapters)
    result = planned(problem, **how)
    y = torch.full((repeats, tokens, n), float("nan"), dtype=x.dtype)
    partial = torch.full((result.partial_elements,), float("nan"))
    tickets = torch.randint(-(2**62), 2**62, (result.tickets,))
    reason = ctypes.create_string_buffer(256)

    def address(tensor):
        return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())

    done = library().emulate(
        ctypes.byref(problem), ctypes.byref(result.plan), int(x.dtype == torch.bfloat16), address(x),
        ctypes.c_int64(x.stride(0)), address(d), 0 if d is None else d.shape[-3], address(index),
        address(weight.packed), address(weight.scale), address(weight.zero), address(bias), address(y),
        address(partial), address(tickets), repeats, reason,
    )  # fmt: skip
    assert done, reason.value.decode()
    assert not tickets.any()  # every ticket is as a next launch may find it
    return y
