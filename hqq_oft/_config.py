"""All environment variables that the package reads at run time. ENVS.md documents them for users."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, cast, get_args

BackendName = Literal["auto", "triton", "native", "reference"]
KeepPristine = Literal["device", "cpu", "none"]
CPUInstructionSet = Literal["auto", "portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"]

_BACKENDS = get_args(BackendName)


def _choice(variable: str, default: str, accepted: tuple[str, ...]) -> str:
    value = os.environ.get(variable)
    if not value:
        return default
    value = value.strip().lower() or default
    if value not in accepted:
        raise ValueError(
            f"{variable}={value!r} is not understood; set it to one of {', '.join(accepted)}, or unset it."
        )
    return value


def backend_from_environment() -> str:
    """The backend selected by `HQQ_OFT_BACKEND`, `auto` if unset."""
    return _choice("HQQ_OFT_BACKEND", "auto", _BACKENDS)


def keep_pristine_from_environment() -> KeepPristine:
    """Where a merged layer keeps its original packed weight: `HQQ_OFT_KEEP_PRISTINE`, `device` if unset."""
    return cast(KeepPristine, _choice("HQQ_OFT_KEEP_PRISTINE", "device", get_args(KeepPristine)))


def cpu_instruction_set() -> CPUInstructionSet:
    """The instruction set of the native CPU kernels: `HQQ_OFT_CPU_ISA`, `auto` if unset."""
    return cast(CPUInstructionSet, _choice("HQQ_OFT_CPU_ISA", "auto", get_args(CPUInstructionSet)))


def scratch_bytes() -> int:
    """Maximum scratch size for dequantized weights, in bytes: `HQQ_OFT_SCRATCH_MIB`, 64 MiB if unset."""
    value = os.environ.get("HQQ_OFT_SCRATCH_MIB", "").strip() or "64"
    if not value.isascii() or not value.isdigit() or int(value) == 0:
        raise ValueError(f"HQQ_OFT_SCRATCH_MIB={value!r} is not understood; set it to a positive integer, or unset it.")
    return int(value) * 2**20


def cache_folder() -> Path:
    """The package's folder for files that can be made again: in `XDG_CACHE_HOME`, by default `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "hqq_oft"
