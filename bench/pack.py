"""Wheels for a GPU machine where nothing can be installed: `make gpu-pack`.

Fills a folder with what such a machine lacks, at the versions measured against, and compiles the kernels with the
Triton that it has.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

# What is measured against, and what these need beyond PyTorch and the usual packages.
PACKAGES = ("hqq==0.2.8.post1", "termcolor==3.3.0", "gemlite==0.6.0.post2", "peft==0.21.2")
LIMIT = 60 << 20  # bytes


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def pack(folder: Path) -> list[Path]:
    """Wheels of `PACKAGES`, all of them pure Python, without their dependencies.

    Raises:
        RuntimeError: a wheel is for one platform, or all together are too large to carry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), *PACKAGES)
    wheels = sorted(folder.glob("*.whl"))
    bound = [wheel.name for wheel in wheels if not wheel.name.endswith("-none-any.whl")]
    if bound:
        raise RuntimeError(f"these wheels serve one platform alone: {', '.join(bound)}")
    size = sum(wheel.stat().st_size for wheel in wheels)
    if len(wheels) != len(PACKAGES) or size > LIMIT:
        raise RuntimeError(f"{len(wheels)} wheels of {size >> 20} MiB; wanted {len(PACKAGES)} of {LIMIT >> 20} at most")
    return wheels


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.pack", description=__doc__)
    parser.add_argument("folder", type=Path)
    for wheel in pack(parser.parse_args().folder):
        print(f"{wheel.name}  {wheel.stat().st_size >> 10} KiB")


if __name__ == "__main__":
    main()
