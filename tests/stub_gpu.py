"""Triton's own launcher over a CUDA driver that does nothing: what a call costs the host, and that all of it runs.

Kernels are compiled for sm_90 and never run: outputs are uninitialized, and what a call takes is Python, dispatch,
allocation of CPU tensors, and Triton's launch.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from hqq_oft.ops import backends

SOURCE = Path(__file__).with_name("libcuda_stub.c")
LIBRARY = Path(__file__).parents[1] / "build" / "libcuda_stub" / "libcuda.so.1"
# What the launchers ask of a tensor's device, which is a CPU here, and the answers of an H100.
ANSWERS = {"check_device": lambda *_: None, "multiprocessors": lambda _: 132, "device_name": lambda _: "default"}


def build() -> ctypes.CDLL:
    """Compile the stub and load it before anything asks for the real library, whose name it has."""
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    command = [os.environ.get("CC", "cc"), "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"]
    subprocess.run([*command, str(LIBRARY), str(SOURCE)], check=True)
    return ctypes.CDLL(str(LIBRARY), ctypes.RTLD_GLOBAL)


@contextlib.contextmanager
def stub_gpu() -> Iterator[ctypes.CDLL]:
    """Inside the block, the Triton kernels serve CPU tensors by launches that do nothing, as `stub_launches()` counts.

    Triton's active driver stays the stub for the rest of the process.
    """
    import triton
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not launched. Unset it.")
    library = build()
    triton.knobs.nvidia.libcuda_path = str(LIBRARY.parent)

    class Stub(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:  # not the base class's, which asks torch for a GPU
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = self.get_current_stream = lambda *_: 0
            self.get_device_capability, self.set_current_device = lambda *_: (9, 0), lambda *_: None

    backends.registry()  # imports the kernels
    triton.runtime.driver.set_active(Stub())
    with contextlib.ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            for function, answer in ANSWERS.items():
                if name.startswith("hqq_oft.triton_kernels") and hasattr(module, function):
                    patches.enter_context(mock.patch.object(module, function, answer))
        patches.enter_context(backends.backend("triton"))
        backends.forget_plans()
        try:
            yield library
        finally:
            backends.forget_plans()
