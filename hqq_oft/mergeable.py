"""What a layer has merged: which adapters, into which weight, and the way back.

The arithmetic is in `hqq_oft.merging`.
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

from . import merging
from ._config import KeepPristine
from .merging import PackedState
from .state_lock import StateLock, alone
from .weight import QuantizedWeight


class MergeableLayer:
    """The part of `HqqOFTLinear` that merges and unmerges; a failed merge changes nothing."""

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
        """Fold adapters into the packed weight, which HQQ's quantizer makes anew from the pristine one.

        The merged layer equals the unmerged forward up to that quantization: where all merged adapters are active the
        input meets them in the order of `active_adapters`, else in the order in which they were merged, whether by one
        call or several. All other attributes of the HQQ layer stay. A merge that fails, for whatever reason, changes
        nothing.

        Args:
            safe_merge: check the merged weight for NaN and infinity before it is used.
            adapter_names: the adapters to merge, by default the active ones. Unknown ones are passed over, already
                merged ones with a warning.
            into: bits of the merged weight, by default those of the layer; unmerging goes back to the layer's own.

        Raises:
            ValueError: `safe_merge` found NaN or infinity, and names the adapter; or the layer wraps another tuner
                layer, which merging would bypass.
        """
        order = self._adapters_after_merge(adapter_names, again=into is not None)
        if not order or (into is None and set(order) == set(self.merged_adapters)):
            return
        base = self.base_layer
        pristine = self._pristine if self.merged else PackedState.of(base)
        dense = self._rotated_weight(order, check=safe_merge)
        merged = merging.requantize(base, dense, into)
        error = merging.relative_error(merged.weight(), dense)
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
                "`unmerge` is called: a merged layer uses its base weight alone.",
                stacklevel=3,
            )

    def merged_linear(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> tuple[nn.Linear, float] | None:
        """What `merge` would give as a dense layer, to which this layer's place can be given; nothing is changed.

        Args:
            safe_merge: as for `merge`.
            adapter_names: as for `merge`.

        Returns:
            A frozen layer in the compute dtype, and how far rounding to that moved the weight, relative to its norm;
            None if there is nothing to merge.

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
        return linear.train(base.training), merging.relative_distance(linear.weight, exact)

    def _adapters_after_merge(self, adapter_names: list[str] | None, again: bool = False) -> list[str]:
        """The adapters that are merged after `merge(adapter_names)`, in the order in which the input meets them.

        With `again`, merged adapters are to be merged anew into something else, and no warning says that they are.
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
            return merging.rotate_weight(pristine.to(base.W_q.device).weight(), rotations, check)
        dense = self._estimate_pristine(action="Merging more adapters", stacklevel=5)
        return merging.rotate_dense(dense, rotations, check)

    def _merge_order(self, names: list[str]) -> list[str]:
        active = self.active_adapters
        return sorted(names, key=active.index) if set(names) <= set(active) else names

    def _estimate_pristine(self, action: str, stacklevel: int) -> Tensor:
        """The dense pristine weight from the merged one and the inverse rotation, when the packed one was given up."""
        warnings.warn(
            f"{action} without the pristine weight, which was given up: the inverse rotation of the merged weight is "
            'quantized again, which loses precision. Set keep_pristine to "device" or "host" before merging to avoid '
            "this.",
            stacklevel=stacklevel,
        )
        rotations = [(name, self._rotation(name)) for name in self.merged_adapters]
        return merging.unrotate_weight(QuantizedWeight.from_hqq(self.get_base_layer()), rotations)

    def _kept(self, pristine: PackedState | None) -> PackedState | None:
        if pristine is None or self.keep_pristine == "none":
            return None
        return pristine.to("cpu") if self.keep_pristine == "host" else pristine

    @alone
    def unmerge(self) -> None:
        """Take all merged adapters out again: bit-exact, unless the pristine weight was given up.

        Without it the inverse rotation is applied to the merged weight and the result quantized, which is lossy and
        warned of.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
            return
        base = self.get_base_layer()
        if self._pristine is not None:
            state = self._pristine.to(base.W_q.device)
        else:
            state = merging.requantize(base, self._estimate_pristine(action="Unmerging", stacklevel=4))
        with self._unchanged_on_error():
            state.install(base)
            self._pristine, self.merged_adapters, self.merge_error = None, [], None

    def drop_pristine(self) -> None:
        """Give up the pristine weight of a merged layer to free its memory; unmerging is lossy from then on."""
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
        """What a merge changes, for `restore_merge_state`; tensors are shared, not copied."""
        return PackedState.of(self.get_base_layer()), self._pristine, list(self.merged_adapters), self.merge_error

    @alone
    def restore_merge_state(self, state: tuple[PackedState, PackedState | None, list[str], float | None]) -> None:
        """Go back to what `merge_state` returned."""
        packed, self._pristine, self.merged_adapters, self.merge_error = state
        packed.install(self.get_base_layer())
