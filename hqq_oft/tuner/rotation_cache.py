"""Cache of `D = R - I` for inference; entries are valid while the parameters they were computed from are unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RotationCache:
    """At most one `D` per adapter, and derived tensors for mixed-adapter batches. Copies and pickles of it are empty.

    A parameter counts as unchanged while it is the same tensor, at the same address, with the same version counter.
    Changes through `.data` do not bump that counter: call `clear()` after them.

    While frozen (`hqq_oft.frozen_rotations`) no entry is freed, so that a CUDA graph may hold its address, and a
    changed parameter is an error.
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
        """The adapter's `D`, recomputed if it is not cached or its key has changed.

        Args:
            adapter: its name.
            v: the parameter that `D` is computed from.
            settings: the rest of the cache key: everything else that `D` depends on.
            compute: computes `D`.

        Raises:
            RuntimeError: the key has changed while frozen.
        """
        capturing = v.is_cuda and torch.cuda.is_current_stream_capturing()
        # An inference tensor has no version counter. A captured CUDA graph would keep the address of a `D` that it does
        # not own and never see a change, so it computes its own, unless the cache is frozen.
        if v.is_inference() or (capturing and not self.frozen):
            return compute()
        # Entries are per stream: another stream would have to synchronize with this one.
        stream = torch.cuda.current_stream(v.device).cuda_stream if v.is_cuda and not self.frozen else None
        key = (v.data_ptr(), v._version, stream, *settings)
        kept = self._entries.get(adapter)
        if kept is not None and kept[0] is v:
            then = kept[1]
            if then == key or (self.frozen and (then[:2], then[3:]) == (key[:2], key[3:])):  # on any stream
                return kept[2]
        if kept is not None and self.frozen:
            raise RuntimeError(
                f"the adapter {adapter!r} has changed while its rotations were frozen; leave the `frozen_rotations` "
                "block before changing adapters, and capture CUDA graphs again."
            )
        if capturing:  # memory of the graph's pool must not be cached
            return compute()
        with torch.inference_mode(False), torch.no_grad():  # a later forward may record gradients
            d = compute()
        self._entries[adapter] = (v, key, d)
        return d

    def frozen_rotation(self, adapter: str, dtype: torch.dtype) -> Tensor | None:
        """The adapter's `D` for a compiled graph, which has no other way to know that it is still valid."""
        kept = self._entries.get(adapter)
        return kept[2] if self.frozen and kept is not None and kept[2].dtype is dtype else None

    def derived(self, key: Any, parts: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
        """A cached tensor computed from `parts`, which are compared by identity; one per kind, unless frozen.

        Args:
            key: the kind first, then what distinguishes tensors of that kind.
            parts: the tensors it is computed from.
            compute: computes it.

        Raises:
            RuntimeError: not cached while a CUDA graph is being captured; computing it copies from the host.
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
        """Drop one adapter's entry.

        Raises:
            RuntimeError: the adapter is cached and the cache is frozen.
        """
        if adapter in self._entries:
            self._check_thawed()
        self._entries.pop(adapter, None)
        self._derived.clear()

    def clear(self) -> None:
        """Drop all entries.

        Raises:
            RuntimeError: the cache is frozen and not empty.
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
