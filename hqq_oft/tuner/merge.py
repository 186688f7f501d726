"""Merging adapters into a layer's packed weight, and unmerging them.

The arithmetic is in `hqq_oft.quant.quantizer`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings

import torch
from hqq.core.quantize import HQQLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..ops.weight import QuantizedWeight
from ..quant import quantizer
from ..quant.bands import Bands
from ..quant.hqq_layer import PackedState
from ..quant.solver import Solver, check_solver
from . import fold
from .adapters import AdaptedLayer
from .snapshot import MergeState, Snapshot


class MergeableLayer(AdaptedLayer):
    """The part of `HqqOFTLinear` that merges and unmerges; a failed merge changes nothing.

    A change is computed aside and published by one assignment, so forwards in other threads go on meanwhile with the
    state that they began with. Writers exclude each other by a lock, which a forward takes only if the base layer's
    tensors were replaced, or if hooks or another module compute its product.
    """

    _snapshot: Snapshot | None

    @property
    def merge_error(self) -> float | None:
        """While merged, the relative quantization error of the merged weight, |W'_q - W'| / |W'|; else None."""
        return self._merge.error

    def _current(self, plain: bool = True) -> Snapshot:
        """The state to compute with; made again if the base layer's tensors are no longer those it was made from."""
        if not plain or torch.compiler.is_compiling():
            return Snapshot.of(self.base_layer, self.get_base_layer(), self._merge, plain)
        snapshot, outer = self._snapshot, self._modules["base_layer"]
        if snapshot is None or not snapshot.is_current(outer, self._merge):
            # Another thread may be publishing; and inside a transform of torch.func, views would be its wrappers.
            with self._lock, torch._C._DisableFuncTorch():
                snapshot, outer = self._snapshot, self._modules["base_layer"]
                if snapshot is None or not snapshot.is_current(outer, self._merge):
                    snapshot = self._snapshot = Snapshot.of(outer, self.get_base_layer(), self._merge)
        return snapshot

    def _publish(self, packed: PackedState, merge: MergeState) -> None:
        """Make the layer compute with this state; if that fails, with the one from before. The lock is held."""
        base, before, merge_before = self.get_base_layer(), PackedState.of(self.get_base_layer()), self._merge
        try:
            packed.install(base)
            self._merge = merge
            self._snapshot = Snapshot.of(self.base_layer, base, merge)
        except BaseException:
            before.install(base)
            self._merge, self._snapshot = merge_before, None
            raise

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        into: fold.MergeInto = None,
        solver: Solver = "hqq",
    ) -> None:
        """Fold adapters into the pristine weight and requantize it.

        The merged layer equals the unmerged forward up to that quantization. If all merged adapters are active, their
        rotations are applied in the order of `active_adapters`, else in the order in which they were merged, whether by
        one call or several. All other attributes of the HQQ layer are kept. A merge that fails changes nothing.

        Args:
            safe_merge: check the merged weight for NaN and infinity before it is used.
            adapter_names: the adapters to merge, by default the active ones. Unknown names are ignored; already merged
                ones are skipped with a warning.
            into: bits of the merged weight, by default those of the layer; unmerging restores the layer's own.
            solver: `"hqq"` quantizes as HQQ does, `"search"` with a smaller error, as in `quantize_model`. What `"hqq"`
                merged is merged again by `"search"`, and not the other way round.

        Raises:
            ValueError: `safe_merge` found NaN or infinity (the message names the adapter); the layer wraps another
                tuner layer, which merging would bypass; `into` is no number of bits; `solver` is unknown, or is
                `"search"` and the layer has settings that it does not serve.
        """
        check_solver(solver)
        if into == "dense":
            raise ValueError(
                "a layer cannot become dense in place; `merged_linear()` returns the dense layer, and the model's "
                '`merge_and_unload(into="dense")` replaces every layer.'
            )
        fold.check_into(into)
        with self._lock:
            again = into is not None or solver not in ("hqq", self._merge.solver)
            order = self._adapters_after_merge(adapter_names, again)
            if not order or (not again and set(order) == set(self.merged_adapters)):
                return
            base = self.base_layer
            pristine = self._merge.pristine if self.merged else PackedState.of(base)
            bands = self._rotated_bands(order, check=safe_merge)
            packed, error = quantizer.requantize(base, bands, into, solver, pristine)
            if safe_merge and not math.isfinite(error):
                raise ValueError(
                    f"NaN or infinity after quantizing the weight merged with {order}. Nothing was merged."
                )
            if pristine is not None and self.keep_pristine != "device":
                pristine = pristine.to("cpu") if self.keep_pristine == "cpu" else None
            self._publish(packed, MergeState(tuple(order), pristine, error, solver))
        left_out = [name for name in self.active_adapters if name in self.oft_R and name not in order]
        if left_out:
            warnings.warn(
                f"Merged {order}; the active adapter(s) {left_out} are not merged and have no effect until "
                "`unmerge` is called: a merged layer uses only its base weight.",
                stacklevel=2,
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
        with self._lock:
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
        return self._rotated_bands(order, check).dense()

    def _rotated_bands(self, order: list[str], check: bool) -> Bands:
        """As `_rotated_weight`, band by band."""
        rotations = [(name, self._rotation(name)) for name in order]
        self._current()  # so that forwards which begin during the merge need no lock to find the state from before
        base = self.base_layer
        pristine = self._merge.pristine if self.merged else PackedState.of(base)
        if pristine is not None:
            weight = pristine.to(base.W_q.device).weight()
        else:
            weight, inverse = self._estimated_pristine(action="Merging more adapters", stacklevel=4)
            rotations += inverse
        return Bands(weight, lambda band: fold.rotate_weight(band, rotations, check))

    def _merge_order(self, names: list[str]) -> list[str]:
        active = self.active_adapters
        return sorted(names, key=active.index) if set(names) <= set(active) else names

    def _estimated_pristine(self, action: str, stacklevel: int) -> tuple[QuantizedWeight, fold.Rotations]:
        """The merged weight and the rotations that approximately undo the merge, if the pristine one was discarded."""
        warnings.warn(
            f"{action} without the pristine weight, which was discarded: the inverse rotation of the merged weight is "
            'quantized again, which loses precision. Set keep_pristine to "device" or "cpu" before merging to avoid '
            "this.",
            stacklevel=stacklevel,
        )
        rotations = [(name, self._rotation(name)) for name in self.merged_adapters]
        return QuantizedWeight.from_hqq(self.get_base_layer()), fold.inverse(rotations)

    def unmerge(self) -> None:
        """Unmerge all adapters: bit-exact, unless the pristine weight was discarded.

        Without it the inverse rotation is applied to the merged weight and the result is requantized, which is lossy
        and raises a warning.
        """
        with self._lock:
            if not self.merged:
                warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
                return
            base, pristine = self.get_base_layer(), self._merge.pristine
            if pristine is not None:
                packed = pristine.to(base.W_q.device)
            else:
                self._current()  # as for a merge
                weight, inverse = self._estimated_pristine(action="Unmerging", stacklevel=3)
                bands = Bands(weight, lambda band: fold.rotate_weight(band, inverse, check=False))
                packed, _ = quantizer.requantize(base, bands)
            self._publish(packed, MergeState())

    def drop_pristine(self) -> None:
        """Discard the pristine weight of a merged layer to free its memory; unmerging is then lossy."""
        with self._lock:
            self._merge, self._snapshot = dataclasses.replace(self._merge, pristine=None), None

    def merge_state(self) -> tuple[PackedState, MergeState]:
        """What a merge changes, for `restore_merge_state`; tensors are shared, not copied."""
        with self._lock:
            return PackedState.of(self.get_base_layer()), self._merge

    def restore_merge_state(self, state: tuple[PackedState, MergeState]) -> None:
        """Restore what `merge_state` returned."""
        with self._lock:
            state[0].install(self.get_base_layer())
            # The next forward makes the snapshot: that of a sharded layer raises, and would hide the merge's own error.
            self._merge, self._snapshot = state[1], None
