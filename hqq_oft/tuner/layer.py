"""`HqqOFTLinear`: PEFT's OFT on an HQQ-quantized linear layer.

This module decides which adapters are applied and in which dtype. The computation is in `hqq_oft.functional`, merging
in `hqq_oft.tuner.merge`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from hqq.core.quantize import HQQLinear
from peft.tuners.oft.layer import MultiplicativeDropoutLayer, OFTLayer, OFTRotationModule
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .. import functional
from .._config import KeepPristine, keep_pristine_from_environment
from ..ops.autocast import without_autocast
from ..ops.reference import project
from ..ops.weight import QuantizedWeight, require_whole
from ..quant import hqq_layer
from ..quant.hqq_layer import PackedState
from . import rotation_batch as rotation_step
from .merge import MergeableLayer
from .rotation_cache import RotationCache
from .settings import AdapterSettings
from .state_lock import StateLock, alone


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
        keep_pristine: where a merge keeps the packed weight it replaces: `"device"`, `"host"`, or `"none"` to discard
            it and save memory; unmerging is bit-exact with it and lossy without. The default comes from the
            environment variable `HQQ_OFT_KEEP_PRISTINE`.
        merge_error: while merged, the relative quantization error of the merged weight, |W'_q - W'| / |W'|; else None.

    Raises:
        TypeError: `base_layer` is not an HQQ layer.
        ValueError: the HQQ layer is not initialised, or a setting is out of range.
    """

    fan_in_fan_out = False

    if TYPE_CHECKING:  # PEFT is not typed
        base_layer: Any
        in_features: int
        out_features: int
        oft_R: Any  # noqa: N815
        oft_dropout: Any
        oft_block_size: dict[str, int]
        r: dict[str, int]
        active_adapters: list[str]
        merged_adapters: list[str]
        merged: bool
        disable_adapters: bool

        get_base_layer: Callable[[], Any]
        set_adapter: Callable[..., None]
        reset_oft_parameters: Callable[[str, bool], None]
        adjust_oft_parameters: Callable[[int, int], int]

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
        config = config if config is not None else kwargs.pop("oft_config", None)
        self._init_around(base_layer, adapter_name, **kwargs)
        self.update_layer(
            adapter_name,
            r,
            oft_block_size=oft_block_size,
            module_dropout=module_dropout,
            init_weights=init_weights,
            coft=coft,
            eps=eps,
            block_share=block_share,
            use_cayley_neumann=use_cayley_neumann,
            num_cayley_neumann_terms=num_cayley_neumann_terms,
            config=config,
        )

    def _init_around(self, base_layer: nn.Module, active_adapter: str | list[str], **kwargs: Any) -> None:
        """The part of construction that depends only on the base layer; requires that `nn.Module.__init__` has run."""
        base = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        if not isinstance(base, HQQLinear):
            raise TypeError(
                f"HqqOFTLinear needs an hqq.core.quantize.HQQLinear, got {type(base).__name__}; use PEFT's own OFT "
                "layer for other linear layers."
            )
        QuantizedWeight.from_hqq(base)  # raises if the layer is empty or inconsistent
        OFTLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = active_adapter
        self._take_base_layer()

    def _take_base_layer(self) -> None:
        """Initialize missing per-layer state, and detach the tensors that HQQ leaves attached in the base layer."""
        if "_keep_pristine" not in vars(self):
            self.keep_pristine = keep_pristine_from_environment()
        self._pristine: PackedState | None = vars(self).get("_pristine")
        self.merge_error: float | None = vars(self).get("merge_error")
        self._rotations: RotationCache = vars(self).get("_rotations", RotationCache())
        self._lock: StateLock = vars(self).get("_lock", StateLock())
        hqq_layer.detach_tensors(self.get_base_layer())
        if _after_load not in self._load_state_dict_post_hooks.values():
            self.register_load_state_dict_post_hook(_after_load)

    @property
    def keep_pristine(self) -> KeepPristine:
        """Where a merge keeps the packed weight it replaces: `"device"`, `"host"` or `"none"`."""
        return self._keep_pristine

    @keep_pristine.setter
    def keep_pristine(self, where: KeepPristine) -> None:
        if where not in get_args(KeepPristine):
            raise ValueError(f"keep_pristine must be one of {get_args(KeepPristine)}, got {where!r}.")
        self._keep_pristine = where

    # --- Adapters ----------------------------------------------------------------------------------------------------

    @alone
    def update_layer(
        self,
        adapter_name: str,
        r: int,
        oft_block_size: int = 0,
        module_dropout: float = 0.0,
        coft: bool = False,
        eps: float = 6e-5,
        block_share: bool = False,
        init_weights: bool = True,
        use_cayley_neumann: bool = False,
        num_cayley_neumann_terms: int = 5,
        inference_mode: bool = False,
        *,
        config: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter, or replace the one of that name. Arguments as for the class; `config` overrides them.

        Raises:
            ValueError: a setting is out of range, or the adapter of that name is merged; the layer is unchanged.
        """
        config = config if config is not None else kwargs.get("oft_config")
        if not isinstance(oft_block_size, int):  # PEFT from 0.20 on: update_layer(name, r, config)
            config, oft_block_size = oft_block_size, 0
        if config is None:
            settings = AdapterSettings(
                r=r,
                oft_block_size=oft_block_size,
                module_dropout=module_dropout,
                init_weights=init_weights,
                coft=coft,
                eps=eps,
                block_share=block_share,
                use_cayley_neumann=use_cayley_neumann,
                num_cayley_neumann_terms=num_cayley_neumann_terms,
            )
        else:
            settings = AdapterSettings.from_config(config)
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Cannot replace the adapter {adapter_name!r} while it is merged. Unmerge it first.")
        r, oft_block_size = settings.blocks(self.in_features, self.adjust_oft_parameters)
        self._rotations.drop(adapter_name)

        dropout = MultiplicativeDropoutLayer(p=settings.module_dropout) if settings.module_dropout else nn.Identity()
        module = OFTRotationModule(
            1 if settings.block_share else r,
            oft_block_size * (oft_block_size - 1) // 2,
            oft_block_size,
            self.in_features,
            coft=settings.coft,
            eps=settings.eps,
            block_share=settings.block_share,
            use_cayley_neumann=settings.use_cayley_neumann,
            num_cayley_neumann_terms=settings.num_cayley_neumann_terms,
        )
        self.oft_R[adapter_name], self.oft_dropout[adapter_name] = module, dropout
        self.reset_oft_parameters(adapter_name, settings.init_weights)
        self.r[adapter_name] = r
        self.oft_block_size[adapter_name] = oft_block_size
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT looks for `weight` or `qweight`; an HQQ layer has neither, so PEFT would not move anything.
        weight = self.oft_R[adapter_name].weight
        device = device or self.get_base_layer().W_q.device
        if weight.device.type != "meta" and torch.device(device).type != "meta":
            self.oft_R[adapter_name].to(device)

    @alone
    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active, another one becomes active, as in PEFT.

        Raises:
            ValueError: the adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Unmerge them first.")
        self._rotations.drop(adapter_name)
        super().delete_adapter(adapter_name)

    def _cayley_arguments(self, adapter_name: str) -> dict[str, Any]:
        """The keyword arguments of `functional.cayley` and `oft_linear` that come from the adapter's settings."""
        module = self.oft_R[adapter_name]
        return {
            "block_size": module.block_size,
            "terms": module.num_cayley_neumann_terms if module.use_cayley_neumann else None,
            # bound of constrained OFT on each skew block's Frobenius norm
            "max_norm": module.eps / math.sqrt(module.weight.shape[0]) if module.coft else None,
        }

    def _begin_forward(self, adapter_name: str) -> tuple[Tensor, dict[str, Any]]:
        """The adapter's parameter and Cayley arguments for one forward; in training with projection and dropout."""
        module = self.oft_R[adapter_name]
        arguments = self._cayley_arguments(adapter_name)
        if self.training:
            if arguments["max_norm"] is not None and module.weight.requires_grad:
                self._project_parameter(module, arguments["max_norm"])
            arguments["keep"] = self._dropout_keep(adapter_name)
        return module.weight, arguments

    def _project_parameter(self, module: OFTRotationModule, max_norm: float) -> None:
        # Through `.data`, which does not bump the version counter: the projection is idempotent, so the graph of an
        # earlier forward that saved the parameter (gradient accumulation, checkpointing) stays valid.
        module.weight.data.copy_(project(module.weight.detach(), max_norm))

    def _dropout_keep(self, adapter_name: str) -> Tensor | None:
        """Bool `[B]` with floor(p * B) randomly chosen blocks False, or None if no block is dropped."""
        module, dropped = self.oft_R[adapter_name], self._dropped_blocks(adapter_name)
        if dropped == 0:
            return None
        blocks = self.in_features // module.block_size
        return torch.randperm(blocks, device=module.weight.device) >= dropped

    def _dropped_blocks(self, adapter_name: str) -> int:
        p = getattr(self.oft_dropout[adapter_name], "p", 0.0) if adapter_name in self.oft_dropout else 0.0
        blocks = self.in_features // self.oft_R[adapter_name].block_size
        return math.floor(p * blocks + 1e-6)  # 0.29 * 100 is slightly below 29 in floating point

    @torch.no_grad()
    def _rotation(self, adapter_name: str) -> Tensor:
        """The adapter's `D = R - I` for merging: float32, without dropout."""
        weight = self.oft_R[adapter_name].weight
        require_whole(f"the adapter {adapter_name!r}", weight)
        device = self.get_base_layer().W_q.device
        return functional.cayley(weight.to(device), dtype=torch.float32, **self._cayley_arguments(adapter_name))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense block-diagonal rotation `[K, K]` of an adapter, in the dtype and on the device of its parameter."""
        weight = self.oft_R[adapter].weight
        d = functional.cayley(weight, **self._cayley_arguments(adapter))
        blocks = d + torch.eye(d.shape[-1], dtype=d.dtype, device=d.device)
        blocks = blocks.expand(self.in_features // d.shape[-1], -1, -1)
        return torch.block_diag(*blocks).to(weight.dtype)

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
        if torch.compiler.is_compiling():
            return self._forward(x, *args, adapter_names=adapter_names, **kwargs)
        while True:
            with self._lock.reading():
                if not (self.disable_adapters and self.merged):
                    return self._forward(x, *args, adapter_names=adapter_names, **kwargs)
            self._unmerge_disabled()

    def _forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
        dtype, base = x.dtype, self.base_layer
        if not isinstance(base, HQQLinear):  # wrapped by another tuner's layer
            base = self.get_base_layer()
        x = x.to(base.compute_dtype)
        with without_autocast(x.device.type):
            if self.disable_adapters or self.merged:
                y = self.base_layer(x, *args, **kwargs)
            elif adapter_names is not None:
                y = self._forward_mixed(x, adapter_names, *args, **kwargs)
            else:
                y = self._forward_active(x, *args, **kwargs)
        return y.to(dtype)

    @alone
    def _unmerge_disabled(self) -> None:
        if self.disable_adapters and self.merged:  # check again: another thread may have unmerged
            self.unmerge()

    def _check_adapter_names(self, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _base_is_plain(self) -> bool:
        """Whether the base layer's forward is HQQ's own, without hooks, so that the fused product can replace it.

        The forward of another tuner layer, hooks, and a replaced forward (accelerate's offloading) must run.
        """
        base = self.base_layer
        return (
            isinstance(base, HQQLinear)
            and type(base).forward is HQQLinear.forward
            and "forward" not in vars(base)
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        )

    def _forward_active(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in dict.fromkeys(self.active_adapters) if name in self.oft_R]
        if not names:
            return self.base_layer(x, *args, **kwargs)
        fused = None if args or kwargs or not self._base_is_plain() else names.pop()
        for name in names:
            if self._keeps_rotation(name, x):
                x = functional.rotate(x, self._kept_rotation(name, x.dtype))
            else:
                v, arguments = self._begin_forward(name)
                x = functional.oft_rotate(x, v, d=self._shared_rotation(v), **arguments)
        if fused is None:
            return self.base_layer(x, *args, **kwargs)
        base = self.base_layer
        weight = QuantizedWeight.from_hqq(base)
        if self._keeps_rotation(fused, x):
            return functional.linear(x, weight, base.bias, d=self._kept_rotation(fused, x.dtype))
        v, arguments = self._begin_forward(fused)
        return functional.oft_linear(x, weight, base.bias, v=v, d=self._shared_rotation(v), **arguments)

    def _shared_rotation(self, v: Tensor) -> Tensor | None:
        """`D` of the parameter from the current shared step (`hqq_oft.share_rotations`), or None."""
        if not self.training or torch.compiler.is_compiling():
            return None
        step = rotation_step.current()
        return None if step is None else step.rotation(v)

    def _rotations_to_share(self) -> Iterator[rotation_step.Member]:
        """The active adapters whose `D`, in a training forward, depends only on their parameter."""
        if not self.training or self.disable_adapters or self.merged:
            return
        for name in dict.fromkeys(self.active_adapters):
            if name not in self.oft_R or self._dropped_blocks(name):
                continue
            v = self.oft_R[name].weight
            if rotation_step.can_share(v):
                dtype = self.get_base_layer().compute_dtype
                yield rotation_step.Member(v, self._cayley_arguments(name), dtype, partial(self._begin_forward, name))

    def _keeps_rotation(self, adapter_name: str, x: Tensor) -> bool:
        """Whether `D` can be cached: only in evaluation, when no gradient is recorded."""
        if self.training or torch.compiler.is_compiling():
            return False
        recorded = x.requires_grad or self.oft_R[adapter_name].weight.requires_grad
        return not (torch.is_grad_enabled() and recorded)

    def _kept_rotation(self, adapter_name: str, dtype: torch.dtype) -> Tensor:
        v, arguments = self._begin_forward(adapter_name)
        settings = (dtype, self.oft_R[adapter_name].block_share, *arguments.values())
        return self._rotations.get(adapter_name, v, settings, lambda: functional.cayley(v, dtype=dtype, **arguments))

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Apply one adapter per sample; unknown names get the base layer, as in PEFT's LoRA.

        Adapters of the same block size share a stacked `D`; each row of `x` belongs to at most one stack.
        """
        stacks: dict[int, list[str]] = {}
        for name in dict.fromkeys(adapter_names):
            if name in self.oft_R:
                stacks.setdefault(self.oft_R[name].block_size, []).append(name)
        rows = math.prod(x.shape[1:-1])
        steps = [
            (self._stacked_rotations(n, x), self._index(n, adapter_names, rows, x.device)) for n in stacks.values()
        ]
        fused = steps.pop() if steps and not (args or kwargs) and self._base_is_plain() else None
        for d, index in steps:
            x = functional.rotate(x, d, adapter_index=index)
        if fused is None:
            return self.base_layer(x, *args, **kwargs)
        d, index = fused
        base = self.base_layer
        return functional.linear(x, QuantizedWeight.from_hqq(base), base.bias, d=d, adapter_index=index)

    def _index(self, names: list[str], adapter_names: list[str], rows_per_sample: int, device: torch.device) -> Tensor:
        """Int64 `[M]`: for each row the index of its adapter in the stack of `names`, -1 for none."""

        def make() -> Tensor:
            index = torch.tensor([names.index(name) if name in names else -1 for name in adapter_names])
            return index.to(device).repeat_interleave(rows_per_sample)

        if torch.compiler.is_compiling():
            return make()
        kind = ("index", self.oft_R[names[0]].block_size)
        key = (kind, tuple(names), tuple(adapter_names), rows_per_sample, device)
        return self._rotations.derived(key, (), make)

    def _stacked_rotations(self, names: list[str], x: Tensor) -> Tensor:
        """`D` of several adapters of the same block size, `[A, B or 1, b, b]`, in the dtype of `x`."""
        rotations, kept = [], not torch.compiler.is_compiling()
        for name in names:
            if self._keeps_rotation(name, x):
                rotations.append(self._kept_rotation(name, x.dtype))
            else:
                kept = False
                v, arguments = self._begin_forward(name)
                rotations.append(functional.cayley(v, dtype=x.dtype, **arguments))

        def stack() -> Tensor:
            blocks = max(d.shape[0] for d in rotations)
            return torch.stack([d.expand(blocks, -1, -1) for d in rotations])

        if not kept:
            return stack()
        kind = ("stack", self.oft_R[names[0]].block_size)
        return self._rotations.derived((kind, tuple(names), x.dtype), tuple(rotations), stack)

    # --- nn.Module ---------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.merged and f"{prefix}base_layer.W_q" in state_dict:
            raise ValueError(
                f"Cannot load a base weight into a layer that {self.merged_adapters} are merged into: unmerging would "
                "restore the old one. Unmerge first."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HqqOFTLinear:
        """As in `nn.Module`, but the packed weight is moved without being cast.

        HQQ's `.to()` ignores its meta data and bias, and would cast a packed weight that is viewed as floats, which
        changes its bytes.
        """
        self._rotations.clear()
        base = self.get_base_layer()
        view = base.W_q.dtype
        if view.is_floating_point:
            base.W_q = nn.Parameter(base.W_q.detach().view(torch.uint8), requires_grad=False)
        try:
            super()._apply(fn, recurse)
        finally:
            if view.is_floating_point:
                base.W_q = nn.Parameter(base.W_q.detach().view(view), requires_grad=False)
        device = base.W_q.device
        if base.device is None or torch.device(base.device) != device:  # None: quantized on its linear layer's device
            base.meta = hqq_layer.move_meta(base.meta, device)
            if base.bias is not None and not isinstance(base.bias, nn.Parameter):
                base.bias = base.bias.to(device)
            base.device = str(device)
            if self._pristine is not None and self.keep_pristine == "device":
                self._pristine = self._pristine.to(device)
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
    hqq_layer.detach_tensors(layer.get_base_layer())
