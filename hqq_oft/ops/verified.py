"""Where the kernels were verified: the record that `hqq-oft check` writes for a device, and a warning without one."""

from __future__ import annotations

import json
import platform
import re
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._config import cache_folder
from .._installation import __version__
from .device_tables import own_table, table_name

_DRIVERS = (
    (Path("/proc/driver/nvidia/version"), r"NVRM version:.*?\s(\d+(?:\.\d+)+)\s"),
    (Path("/sys/module/amdgpu/version"), r"(\S+)"),
)
_warned: set[torch.device] = set()


class UnverifiedKernels(UserWarning):
    """Nobody has checked the kernels on this device, or the check has found faults."""


def version(package: str) -> str:
    """Version of a package, or `not installed`."""
    if package == "torch":
        return str(torch.__version__)  # with the build, such as +cu130, which the metadata of wheels from PyPI lack
    if package == "hqq-oft":
        return __version__  # of the code that runs, installed or not
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    """Model of the GPU or of the processor."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return model[1] if model else platform.processor() or platform.machine()


def _driver() -> str:
    """Version of the GPU's driver, or of CUDA or ROCm where the system does not tell it."""
    for path, pattern in _DRIVERS:
        found = re.search(pattern, path.read_text()) if path.exists() else None
        if found:
            return found[1]
    return str(torch.version.cuda or torch.version.hip)


def identity(device: torch.device) -> dict[str, str]:
    """What the results of the kernels depend on: device, driver, versions."""
    on_gpu = {"driver": _driver()} if device.type == "cuda" else {"with": torch.backends.cpu.get_cpu_capability()}
    return {"device": device_name(device)} | on_gpu | {name: version(name) for name in ("torch", "triton", "hqq-oft")}


def record_path(device: torch.device, selected: str = "auto") -> Path:
    """The file of a device's record, one for each backend that was selected."""
    parts = [f"{key} {value}" for key, value in (identity(device) | {"backend": selected}).items()]
    name = table_name(" ".join(parts).removeprefix("device "))
    return cache_folder() / "check" / f"{name}.json"


def _record(device: torch.device) -> dict[str, Any] | None:
    """The record of `auto` on a device; None if there is none that can be read."""
    try:
        record = json.loads(record_path(device).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and "faults" in record else None


def warn_if_unverified(device: torch.device) -> None:
    """Warn, once per process and GPU, if its kernels failed their check or if nobody has ever checked them there."""
    if device.type != "cuda" or device in _warned:
        return
    _warned.add(device)
    record, name = _record(device), device_name(device)
    if record is not None and record["faults"]:
        warnings.warn(
            f"`hqq-oft check` found {len(record['faults'])} fault(s) in the kernels on this {name}: results may be "
            f"wrong. HQQ_OFT_BACKEND=reference avoids the kernels; {record_path(device)} lists the faults.",
            UnverifiedKernels,
            stacklevel=2,
        )
    elif record is None and not own_table(table_name(name)):
        warnings.warn(
            f"the kernels of hqq_oft were never verified on this {name} with this driver and these versions of torch "
            f"and triton. Run `hqq-oft check --device {device}` once: it compares them with float64 and records the "
            "result.",
            UnverifiedKernels,
            stacklevel=2,
        )
