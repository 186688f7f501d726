"""Where a figure was measured: device, versions, commit."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path

import torch

from hqq_oft.ops.device_tables import table_name
from hqq_oft.ops.verified import device_name, version

ROOT = Path(__file__).parents[1]
SOURCES = (".py", ".toml", ".json", ".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".cuh")
PACKAGES = ("torch", "triton", "peft", "hqq", "transformers", "gemlite", "numpy")
IDENTITY = ("device", "commit", "sources", "torch", "triton")  # of a row, and what a run must share to go on


def commit() -> str:
    """The checked-out commit, and whether the sources differ from it; `unknown` outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()

    try:
        changed = [line for line in git("status", "--porcelain").splitlines() if "bench/results/" not in line]
        return git("rev-parse", "HEAD") + (", with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def sources() -> str:
    """A digest of the package, its kernels and tiles, and the measuring code: a commit is unknown in a copy."""
    digest = hashlib.sha256()
    for folder in ("hqq_oft", "kernels", "csrc", "bench"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCES and path.is_file() and ROOT / "bench" / "results" not in path.parents:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def describe(device: str) -> dict[str, str]:
    """Device, versions and commit."""
    kind = torch.device(device).type
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = device_name(torch.device(device))
    if kind == "cpu":
        name += f", {cores} cores, {torch.backends.cpu.get_cpu_capability()}"
    facts = {"device": name, "kind": kind}
    facts |= {"threads": str(torch.get_num_threads()), "python": platform.python_version()}
    facts |= {"cuda": str(torch.version.cuda), "commit": commit(), "sources": sources()}
    facts |= {
        "allocator": " ".join(
            f"{k}={v}" for k, v in sorted(os.environ.items()) if "MALLOC" in k or k == "GLIBC_TUNABLES"
        )
    }
    return facts | {package: version(package) for package in PACKAGES}


def folder_name(device: str) -> str:
    """The device's folder under bench/results: `cpu`, or the GPU's name as the tile tables spell it."""
    kind = torch.device(device).type
    return table_name(torch.cuda.get_device_name(device)) if kind == "cuda" else kind
