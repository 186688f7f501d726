"""Every kernel once on small shapes, for compute-sanitizer: `PYTHONPATH=.:tests python -m gpu.sanitize [device]`."""

from __future__ import annotations

import sys

import torch

from .cases import operations, run

# tokens, out-features, in-features, block size, and settings: every branch of the kernels that a call can choose.
CASES = [
    (7, 64, 768, 32, {}),  # split over K and over N
    (33, 72, 96, 16, {"group": 32}),  # ragged
    (300, 64, 96, 32, {"group": 32}),  # by the scratch
    (7, 20, 64, 16, {"group": 16, "bits": 1}),  # bands that are not whole rows
    (7, 64, 96, 16, {"group": 32, "bits": 3, "axis": 0}),
    (7, 64, 96, 16, {"group": 32, "bits": 8}),
    (7, 64, 96, 16, {"group": 32, "bits": 2, "axis": 0}),
    (7, 64, 768, 96, {}),
    (7, 64, 256, 128, {"stored": 1}),
    (7, 64, 512, 256, {"terms": None}),
    (33, 64, 96, 16, {"group": 32, "adapters": 3}),
    (7, 64, 96, 32, {"group": 32, "transpose": True}),
]


def main(device: str = "cuda") -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for *sizes, settings in CASES:
            torch.manual_seed(0)
            for name, args in operations(*sizes, device, dtype, **settings).items():
                if not all(torch.isfinite(out).all() for out in run(name, args)):
                    raise SystemExit(f"{name} is not finite: {dtype}, {sizes}, {settings}")
    print(f"{2 * len(CASES)} sets of operations ran on {device}")


if __name__ == "__main__":
    main(*sys.argv[1:])
