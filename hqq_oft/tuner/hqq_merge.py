"""Merging adapters into a packed weight: the part of `HqqOFTLinear` that knows HQQ's storage.

The arithmetic is in `hqq_oft.quant.quantizer`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..quant import quantizer
from ..quant.bands import Bands
from ..quant.hqq_layer import PackedState
from ..quant.solver import Solver, check_solver
from . import fold
from .merge import MergeableLayer
from .snapshot import MergeState, Snapshot


class HqqMergeableLayer(MergeableLayer):
    """The part of `HqqOFTLinear` that merges.

    A change is published by one assignment, so forwards in other threads go on meanwhile with the state that they began
    with. A forward takes the lock only if the base layer's tensors were replaced, or if hooks or another module compute
    its product.
    """

    _snapshot: Snapshot | None

    def _state(self) -> PackedState:
        return PackedState.of(self.get_base_layer())

    def _record(self, merge: MergeState) -> None:
        # The next forward makes the snapshot: that of a sharded layer raises, and would hide a merge's own error.
        self._merge, self._snapshot = merge, None

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
        again = into is not None or solver not in ("hqq", self._merge.solver)

        def fold_in(state: PackedState, rotations: fold.Rotations) -> tuple[PackedState, float]:
            packed, error = self._requantized(state, rotations, safe_merge, into, solver)
            if safe_merge and not math.isfinite(error):
                names = [name for name, _ in rotations]
                raise ValueError(
                    f"NaN or infinity after quantizing the weight merged with {names}. Nothing was merged."
                )
            return packed, error

        self._merge_adapters(adapter_names, fold_in, again, solver)

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

    def _rotated_weight(self, order: list[str], check: bool) -> Tensor:
        """The pristine weight with the rotations of `order` folded in, `[N, K]` in float32."""
        pristine = self._merge.pristine if self.merged else self._state()
        state, rotations = self._start(order, pristine)
        return _bands(state, rotations, check).dense()

    def _requantized(
        self,
        state: PackedState,
        rotations: fold.Rotations,
        check: bool,
        into: float | None = None,
        solver: Solver = "hqq",
    ) -> tuple[PackedState, float]:
        self._current()  # so that forwards which begin meanwhile need no lock to find the state from before
        return quantizer.requantize(self.get_base_layer(), _bands(state, rotations, check), into, solver, state)

    def _fold_in(self, state: PackedState, rotations: fold.Rotations, check: bool) -> PackedState:
        return self._requantized(state, rotations, check)[0]


def _bands(state: PackedState, rotations: fold.Rotations, check: bool) -> Bands:
    return Bands(state.weight(), lambda band: fold.rotate_weight(band, rotations, check))
