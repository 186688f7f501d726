"""The two limits of a device, measured in the run that quotes them: a copy's bandwidth and a matrix product's rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .timing import Clock


@dataclass(frozen=True)
class Limits:
    """What the device does at best.

    Attributes:
        bandwidth: of a copy, bytes read and written per second.
        rate: of a dense product of the run's dtype, operations per second.
    """

    bandwidth: float
    rate: float


def measure(device: torch.device, dtype: torch.dtype, small: bool = False) -> Limits:
    """Copy and multiply random data: 2 GiB and 8192^3 on a GPU, 256 MiB and 2048^3 elsewhere, less if `small`."""
    gpu = device.type == "cuda"
    size, side = ((2 << 30), 8192) if gpu else ((256 << 20), 2048)
    if small:
        size, side = 1 << 20, 128
    clock = Clock(device, budget=0.3 if gpu else 1.0)
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timings = clock.take_turns(
        {"copy": (lambda _: target.copy_(source), 1), "product": (lambda _: torch.mm(left, right), 1)}
    )
    return Limits(2 * size / (1e-6 * timings["copy"].p50), 2 * side**3 / (1e-6 * timings["product"].p50))
