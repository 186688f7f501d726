"""An enclosing autocast: its dtype, and disabling it, since every operation specifies the dtype it computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_NOTHING = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast is off for this type of device."""
    if not torch._C._is_any_autocast_enabled():  # at a tenth of the cost of asking for one type
        return _NOTHING
    device_type = device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the enclosing autocast for this type of device; None if it is off."""
    if not torch._C._is_any_autocast_enabled():
        return None
    device_type = device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
