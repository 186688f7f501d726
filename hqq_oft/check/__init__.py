"""`hqq-oft check`: every operation on this machine's device against float64, in the formats that people use."""

from .report import Report, run, usable_device

__all__ = ["Report", "run", "usable_device"]
