"""`python -m hqq_oft.env`: a report of versions, devices and backends to paste into a bug report."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata

import torch

from . import __version__, _native
from ._config import cpu_instruction_set, keep_pristine_from_environment
from .backends import OPERATIONS, registry, selected_backend

_PACKAGES = ("torch", "peft", "hqq", "transformers", "accelerate", "triton", "numpy", "safetensors")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    lines = [f"cpu: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
             f"torch threads, {torch.backends.cpu.get_cpu_capability()}"]  # fmt: skip
    if not torch.cuda.is_available():
        return [*lines, "cuda: none that torch can use"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        )
    return lines


def _serving(operation: str) -> str:
    """Which backend the current selection takes, then why each other one would not have served."""
    selected = selected_backend()
    candidates = list(registry().values()) if selected == "auto" else [registry()[selected]]
    serving = next((backend.name for backend in candidates if backend.why_not(operation) is None), None)
    return serving or f"none: {candidates[0].why_not(operation)}"


def _instruction_sets() -> str:
    """What the native CPU kernels were compiled for and this processor has."""
    if _native.REASON:
        return ""
    names = _native.operations.instruction_sets()
    return f" (native CPU kernels here: {', '.join(names)}; in use: {_native.operations.instruction_set()})"


def report() -> str:
    """The report as text: versions, devices, environment variables, and which backend serves which operation."""
    lines = [f"hqq_oft {__version__}, Python {platform.python_version()}, {platform.platform()}", ""]
    lines += [f"{name:14}{_version(name)}" for name in _PACKAGES]
    lines += ["", *_devices(), ""]
    lines += [f"{tool:14}{shutil.which(tool) or 'not found'}" for tool in ("g++", "nvcc", "ninja")]
    lines += ["", f"HQQ_OFT_BACKEND={selected_backend()}", f"HQQ_OFT_KEEP_PRISTINE={keep_pristine_from_environment()}"]
    lines += [f"HQQ_OFT_CPU_ISA={cpu_instruction_set()}{_instruction_sets()}"]
    lines += ["", f"{'operation':20}served by"]
    lines += [f"{operation:20}{_serving(operation)}" for operation in OPERATIONS]
    lines += ["", "operations that a backend does not serve:"]
    for backend in registry().values():
        missing = [operation for operation in OPERATIONS if backend.why_not(operation) is not None]
        if missing:
            lines.append(f"  {backend.name}: {', '.join(missing)} ({backend.why_not(missing[0])})")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
