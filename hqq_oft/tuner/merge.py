"""Merging adapters into a layer's packed weight, and unmerging them.

The arithmetic is in `hqq_oft.quant.hqq_layer`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hqq.core.quantize import HQQLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from .._config import KeepPristine
from ..ops.weight import QuantizedWeight
from ..quant import hqq_layer
from ..quant.hqq_layer import PackedState
from . import fold
from .state_lock import StateLock, alone


class MergeableLayer:
    """The part of `HqqOFTLinear` that merges and unmerges; a failed merge leaves the layer unchanged."""

    if TYPE_CHECKING:
        base_layer: Any
        oft_R: Any  # noqa: N815
        active_adapters: list[str]
        merged_adapters: list[str]
        merged: bool
        keep_pristine: KeepPristine
        merge_error: float | None
        _pristine: PackedState | None
        _lock: StateLock

        get_base_layer: Callable[[], Any]
        _rotation: Callable[[str], Tensor]

    @alone
    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, into: float | None = None
    ) -> None:
        """Fold adapters into the pristine weight and requantize it with HQQ's quantizer.

        The merged layer equals the unmerged forward up to that quantization. If all merged adapters are active, their
        rotations are applied in the order of `active_adapters`, else in the order in which they were merged, whether by
        one call or several. All other attributes of the HQQ layer are kept. A merge that fails changes nothing.

        Args:
            safe_merge: check the merged weight for NaN and infinity before it is used.
            adapter_names: the adapters to merge, by default the active ones. Unknown names are ignored; already merged
                ones are skipped with a warning.
            into: bits of the merged weight, by default those of the layer; unmerging restores the layer's own.

        Raises:
            ValueError: `safe_merge` found NaN or infinity (the message names the adapter); or the layer wraps another
                tuner layer, which merging would bypass.
        """
        order = self._adapters_after_merge(adapter_names, again=into is not None)
        if not order or (into is None and set(order) == set(self.merged_adapters)):
            return
        base = self.base_layer
        pristine = self._pristine if self.merged else PackedState.of(base)
        dense = self._rotated_weight(order, check=safe_merge)
        merged = hqq_layer.requantize(base, dense, into)
        error = fold.relative_error(merged.weight(), dense)
        if safe_merge and not math.isfinite(error):
            raise ValueError(f"NaN or infinity after quantizing the weight merged with {order}. Nothing was merged.")
        with self._unchanged_on_error():
            kept = self._kept(pristine)
            merged.install(base)
            self._pristine, self.merged_adapters, self.merge_error = kept, order, error
        left_out = [name for name in self.active_adapters if name in self.oft_R and name not in order]
        if left_out:
            warnings.warn(
                f"Merged {order}; the active adapter(s) {left_out} are not merged and have no effect until "
                "`unmerge` is called: a merged layer uses only its base weight.",
                stacklevel=3,
            )

    def merged_linear(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> tuple[nn.Linear, float] | None:
        """Return the merged weight as an `nn.Linear`, without requantizing it; this layer is unchanged.

        Args:
            safe_merge: as for `merge`.
            adapter_names: as for `merge`.

        Returns:
            A frozen layer in the compute dtype, and the relative error from rounding the weight to that dtype; None if
            no adapter is to be merged.

        Raises:
            ValueError: as for `merge`.
        """
        order = self._adapters_after_merge(adapter_names, again=True)
        if not order:
            return None
        base = self.base_layer
        exact = self._rotated_weight(order, check=safe_merge)
        linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        linear.weight = nn.Parameter(exact.to(base.compute_dtype), requires_grad=False)
        if base.bias is not None:
            linear.bias = nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        return linear.train(base.training), fold.relative_distance(linear.weight, exact)

    def _adapters_after_merge(self, adapter_names: list[str] | None, again: bool = False) -> list[str]:
        """The adapters that are merged after `merge(adapter_names)`, in the order in which they are applied.

        With `again`, adapters that are already merged are merged again into another format, without a warning.
        """
        wanted = self.active_adapters if adapter_names is None else adapter_names
        if self.merged and set(wanted) <= set(self.merged_adapters) and again:
            return list(self.merged_adapters)
        requested = check_adapters_to_merge(self, adapter_names)
        new = [name for name in dict.fromkeys(requested) if name in self.oft_R]
        if new and not isinstance(self.base_layer, HQQLinear):
            raise ValueError(
                f"Cannot merge OFT into the HQQ weight below a {type(self.base_layer).__name__}: that layer's own "
                "adapters would see the input unrotated. Merge and unload them first."
            )
        return self._merge_order(self.merged_adapters + new)

    def _rotated_weight(self, order: list[str], check: bool) -> Tensor:
        """The pristine weight with the rotations of `order` folded in, `[N, K]` in float32."""
        rotations = [(name, self._rotation(name)) for name in order]
        base = self.base_layer
        pristine = self._pristine if self.merged else PackedState.of(base)
        if pristine is not None:
            return fold.rotate_weight(pristine.to(base.W_q.device).weight(), rotations, check)
        dense = self._estimate_pristine(action="Merging more adapters", stacklevel=5)
        return fold.rotate_dense(dense, rotations, check)

    def _merge_order(self, names: list[str]) -> list[str]:
        active = self.active_adapters
        return sorted(names, key=active.index) if set(names) <= set(active) else names

    def _estimate_pristine(self, action: str, stacklevel: int) -> Tensor:
        """Reconstruct the dense pristine weight from the merged one by the inverse rotation, if it was discarded."""
        warnings.warn(
            f"{action} without the pristine weight, which was discarded: the inverse rotation of the merged weight is "
            'quantized again, which loses precision. Set keep_pristine to "device" or "host" before merging to avoid '
            "this.",
            stacklevel=stacklevel,
        )
        rotations = [(name, self._rotation(name)) for name in self.merged_adapters]
        return fold.unrotate_weight(QuantizedWeight.from_hqq(self.get_base_layer()), rotations)

    def _kept(self, pristine: PackedState | None) -> PackedState | None:
        if pristine is None or self.keep_pristine == "none":
            return None
        return pristine.to("cpu") if self.keep_pristine == "host" else pristine

    @alone
    def unmerge(self) -> None:
        """Unmerge all adapters: bit-exact, unless the pristine weight was discarded.

        Without it the inverse rotation is applied to the merged weight and the result is requantized, which is lossy
        and raises a warning.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
            return
        base = self.get_base_layer()
        if self._pristine is not None:
            state = self._pristine.to(base.W_q.device)
        else:
            state = hqq_layer.requantize(base, self._estimate_pristine(action="Unmerging", stacklevel=4))
        with self._unchanged_on_error():
            state.install(base)
            self._pristine, self.merged_adapters, self.merge_error = None, [], None

    def drop_pristine(self) -> None:
        """Discard the pristine weight of a merged layer to free its memory; unmerging is then lossy."""
        self._pristine = None

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        before = self.merge_state()
        try:
            yield
        except BaseException:
            self.restore_merge_state(before)
            raise

    def merge_state(self) -> tuple[PackedState, PackedState | None, list[str], float | None]:
        """A snapshot of the state that a merge changes, for `restore_merge_state`; tensors are shared, not copied."""
        return PackedState.of(self.get_base_layer()), self._pristine, list(self.merged_adapters), self.merge_error

    @alone
    def restore_merge_state(self, state: tuple[PackedState, PackedState | None, list[str], float | None]) -> None:
        """Restore a snapshot that `merge_state` returned."""
        packed, self._pristine, self.merged_adapters, self.merge_error = state
        packed.install(self.get_base_layer())
