"""Merging adapters into a layer's base weight and unmerging them: what does not depend on how the weight is stored."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge

from ..quant.solver import Solver
from . import fold
from .rotated import RotatedLayer
from .snapshot import BaseState, MergeState


class MergeableLayer(RotatedLayer):
    """The part of this package's layers that merges and unmerges; a failed merge changes nothing.

    A merged weight is computed aside, always from the pristine one, and then published. Writers exclude each other by
    a lock.
    """

    # --- Of each class -----------------------------------------------------------------------------------------------

    def _state(self) -> BaseState:
        """What a merge changes of the base layer; tensors are shared, not copied."""
        raise NotImplementedError

    def _publish(self, state: Any, merge: MergeState) -> None:
        """Make the layer compute with this state; if that fails, with the one from before. The lock is held."""
        raise NotImplementedError

    def _fold_in(self, state: Any, rotations: fold.Rotations, check: bool) -> BaseState:
        """The state whose weight is that of `state` with the rotations folded in."""
        raise NotImplementedError

    def _record(self, merge: MergeState) -> None:
        """Set the merge state; the lock is held."""
        self._merge = merge

    # --- Merging -----------------------------------------------------------------------------------------------------

    @property
    def merge_error(self) -> float | None:
        """While merged, the relative quantization error of the merged weight, |W'_q - W'| / |W'|; else None."""
        return self._merge.error

    def _merge_adapters(
        self,
        adapter_names: list[str] | None,
        fold_in: Callable[[Any, fold.Rotations], tuple[BaseState, float | None]],
        again: bool = False,
        solver: Solver = "hqq",
    ) -> None:
        """Merge adapters by `fold_in`, which returns the new state and its relative error.

        Args:
            adapter_names: as for `merge`.
            fold_in: given the state to begin with and the rotations to fold into it, in the order of application.
            again: merge even if these adapters are merged already.
            solver: recorded in the merge state.
        """
        with self._lock:
            order = self._adapters_after_merge(adapter_names, again)
            if not order or (not again and set(order) == set(self.merged_adapters)):
                return
            pristine = self._merge.pristine if self.merged else self._state()
            state, error = fold_in(*self._start(order, pristine))
            kept = pristine
            if kept is not None and self.keep_pristine != "device":
                kept = kept.to("cpu") if self.keep_pristine == "cpu" else None
            self._publish(state, MergeState(tuple(order), kept, error, solver))
        left_out = [name for name in self.active_adapters if name in self.oft_R and name not in order]
        if left_out:
            warnings.warn(
                f"Merged {order}; the active adapter(s) {left_out} are not merged and have no effect until "
                "`unmerge` is called: a merged layer uses only its base weight.",
                stacklevel=3,
            )

    def _start(self, order: list[str], pristine: BaseState | None) -> tuple[Any, fold.Rotations]:
        """The state that a merge of `order` begins with, and the rotations to fold into it."""
        rotations = [(name, self._rotation(name)) for name in order]
        if pristine is not None:
            return pristine.to(self._device), rotations
        return self._state(), rotations + self._inverse("Merging more adapters", stacklevel=5)

    def _adapters_after_merge(self, adapter_names: list[str] | None, again: bool = False) -> list[str]:
        """The adapters that are merged after `merge(adapter_names)`, in the order in which they are applied.

        With `again`, adapters that are already merged are merged again into another format, without a warning.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        if self.merged and set(wanted) <= set(self.merged_adapters) and again:
            return list(self.merged_adapters)
        requested = check_adapters_to_merge(self, adapter_names)
        new = [name for name in dict.fromkeys(requested) if name in self.oft_R]
        if new and isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                f"Cannot merge OFT into the weight below a {type(self.base_layer).__name__}: that layer's own "
                "adapters would see the input unrotated. Merge and unload them first."
            )
        return self._merge_order(self.merged_adapters + new)

    def _merge_order(self, names: list[str]) -> list[str]:
        active = self.active_adapters
        return sorted(names, key=active.index) if set(names) <= set(active) else names

    def _inverse(self, action: str, stacklevel: int) -> fold.Rotations:
        """The rotations that approximately undo the merge, if the pristine weight was discarded; warns."""
        warnings.warn(
            f"{action} without the pristine weight, which was discarded: the inverse rotation of the merged weight is "
            'quantized or rounded again, which loses precision. Set keep_pristine to "device" or "cpu" before merging '
            "to avoid this.",
            stacklevel=stacklevel,
        )
        return fold.inverse([(name, self._rotation(name)) for name in self.merged_adapters])

    def unmerge(self) -> None:
        """Unmerge all adapters: bit-exact, unless the pristine weight was discarded.

        Without it the inverse rotation is applied to the merged weight and the result is stored as a merged one would
        be, which is lossy and raises a warning.
        """
        with self._lock:
            if not self.merged:
                warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
                return
            pristine = self._merge.pristine
            if pristine is not None:
                state = pristine.to(self._device)
            else:
                state = self._fold_in(self._state(), self._inverse("Unmerging", stacklevel=3), False)
            self._publish(state, MergeState())

    def drop_pristine(self) -> None:
        """Discard the pristine weight of a merged layer to free its memory; unmerging is then lossy."""
        with self._lock:
            self._record(dataclasses.replace(self._merge, pristine=None))

    def merge_state(self) -> tuple[BaseState, MergeState]:
        """What a merge changes, for `restore_merge_state`; tensors are shared, not copied."""
        with self._lock:
            return self._state(), self._merge

    def restore_merge_state(self, state: tuple[BaseState, MergeState]) -> None:
        """Restore what `merge_state` returned."""
        with self._lock:
            state[0].install(self.get_base_layer())
            self._record(state[1])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.merged and any(f"{prefix}base_layer.{name}" in state_dict for name in ("W_q", "weight")):
            raise ValueError(
                f"Cannot load a base weight into a layer that {self.merged_adapters} are merged into: unmerging would "
                "restore the old one. Unmerge first."
            )
        with self._lock:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
