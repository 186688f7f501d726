"""`OFTLinear`: PEFT's OFT on a linear layer of any other kind, dense or quantized."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import functional
from ..ops.autocast import without_autocast
from ..ops.weight import require_whole
from . import fold
from .merge import MergeableLayer
from .snapshot import BaseState, MergeState

_DENSE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # a weight of 8 bits has a scale elsewhere


@dataclass(frozen=True)
class _DenseWeight:
    """The contents of a dense weight; the parameter stays the same."""

    data: Tensor

    def install(self, base: nn.Module) -> None:
        weight: Any = base.weight
        weight.data = self.data.to(weight.dtype)  # another dtype if the layer was cast while merged

    def to(self, device: torch.device | str) -> _DenseWeight:
        return _DenseWeight(self.data.to(device))


@dataclass(frozen=True)
class _QuantizedState:
    """The parameters of a quantized layer, and what bitsandbytes keeps on them and beside them; nothing is copied.

    Attributes:
        parameters: by name.
        attributes: those of each parameter.
        cache: the attributes of `Linear8bitLt.state`, which caches the weight; else empty.
    """

    parameters: dict[str, nn.Parameter | None]
    attributes: dict[str, dict[str, Any]]
    cache: dict[str, Any]

    @classmethod
    def of(cls, base: nn.Module) -> _QuantizedState:
        weight = base._parameters.get("weight")
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            # Inference on a CPU with AVX512-BF16 repacks the weight of bitsandbytes' 4 bits in place, which PEFT does
            # not expect. `state_dict` restores the original packing.
            base.state_dict()
        attributes = {name: dict(vars(p)) for name, p in base._parameters.items() if p is not None}
        return cls(dict(base._parameters), attributes, dict(vars(base.state)) if "state" in vars(base) else {})

    def install(self, base: nn.Module) -> None:
        base._parameters.update(self.parameters)
        for name, attributes in self.attributes.items():
            vars(self.parameters[name]).update(attributes)
        if self.cache:
            vars(base.state).update(self.cache)

    def to(self, device: torch.device | str) -> _QuantizedState:
        return self


class OFTLinear(MergeableLayer):
    """OFT on any linear layer that PEFT's OFT wraps: the input is rotated, then the layer computes its product.

    The layer may be dense, or quantized by bitsandbytes, GPTQ, AWQ, AQLM, EETQ, torchao or another package; it is only
    called. The rotation keeps `x` and its parameters for backward, nothing else. Parameters, state-dict keys and
    numerics are those of PEFT's layers, so adapters saved by either load in the other.

    Merging stores `W * R^T`: in a dense layer in the dtype of its weight, in a quantized one as PEFT's backend of that
    kind dequantizes and quantizes, if it has that (bitsandbytes and torchao, from PEFT 0.21 on). Unmerging restores the
    weight bit for bit, unless `keep_pristine` is `"none"`; a quantized weight is kept on its device. No forward may run
    in another thread meanwhile.

    Args:
        base_layer: the linear layer, or another tuner layer that wraps one; an HQQ layer needs `HqqOFTLinear`.

    The other arguments, and `keep_pristine`, are those of `HqqOFTLinear`.

    Raises:
        TypeError: `base_layer` is an HQQ layer, or has no `in_features`.
        ValueError: a setting is out of range.
    """

    @staticmethod
    def _check_base_layer(base: nn.Module) -> None:
        if isinstance(base, (HQQLinear, nn.Conv2d, nn.Embedding)):
            raise TypeError(
                f"OFTLinear needs a linear layer that is not an HQQLinear, got {type(base).__name__}; use HqqOFTLinear "
                "for HQQ layers, and PEFT's own OFT for convolutions and embeddings."
            )

    @property
    def _device(self) -> torch.device:
        base = self.get_base_layer()
        for name in ("weight", "qweight"):
            if isinstance(tensor := getattr(base, name, None), Tensor):
                return tensor.device
        return next(itertools.chain(base.parameters(), base.buffers()), torch.empty(0)).device

    @property
    def _compute_dtype(self) -> torch.dtype | None:
        base = self.get_base_layer()
        dtype = getattr(base, "compute_dtype", None) or getattr(getattr(base, "weight", None), "dtype", None)
        return dtype if dtype is not None and dtype.is_floating_point else None

    def _move_to_base_layer(self, module: OFTRotationModule, device: torch.device | None = None) -> None:
        super()._move_to_base_layer(module, device)
        if self._compute_dtype is not None:  # as in PEFT, whose models then cast adapters to float32
            module.to(self._compute_dtype)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Apply the base layer to the input rotated by each active adapter in turn.

        If adapters are disabled, merged, or none is active, this is just the base layer.

        Args:
            x: `[..., in_features]` of any float dtype, in which it is rotated, even under autocast.
            adapter_names: for inference, the adapter of each sample (`len(x)` names); `"__base__"` for no adapter.

        Returns:
            `[..., out_features]` in the dtype of `x`.

        Raises:
            TypeError: `x` is not floating point.
            ValueError: the last dimension of `x` is not `in_features`; `adapter_names` does not have the length
                of `x`, or is given while adapters are merged.
        """
        if adapter_names is not None:
            self._check_adapter_names(self._merge, x, adapter_names)
        if self._disable_adapters and self._merge.adapters:
            self.unmerge()
        dtype = x.dtype
        if not self._disable_adapters and not self._merge.adapters:
            with without_autocast(x.device), self._adapters_onloaded():
                if adapter_names is None:
                    x = self._rotate(x, self._active())
                else:
                    for d, index in self._mixed_rotations(x, adapter_names):
                        x = functional.rotate(x, d, adapter_index=index)
        y = self.base_layer(x, *args, **kwargs)
        return y if y.dtype is dtype else y.to(dtype)

    # --- Merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the weight.

        The merged layer equals the unmerged forward up to rounding, or to the base layer's quantization; the order of
        several adapters is that of `HqqOFTLinear.merge`. A merge that fails changes nothing.

        Args:
            safe_merge: check the merged weight for NaN and infinity before it is used.
            adapter_names: the adapters to merge, by default the active ones. Unknown names are ignored; already merged
                ones are skipped with a warning.

        Raises:
            TypeError: PEFT cannot write the weight of this kind of layer.
            ValueError: `safe_merge` found NaN or infinity (the message names the adapter); the layer wraps another
                tuner layer, which merging would bypass; the weight is sharded.
        """
        self._merge_adapters(
            adapter_names, lambda state, rotations: (self._fold_in(state, rotations, safe_merge), None)
        )

    def _state(self) -> BaseState:
        base = self.get_base_layer()
        weight = base._parameters.get("weight")
        plain = type(weight) is nn.Parameter or isinstance(weight, DTensor)
        if self._backend is None and plain and weight.dtype in _DENSE:
            return _DenseWeight(weight.data)
        return _QuantizedState.of(base)

    @property
    def _backend(self) -> Any:
        """How PEFT reads and writes the weight of a quantized layer; PEFT up to 0.20 has no such thing."""
        return getattr(self, "quantization_backend", None)

    def _fold_in(self, state: Any, rotations: fold.Rotations, check: bool) -> BaseState:
        if isinstance(state, _DenseWeight):
            require_whole("the weight", state.data)
            return _DenseWeight(self._rotated(state.data, rotations, check))
        base, backend, before = self.get_base_layer(), self._backend, self._state()
        if backend is None or not backend.supports_merge:
            raise TypeError(
                f"cannot merge OFT into a {type(base).__name__}: PEFT has no way to write its weight. PEFT 0.21 and "
                "later can for bitsandbytes and torchao; merge into the unquantized model instead."
            )
        try:
            state.install(base)
            rotated = self._rotated(backend.get_base_weight(base), rotations, check)
            backend.set_base_weight(self, rotated.contiguous())
            return self._state()
        finally:
            before.install(base)

    @staticmethod
    def _rotated(weight: Tensor, rotations: fold.Rotations, check: bool) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return fold.rotate_dense(wide, rotations, check).to(weight.dtype)

    def _publish(self, state: BaseState, merge: MergeState) -> None:
        state.install(self.get_base_layer())
        self._merge = merge
