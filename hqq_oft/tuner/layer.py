"""`HqqOFTLinear`: PEFT's OFT on an HQQ-quantized linear layer.

This module decides what a forward applies and in which dtype. Its adapters are in `hqq_oft.tuner.adapters`, merging is
in `hqq_oft.tuner.merge`, the computation in `hqq_oft.functional`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from hqq.core.quantize import HQQLinear
from peft.tuners.oft.layer import OFTLayer, OFTRotationModule
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import functional
from .._config import KeepPristine, keep_pristine_from_environment
from ..ops.autocast import without_autocast
from ..ops.weight import QuantizedWeight
from ..quant import hqq_layer
from .merge import MergeableLayer
from .rotation_cache import RotationCache
from .snapshot import MergeState, Snapshot


class HqqOFTLinear(MergeableLayer, nn.Module, OFTLayer):
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

    fan_in_fan_out = False

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int = 8,
        oft_block_size: int = 0,
        module_dropout: float = 0.0,
        init_weights: bool = True,
        coft: bool = False,
        eps: float = 6e-5,
        block_share: bool = False,
        use_cayley_neumann: bool = False,
        num_cayley_neumann_terms: int = 5,
        *,
        config: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        base = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        if not isinstance(base, HQQLinear):
            raise TypeError(
                f"HqqOFTLinear needs an hqq.core.quantize.HQQLinear, got {type(base).__name__}; use PEFT's own OFT "
                "layer for other linear layers."
            )
        QuantizedWeight.from_hqq(base)  # raises if the layer is empty or inconsistent
        config = config if config is not None else kwargs.pop("oft_config", None)
        OFTLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self._take_base_layer()
        self.update_layer(
            adapter_name,
            r,
            config,
            oft_block_size=oft_block_size,
            module_dropout=module_dropout,
            init_weights=init_weights,
            coft=coft,
            eps=eps,
            block_share=block_share,
            use_cayley_neumann=use_cayley_neumann,
            num_cayley_neumann_terms=num_cayley_neumann_terms,
        )

    def _take_base_layer(self) -> None:
        """Initialize missing per-layer state, and detach the tensors that HQQ leaves attached in the base layer."""
        state = vars(self)
        if "_keep_pristine" not in state:
            self.keep_pristine = keep_pristine_from_environment()
        self._merge: MergeState = state.get("_merge", MergeState())
        self._snapshot: Snapshot | None = None
        self._rotations: RotationCache = state.get("_rotations", RotationCache())
        self._lock = threading.RLock()
        hqq_layer.take_over(self.get_base_layer())
        if _after_load not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_after_load)

    def _release_base_layer(self) -> None:
        """Undo `_take_base_layer`, or the part of it that succeeded, before the layer becomes PEFT's own."""
        for name in ("_merge", "_snapshot", "_lock", "_rotations"):
            self.__dict__.pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_snapshot")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lock, self._snapshot = threading.RLock(), None

    @property
    def keep_pristine(self) -> KeepPristine:
        """Where a merge keeps the packed weight it replaces: `"device"`, `"cpu"` or `"none"`."""
        return self._keep_pristine

    @keep_pristine.setter
    def keep_pristine(self, where: KeepPristine) -> None:
        if where not in get_args(KeepPristine):
            raise ValueError(f"keep_pristine must be one of {get_args(KeepPristine)}, got {where!r}.")
        self._keep_pristine = where

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
        with self._lock:  # the other module reads the base layer itself, which must not change meanwhile
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
            self._check_adapter_names(snapshot, x, adapter_names)
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

    def _check_adapter_names(self, snapshot: Snapshot, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if snapshot.merge.adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _forward_active(self, snapshot: Snapshot, plain: bool, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Every active adapter's rotation in turn; the last is fused with the product if that is ours to compute."""
        steps = self._active()
        fused = steps.pop() if steps and plain and not (args or kwargs) else None
        for name, module in steps:
            if self._keeps_rotation(name, module, x):
                x = functional.rotate(x, self._kept_rotation(name, module, x.dtype))
            else:
                v, arguments = self._begin_forward(name, module)
                x = functional.oft_rotate(x, v, d=self._shared_rotation(v), **arguments)
        if fused is None:
            return snapshot.product(x, *args, **kwargs)
        name, module = fused
        if self._keeps_rotation(name, module, x):
            d = self._kept_rotation(name, module, x.dtype)
            return functional.linear(x, snapshot.weight, snapshot.bias, d=d)
        v, arguments = self._begin_forward(name, module)
        shared = self._shared_rotation(v)
        return functional.oft_linear(x, snapshot.weight, snapshot.bias, v=v, d=shared, **arguments)

    def _forward_mixed(
        self, snapshot: Snapshot, plain: bool, x: Tensor, adapter_names: list[str], args: Any, kwargs: Any
    ) -> Tensor:
        """One adapter per sample; a name this layer does not have gets the base layer, as in PEFT's LoRA.

        Adapters of one block size share a stacked `D`; each row of `x` is in at most one stack.
        """
        modules = dict(self.oft_R._modules)
        stacks: dict[int, dict[str, OFTRotationModule]] = {}
        for name in dict.fromkeys(adapter_names):
            if name in modules:
                stacks.setdefault(modules[name].block_size, {})[name] = modules[name]
        rows = math.prod(x.shape[1:-1])
        steps = [
            (self._stacked_rotations(stack, x), self._index(list(stack), size, adapter_names, rows, x.device))
            for size, stack in stacks.items()
        ]
        fused = steps.pop() if steps and plain and not (args or kwargs) else None
        for d, index in steps:
            x = functional.rotate(x, d, adapter_index=index)
        if fused is None:
            return snapshot.product(x, *args, **kwargs)
        d, index = fused
        return functional.linear(x, snapshot.weight, snapshot.bias, d=d, adapter_index=index)

    # --- nn.Module ---------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.merged and f"{prefix}base_layer.W_q" in state_dict:
            raise ValueError(
                f"Cannot load a base weight into a layer that {self.merged_adapters} are merged into: unmerging would "
                "restore the old one. Unmerge first."
            )
        with self._lock:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HqqOFTLinear:
        """As in `nn.Module`; the packed weight keeps its bytes, and so does the pristine one."""
        with self._lock:
            self._rotations.clear()
            self._snapshot = None
            super()._apply(fn, recurse)
            base, pristine = self.get_base_layer(), self._merge.pristine
            if pristine is not None:
                device = base.W_q.device if self.keep_pristine == "device" else pristine.packed.device
                self._merge = replace(self._merge, pristine=pristine.to(device, base.compute_dtype))
        return self

    def train(self, mode: bool = True) -> HqqOFTLinear:
        """As in `nn.Module`; also clears the rotation cache, unless it is frozen."""
        if mode or not self._rotations.frozen:
            self._rotations.clear()
        return super().train(mode)

    @property
    def rotations_frozen(self) -> bool:
        """Whether cached rotations keep their addresses; see `hqq_oft.frozen_rotations`."""
        return self._rotations.frozen

    @rotations_frozen.setter
    def rotations_frozen(self, frozen: bool) -> None:
        self._rotations.frozen = frozen

    def clear_rotations(self) -> None:
        """Clear the rotation cache of evaluation; only needed after a parameter was changed through `.data`."""
        self._rotations.clear()

    def requires_grad_(self, requires_grad: bool = True) -> HqqOFTLinear:
        """As in `nn.Module`, except for the packed weight, which cannot have a gradient."""
        packed = self.get_base_layer().W_q
        for parameter in self.parameters():
            if parameter is not packed:
                parameter.requires_grad_(requires_grad)
        return self

    def __repr__(self) -> str:
        return "oft." + super().__repr__()


def _after_load(layer: HqqOFTLinear, incompatible_keys: Any) -> None:
    hqq_layer.take_over(layer.get_base_layer())
