"""`D = R - I` of adapters in inference, kept while the parameters that it was made from are unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RotationCache:
    """At most one `D` per adapter. Copies and pickles of it are empty.

    A parameter counts as unchanged while it is the same tensor, at the same address, and autograd's count of its
    in-place changes is the same. That count does not see changes through `.data`: after one, `clear()`.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Tensor, tuple[Any, ...], Tensor]] = {}

    def __reduce__(self) -> tuple[type[RotationCache], tuple[()]]:
        return RotationCache, ()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, adapter: str, v: Tensor, settings: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """The adapter's `D`, computed where it is not kept or has changed.

        Args:
            adapter: its name.
            v: the parameter that `D` is made from.
            settings: what else decides `D`.
            compute: makes it.
        """
        # An inference tensor has no count of changes. A captured CUDA graph would hold on to the address of a `D` that
        # it does not own, and never see a change: it computes its own.
        if v.is_inference() or (v.is_cuda and torch.cuda.is_current_stream_capturing()):
            return compute()
        # Another stream would have to wait for what this one computes.
        stream = torch.cuda.current_stream(v.device).cuda_stream if v.is_cuda else None
        key = (v.data_ptr(), v._version, stream, *settings)
        kept = self._entries.get(adapter)
        if kept is not None and kept[0] is v and kept[1] == key:
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():  # what is kept may meet a forward that records gradients
            d = compute()
        self._entries[adapter] = (v, key, d)
        return d

    def drop(self, adapter: str) -> None:
        """Forget one adapter."""
        self._entries.pop(adapter, None)

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()
