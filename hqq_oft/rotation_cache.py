"""`D = R - I` of adapters in inference, kept while the parameters that it was made from are unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RotationCache:
    """At most one `D` per adapter, and what batches that mix adapters need. Copies and pickles of it are empty.

    A parameter counts as unchanged while it is the same tensor, at the same address, and autograd's count of its
    in-place changes is the same. That count does not see changes through `.data`: after one, `clear()`.

    While frozen (`hqq_oft.frozen_rotations`) nothing that is kept is let go, so that a CUDA graph may hold its address,
    and a changed parameter is an error.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Tensor, tuple[Any, ...], Tensor]] = {}
        self._derived: dict[Any, tuple[tuple[Any, ...], Tensor]] = {}
        self.frozen = False

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

        Raises:
            RuntimeError: it has changed while frozen.
        """
        capturing = _capturing(v.device)
        # An inference tensor has no count of changes. A captured CUDA graph would hold on to the address of a `D` that
        # it does not own, and never see a change: it computes its own, unless that is ruled out.
        if v.is_inference() or (capturing and not self.frozen):
            return compute()
        # Another stream would have to wait for what this one computes.
        stream = torch.cuda.current_stream(v.device).cuda_stream if v.is_cuda and not self.frozen else None
        key = (v.data_ptr(), v._version, stream, *settings)
        kept = self._entries.get(adapter)
        if kept is not None and kept[0] is v and (kept[1] == key or (self.frozen and _same_but_stream(kept[1], key))):
            return kept[2]
        if kept is not None and self.frozen:
            raise RuntimeError(
                f"the adapter {adapter!r} has changed while its rotations were frozen; leave the `frozen_rotations` "
                "block before changing adapters, and capture CUDA graphs again."
            )
        if capturing:  # a graph's own memory must not be kept by anything else
            return compute()
        with torch.inference_mode(False), torch.no_grad():  # what is kept may meet a forward that records gradients
            d = compute()
        self._entries[adapter] = (v, key, d)
        return d

    def derived(self, key: Any, parts: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """A tensor made from `parts`, which are compared by identity; the last one alone of a kind, unless frozen.

        Args:
            key: the kind, and whatever tells it from others of its kind.
            parts: what it is made from.
            compute: makes it.

        Raises:
            RuntimeError: a CUDA graph is being captured and it is not kept: making it copies from the host.
        """
        kept = self._derived.get(key)
        if kept is not None and len(kept[0]) == len(parts) and all(a is b for a, b in zip(kept[0], parts, strict=True)):
            return kept[1]
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a batch that mixes adapters cannot be captured in a CUDA graph before it has run once: run it inside "
                "`with hqq_oft.frozen_rotations(model):`, then capture it there."
            )
        if not self.frozen:
            for other in [k for k in list(self._derived) if k[0] == key[0]]:
                self._derived.pop(other, None)
        with torch.inference_mode(False), torch.no_grad():
            made = compute()
        self._derived[key] = (parts, made)
        return made

    def drop(self, adapter: str) -> None:
        """Forget one adapter.

        Raises:
            RuntimeError: it is frozen.
        """
        if adapter in self._entries:
            self._check_thawed()
        self._entries.pop(adapter, None)
        self._derived.clear()

    def clear(self) -> None:
        """Forget all.

        Raises:
            RuntimeError: something is kept, and frozen.
        """
        if self._entries:
            self._check_thawed()
        self._entries.clear()
        self._derived.clear()

    def _check_thawed(self) -> None:
        if self.frozen:
            raise RuntimeError(
                "rotations are frozen, and CUDA graphs may hold them; leave the `frozen_rotations` block first."
            )


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _same_but_stream(kept: tuple[Any, ...], key: tuple[Any, ...]) -> bool:
    return kept[:2] == key[:2] and kept[3:] == key[3:]
