"""`HqqOFTLinear`: PEFT's OFT on an HQQ-quantized linear layer.

This module decides what a forward applies and in which dtype. What it shares with `OFTLinear` is in
`hqq_oft.tuner.{adapters,rotated,merge}`, merging into packed weights in `hqq_oft.tuner.hqq_merge`, the computation in
`hqq_oft.functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hqq.core.quantize import HQQLinear
from torch import Tensor, nn

from .. import functional
from ..ops.autocast import without_autocast
from ..ops.weight import QuantizedWeight
from ..quant import hqq_layer
from .hqq_merge import HqqMergeableLayer
from .snapshot import Snapshot


class HqqOFTLinear(HqqMergeableLayer):
    """OFT on an `HQQLinear`: `y = x * blockdiag(R) * W^T + bias` with `W` packed.

    Parameters, state-dict keys (`oft_R.<adapter>.weight`, `[blocks, b(b-1)/2]`) and numerics are those of PEFT's
    `oft.layer.Linear`, so adapters saved by either load in the other.

    Args:
        base_layer: an initialised `HQQLinear`, or another tuner layer that wraps one.
        adapter_name: name of the first adapter, which becomes active.
        r: number of blocks per layer; set either this or `oft_block_size`, and the other to 0.
        oft_block_size: block size b. A value that does not divide `in_features` is adjusted as in PEFT, with its
            warning; so is `r`.
        module_dropout: in training, the fraction of blocks that each forward replaces with the identity.
        init_weights: True initializes to the identity, False to random skew parameters (standard deviation 0.1).
        coft: constrained OFT: each skew block's Frobenius norm is kept at or below `eps / sqrt(stored blocks)`.
        eps: see `coft`.
        block_share: share one block across all positions.
        use_cayley_neumann: use the Cayley-Neumann series instead of the exact Cayley map.
        num_cayley_neumann_terms: number of series terms.
        config: a `peft.OFTConfig`; if given, it overrides all settings above.

    Attributes:
        keep_pristine: where a merge keeps the packed weight it replaces: `"device"`, `"cpu"`, or `"none"` to discard
            it and save memory; unmerging is bit-exact with it and lossy without. The default comes from the
            environment variable `HQQ_OFT_KEEP_PRISTINE`.
        merge_error: while merged, the relative quantization error of the merged weight, |W'_q - W'| / |W'|; else None.

    Raises:
        TypeError: `base_layer` is not an HQQ layer.
        ValueError: the HQQ layer is not initialised, or a setting is out of range.
    """

    @staticmethod
    def _check_base_layer(base: nn.Module) -> None:
        if not isinstance(base, HQQLinear):
            raise TypeError(
                f"HqqOFTLinear needs an hqq.core.quantize.HQQLinear, got {type(base).__name__}; use OFTLinear for "
                "other linear layers."
            )
        QuantizedWeight.from_hqq(base)  # raises if the layer is empty or inconsistent

    @property
    def _device(self) -> torch.device:
        return self.get_base_layer().W_q.device

    @property
    def _compute_dtype(self) -> torch.dtype:
        return self.get_base_layer().compute_dtype

    def _take_base_layer(self) -> None:
        """Initialize missing per-layer state, and detach the tensors that HQQ leaves attached in the base layer."""
        super()._take_base_layer()
        self._snapshot = None
        hqq_layer.take_over(self.get_base_layer())
        if _after_load not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_after_load)

    def _release_base_layer(self) -> None:
        super()._release_base_layer()
        self.__dict__.pop("_snapshot", None)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_snapshot": None}

    # --- Forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """Apply the base layer to the input rotated by each active adapter in turn.

        If adapters are disabled, merged, or none is active, this is just the base layer.

        Args:
            x: `[..., in_features]` of any float dtype; computed in the HQQ layer's compute dtype, even under autocast.
            adapter_names: for inference, the adapter of each sample (`len(x)` names); `"__base__"` for no adapter.

        Returns:
            `[..., out_features]` in the dtype of `x`.

        Raises:
            TypeError: `x` is not floating point.
            ValueError: the last dimension of `x` is not `in_features`; `adapter_names` does not have the length
                of `x`, or is given while adapters are merged.
        """
        if not x.is_floating_point():
            raise TypeError(f"the input must be a floating point tensor, got {x.dtype}; cast it first.")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"the input must have shape [..., {self.in_features}], got {tuple(x.shape)}.")
        outer: Any = self._modules["base_layer"]
        plain = self._is_plain(outer)
        if plain or torch.compiler.is_compiling():
            return self._forward(plain, x, adapter_names, args, kwargs)
        # The other module reads the base layer itself, which must not change meanwhile.
        with self._lock, self._adapters_onloaded():
            return self._forward(plain, x, adapter_names, args, kwargs)

    @staticmethod
    def _is_plain(base: nn.Module) -> bool:
        """Whether the base layer computes exactly HQQ's product, so that ours can replace it.

        Another tuner layer, hooks, or a replaced forward (accelerate's offloading) must run.
        """
        state = vars(base)
        return (
            isinstance(base, HQQLinear)
            and type(base).forward in (HQQLinear.forward, hqq_layer.HQQLinear.forward)
            and "forward" not in state
            and not (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
            )
        )

    def _forward(self, plain: bool, x: Tensor, adapter_names: list[str] | None, args: Any, kwargs: Any) -> Tensor:
        snapshot = self._current(plain)
        if adapter_names is not None:
            self._check_adapter_names(snapshot.merge, x, adapter_names)
        if self._disable_adapters and snapshot.merge.adapters:
            with self._lock:
                if self.merged:  # still: another thread may have been first
                    self.unmerge()
                snapshot = self._current(plain)
        dtype = x.dtype
        if dtype is not snapshot.dtype:
            x = x.to(snapshot.dtype)
        with without_autocast(x.device):
            if self._disable_adapters or snapshot.merge.adapters:
                y = snapshot.product(x, *args, **kwargs)
            elif adapter_names is None:
                y = self._forward_active(snapshot, plain, x, args, kwargs)
            else:
                y = self._forward_mixed(snapshot, plain, x, adapter_names, args, kwargs)
        return y if y.dtype is dtype else y.to(dtype)

    def _forward_active(self, snapshot: Snapshot, plain: bool, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Every active adapter's rotation in turn; the last is fused with the product if that is ours to compute."""
        steps = self._active()
        fused = steps.pop() if steps and plain and not (args or kwargs) else None
        if steps:
            x = self._rotate(x, steps)
        if fused is None:
            return snapshot.product(x, *args, **kwargs)
        name, module = fused
        if self._keeps_rotation(name, module, x):
            d = self._kept_rotation(name, module, x.dtype)
            return functional.linear(x, snapshot.weight, snapshot.bias, d=d)
        v, arguments = self._begin_forward(name, module)
        shared = self._shared_rotation(v, x.dtype)
        return functional.oft_linear(x, snapshot.weight, snapshot.bias, v=v, d=shared, **arguments)

    def _forward_mixed(
        self, snapshot: Snapshot, plain: bool, x: Tensor, adapter_names: list[str], args: Any, kwargs: Any
    ) -> Tensor:
        """One adapter per sample."""
        steps = self._mixed_rotations(x, adapter_names)
        fused = steps.pop() if steps and plain and not (args or kwargs) else None
        for d, index in steps:
            x = functional.rotate(x, d, adapter_index=index)
        if fused is None:
            return snapshot.product(x, *args, **kwargs)
        d, index = fused
        return functional.linear(x, snapshot.weight, snapshot.bias, d=d, adapter_index=index)

    # --- nn.Module ---------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HqqOFTLinear:
        """As in `nn.Module`; the packed weight keeps its bytes, and so does the pristine one."""
        with self._lock:
            self._rotations.clear()
            self._snapshot = None
            super()._apply(fn, recurse)
            base, pristine = self.get_base_layer(), self._merge.pristine
            if isinstance(pristine, hqq_layer.PackedState):
                device = base.W_q.device if self.keep_pristine == "device" else pristine.packed.device
                self._merge = replace(self._merge, pristine=pristine.to(device, base.compute_dtype))
        return self

    def requires_grad_(self, requires_grad: bool = True) -> HqqOFTLinear:
        """As in `nn.Module`, except for the packed weight, which cannot have a gradient."""
        packed = self.get_base_layer().W_q
        for parameter in self.parameters():
            if parameter is not packed:
                parameter.requires_grad_(requires_grad)
        return self


def _after_load(layer: HqqOFTLinear, incompatible_keys: Any) -> None:
    hqq_layer.take_over(layer.get_base_layer())
