"""`python -m hqq_oft.env` prints versions, devices and backends, for bug reports."""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

import torch

from ._config import cpu_instruction_set, keep_pristine_from_environment
from ._installation import __version__, describe
from .ops import native as _native
from .ops.backends import Unsupported, registry, selected_backend
from .ops.table import OPERATIONS
from .ops.verified import device_name, version
from .ops.weight import QuantizedWeight

_PACKAGES = ("torch", "peft", "hqq", "transformers", "accelerate", "triton", "numpy", "safetensors")


def _devices() -> list[str]:
    processor, threads = device_name(torch.device("cpu")), torch.get_num_threads()
    instructions = torch.backends.cpu.get_cpu_capability()
    lines = [f"cpu: {processor}, {os.cpu_count()} cores, {threads} torch threads, {instructions}"]
    if not torch.cuda.is_available():
        return [*lines, "cuda: no device available to torch"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        )
    return lines


def _small_calls(device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation for a 32 x 32 layer."""
    half = torch.bfloat16
    x, d = torch.ones(1, 32, dtype=half, device=device), torch.zeros(2, 16, 16, dtype=half, device=device)
    v, per_group = torch.zeros(2, 120, device=device), torch.ones(32, dtype=half, device=device)
    packed = torch.zeros(16, 32, dtype=torch.uint8, device=device)
    weight = QuantizedWeight(packed, per_group, per_group, 32, 32, 4, 32, 1)
    return {
        "cayley": (v, 16, 5, None, None, half),
        "cayley_backward": (d, v, 16, 5, None, None),
        "project_": (v, 0.1),
        "rotate": (x, d, None, False),
        "rotate_backward": (x, x, d, None, False, True, True),
        "dequantize": (weight, half),
        "dequantize_rotate": (weight, d, half),
        "linear": (x, weight, d, None, None),
        "linear_backward": (x, x, weight, d, None, True, True),
        "quantize": (torch.zeros(32, 32, dtype=half, device=device), 16, 4, 32, 1, True, 20, half, None),
    }


def serving(operation: str, device: torch.device) -> tuple[str, dict[str, str]]:
    """`serving_call` of a small bfloat16 call on a device."""
    return serving_call(operation, _small_calls(device)[operation])


def serving_call(operation: str, args: tuple[Any, ...]) -> tuple[str, dict[str, str]]:
    """Which backend serves a call under the current selection, and why the ones tried before it did not.

    Args:
        operation: name of an operation.
        args: its arguments.

    Returns:
        The backend's name, or `none` if no selected backend supports the call; and the reasons by backend name.
    """
    selected = selected_backend()
    reasons: dict[str, str] = {}
    for backend in registry().values() if selected == "auto" else (registry()[selected],):
        try:
            backend.plan(operation, selected != "auto", args)
            return backend.name, reasons
        except Unsupported as refusal:
            reasons[backend.name] = str(refusal)
    return "none", reasons


def _served() -> list[str]:
    """Table of the backend that serves each operation on each device, with the reasons of the backends that do not."""
    devices = [torch.device("cpu")] + [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    lines = [f"{'operation':20}" + "".join(f"{f'on {device}':14}" for device in devices)]
    refused: dict[str, list[str]] = {}
    for operation in OPERATIONS:
        line = f"{operation:20}"
        for device in devices:
            name, reasons = serving(operation, device)
            line += f"{name:14}"
            for other, reason in reasons.items():
                refused.setdefault(f"{other} on {device}: {reason}", []).append(operation)
        lines.append(line.rstrip())
    if refused:
        lines += ["", "not served by:"]
        lines += [f"  {reason} ({', '.join(operations)})" for reason, operations in refused.items()]
    return lines


def _instruction_sets() -> str:
    """Instruction sets that the native CPU kernels were compiled for and this processor supports."""
    if _native.REASON:
        return ""
    names = _native.cpu.instruction_sets()
    return f" (native CPU kernels here: {', '.join(names)}; in use: {_native.cpu.instruction_set()})"


def report() -> str:
    """The report as text: versions, devices, environment variables, and which backend serves which operation."""
    lines = [f"hqq_oft {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"running from {describe()}", ""]
    lines += [f"{name:14}{version(name)}" for name in _PACKAGES]
    lines += ["", *_devices(), ""]
    lines += [f"{tool:14}{shutil.which(tool) or 'not found'}" for tool in ("g++", "nvcc", "ninja")]
    lines += ["", f"HQQ_OFT_BACKEND={selected_backend()}", f"HQQ_OFT_KEEP_PRISTINE={keep_pristine_from_environment()}"]
    lines += [f"HQQ_OFT_CPU_ISA={cpu_instruction_set()}{_instruction_sets()}"]
    lines += ["", *_served()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
