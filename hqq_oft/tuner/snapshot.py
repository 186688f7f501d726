"""What one forward of a layer computes with, as one immutable value, so that a forward needs no lock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from hqq.core.quantize import HQQLinear
from torch import Tensor, nn

from ..ops.weight import QuantizedWeight
from ..quant.solver import Solver


class BaseState(Protocol):
    """What a merge changes of a base layer: its weight and all that belongs to it. Never modified in place."""

    def install(self, base: Any) -> None:
        """Set this state on `base`; all its other attributes are kept."""

    def to(self, device: torch.device | str) -> Any:
        """The same state on `device`."""


@dataclass(frozen=True)
class MergeState:
    """What a layer has merged.

    Attributes:
        adapters: names of the merged adapters, in the order in which their rotations are applied.
        pristine: the weight from before the merge, or None where it was discarded.
        error: relative quantization error of the merged weight; None while nothing is merged.
        solver: that quantized the merged weight.
    """

    adapters: tuple[str, ...] = ()
    pristine: BaseState | None = None
    error: float | None = None
    solver: Solver = "hqq"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The base layer's tensors and the merge state that belong together. Copies and pickles of it are None.

    Attributes:
        merge: the merge state.
        weight: the base layer's packed weight.
        bias: its bias.
        dtype: its compute dtype.
        product: computes HQQ's own product with this state, even if the base layer changes meanwhile.
        outer: the layer's `base_layer`.
        base: the HQQ layer: `outer`, or what it wraps.
        meta: its meta data.
        addresses: of the packed weight, its scale and zero, which assigning `.data` changes.
    """

    merge: MergeState
    weight: QuantizedWeight
    bias: Tensor | None
    dtype: torch.dtype
    product: nn.Module
    outer: nn.Module
    base: HQQLinear
    meta: dict[str, Any]
    addresses: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @classmethod
    def of(cls, outer: nn.Module, base: HQQLinear, merge: MergeState, plain: bool = True) -> Snapshot:
        """Of the state as it is: no other thread may be changing it. An empty or sharded base layer is a ValueError.

        If `plain` is False, `outer` computes the product; its hooks may yet gather the weight, which is None then.
        """
        if not plain:
            return cls(merge, None, base.bias, base.compute_dtype, outer, outer, base, base.meta, ())  # type: ignore[arg-type]
        weight, product = QuantizedWeight.from_hqq(base), base
        addresses: tuple[int, ...] = ()
        if not torch.compiler.is_compiling():  # a graph is compiled for one state
            product, addresses = object.__new__(type(base)), _addresses(base.W_q, base.meta)
            vars(product).update(vars(base), _parameters=dict(base._parameters), meta=dict(base.meta))
        return cls(merge, weight, base.bias, base.compute_dtype, product, outer, base, base.meta, addresses)

    def is_current(self, outer: nn.Module, merge: MergeState) -> bool:
        """Whether the layer's state is still the one that this was made from, by the identity of its parts."""
        now, then = vars(self.base), vars(self.product)
        meta, parameters = now["meta"], now["_parameters"]
        kept, packed = then["_parameters"], parameters.get("W_q", now.get("W_q"))
        return (
            outer is self.outer
            and merge is self.merge
            and meta is self.meta
            and packed is kept.get("W_q", then.get("W_q"))
            and _addresses(packed, meta) == self.addresses
            and parameters.get("bias") is kept.get("bias")
            and now.get("bias") is then.get("bias")
            and now["compute_dtype"] is self.dtype
        )


def _addresses(packed: Tensor, meta: dict[str, Any]) -> tuple[int, ...]:
    parts = (packed, meta.get("scale"), meta.get("zero"))
    return tuple([0 if part is None else part.data_ptr() for part in parts])
