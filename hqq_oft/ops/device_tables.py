"""The files of `kernels/configs`: tuned parameters and measurements per device."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

CONFIGS = "hqq_oft.kernel_configs"


def table_name(device: str) -> str:
    """The file name of a device's table: `nvidia_h100_80gb_hbm3` for `NVIDIA H100 80GB HBM3`."""
    return "_".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def own_table(name: str) -> dict[str, Any]:
    """The contents of `<name>.json`; empty if the file does not exist."""
    path = resources.files(CONFIGS).joinpath(f"{name}.json")
    return dict(json.loads(path.read_text())) if path.is_file() else {}
