"""The files of `kernels/configs`: what is tuned, and what was measured, per device."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

CONFIGS = "hqq_oft.kernel_configs"


def table_name(device: str) -> str:
    """A device's name as its file is named: `NVIDIA H100 80GB HBM3` is `nvidia_h100_80gb_hbm3`."""
    return "_".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def own_table(name: str) -> dict[str, Any]:
    """What the file `<name>.json` holds; nothing where there is none."""
    path = resources.files(CONFIGS).joinpath(f"{name}.json")
    return dict(json.loads(path.read_text())) if path.is_file() else {}
