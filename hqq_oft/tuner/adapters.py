"""The adapters of a layer: adding and deleting them, and what a forward takes from each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from peft.tuners.oft.layer import MultiplicativeDropoutLayer, OFTRotationModule
from torch import Tensor, nn

from .. import functional
from ..ops import table as ops
from ..ops.weight import require_whole
from . import rotation_batch
from .settings import AdapterSettings
from .snapshot import MergeState

# The index of a batch that mixes adapters, by what it is made of, while any layer caches it: one for all layers.
_indices: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()


class AdaptedLayer:
    """The part of `HqqOFTLinear` that has adapters."""

    if TYPE_CHECKING:  # what PEFT's layer and `nn.Module` have

        def __getattr__(self, name: str) -> Any: ...

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the merged adapters, in the order in which their rotations are applied."""
        return list(self._merge.adapters)

    @merged_adapters.setter
    def merged_adapters(self, names: list[str]) -> None:
        self._merge = MergeState(tuple(names))  # of PEFT's constructor: none

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self._merge.adapters)

    def update_layer(
        self, adapter_name: str, r: int = 8, config: Any = None, inference_mode: bool = False, **settings: Any
    ) -> None:
        """Add an adapter, or replace the one of that name.

        Args:
            adapter_name: its name.
            r: number of blocks; with `oft_block_size` give 0.
            config: a `peft.OFTConfig`; if given, it overrides all settings.
            inference_mode: freeze the parameter.
            **settings: the other settings of the class, by name.

        Raises:
            TypeError: `config` is not an `OFTConfig`, or a setting is unknown.
            ValueError: a setting is out of range, or the adapter of that name is merged; the layer is unchanged.
        """
        config = config if config is not None else settings.pop("oft_config", None)
        chosen = AdapterSettings(r=r, **settings) if config is None else AdapterSettings.from_config(config)
        with self._lock:
            if adapter_name in self.merged_adapters:
                raise ValueError(f"Cannot replace the adapter {adapter_name!r} while it is merged. Unmerge it first.")
            r, block_size = chosen.blocks(self.in_features, self.adjust_oft_parameters)
            self._rotations.drop(adapter_name)
            dropout = MultiplicativeDropoutLayer(p=chosen.module_dropout) if chosen.module_dropout else nn.Identity()
            stored, elements = 1 if chosen.block_share else r, block_size * (block_size - 1) // 2
            names = ("coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
            options = {name: getattr(chosen, name) for name in names}
            module = OFTRotationModule(stored, elements, block_size, self.in_features, **options)
            nn.init.zeros_(module.weight) if chosen.init_weights else nn.init.normal_(module.weight, std=0.1)
            self._move_to_base_layer(module)
            # complete, as a forward in another thread may find it at once
            self.oft_dropout[adapter_name], self.oft_R[adapter_name] = dropout, module
            self.r[adapter_name], self.oft_block_size[adapter_name] = r, block_size
            self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT looks for `weight` or `qweight`, which an HQQ layer does not have, and moves nothing then.
        self._move_to_base_layer(self.oft_R[adapter_name], device)

    def _move_to_base_layer(self, module: OFTRotationModule, device: torch.device | None = None) -> None:
        device = device or self.get_base_layer().W_q.device
        if module.weight.device.type != "meta" and torch.device(device).type != "meta":
            module.to(device)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it was active another becomes so, as in PEFT.

        Raises:
            ValueError: the adapter is merged.
        """
        with self._lock:
            if adapter_name in self.merged_adapters:
                raise ValueError(
                    f"Cannot delete adapter(s) ['{adapter_name}'] while they are merged. Unmerge them first."
                )
            self._rotations.drop(adapter_name)
            left = [name for name in self._all_available_adapter_names() if name != adapter_name]
            active = [name for name in self.active_adapters if name != adapter_name]
            if adapter_name in self.active_adapters and left:  # before it goes: a forward meanwhile has an adapter
                if not active:
                    warnings.warn(
                        f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.",
                        stacklevel=2,
                    )
                self.set_adapter(active or left[0])
            super().delete_adapter(adapter_name)  # type: ignore[misc]

    @staticmethod
    def _cayley_arguments(module: OFTRotationModule) -> dict[str, Any]:
        """The keyword arguments of `functional.cayley` and `oft_linear` that come from the adapter's settings."""
        return {
            "block_size": module.block_size,
            "terms": module.num_cayley_neumann_terms if module.use_cayley_neumann else None,
            # constrained OFT's bound on each skew block's Frobenius norm
            "max_norm": module.eps / math.sqrt(module.weight.shape[0]) if module.coft else None,
        }

    def _begin_forward(self, name: str, module: OFTRotationModule) -> tuple[Tensor, dict[str, Any]]:
        """An adapter's parameter and Cayley arguments for one forward; in training with projection and dropout."""
        v, arguments = module.weight, self._cayley_arguments(module)
        if self.training:
            if arguments["max_norm"] is not None and v.requires_grad:
                # Through `.data`: projecting twice changes nothing, so the graph of an earlier forward that holds the
                # parameter (accumulation, checkpointing) stays valid, and autograd need not know.
                ops.project_(v.data, arguments["max_norm"])
            arguments["keep"] = self._dropout_keep(name, module)
        return v, arguments

    def _dropout_keep(self, name: str, module: OFTRotationModule) -> Tensor | None:
        """Bool `[B]` with floor(p * B) randomly chosen blocks False, or None if nothing is dropped."""
        dropped = self._dropped_blocks(name, module)
        if dropped == 0:
            return None
        return torch.randperm(self.in_features // module.block_size, device=module.weight.device) >= dropped

    def _dropped_blocks(self, name: str, module: OFTRotationModule) -> int:
        p = getattr(self.oft_dropout._modules.get(name), "p", 0.0)
        return math.floor(p * (self.in_features // module.block_size) + 1e-6)  # 0.29 * 100 is below 29

    def _active(self) -> list[tuple[str, OFTRotationModule]]:
        """The active adapters that this layer has, each once, in order."""
        modules, active = self._modules["oft_R"]._modules, self._active_adapter
        names = (active,) if isinstance(active, str) else dict.fromkeys(active)
        found = [(name, modules.get(name)) for name in names]  # another thread may be deleting one
        return [(name, module) for name, module in found if module is not None]

    @contextmanager
    def _adapters_onloaded(self) -> Iterator[None]:
        """Load the parameters that accelerate offloads, which it does itself only for forwards of their module."""
        adapters = list(self._modules["oft_R"]._modules.values())
        hooks: list[tuple[OFTRotationModule, Any]] = [
            (module, getattr(module, "_hf_hook", None)) for module in adapters
        ]
        offloaded = [(module, hook) for module, hook in hooks if getattr(hook, "offload", False)]
        try:
            for module, hook in offloaded:
                hook.pre_forward(module)
            yield
        finally:
            for module, hook in offloaded:
                hook.post_forward(module, None)

    def _shared_rotation(self, v: Tensor) -> Tensor | None:
        """`D` of the parameter, if it was computed together with other layers' (`hqq_oft.share_rotations`)."""
        if not self.training or torch.compiler.is_compiling():
            return None
        step = rotation_batch.current()
        return None if step is None else step.rotation(v)

    def _rotations_to_share(self) -> Iterator[rotation_batch.Member]:
        """The active adapters whose `D`, in a training forward, depends only on their parameter."""
        if not self.training or self.disable_adapters or self.merged:
            return
        dtype = self.get_base_layer().compute_dtype
        for name, module in self._active():
            v = module.weight
            if not self._dropped_blocks(name, module) and rotation_batch.can_share(v):
                begin = partial(self._begin_forward, name, module)
                yield rotation_batch.Member(v, self._cayley_arguments(module), dtype, begin)

    def _keeps_rotation(self, name: str, module: OFTRotationModule, x: Tensor) -> bool:
        """Whether `D` can be cached: in evaluation without a gradient; in a compiled graph if it is frozen."""
        if self.training or (torch.compiler.is_compiling() and self._rotations.frozen_rotation(name, x.dtype) is None):
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or module._parameters["weight"].requires_grad))

    def _kept_rotation(self, name: str, module: OFTRotationModule, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling():
            return self._rotations.frozen_rotation(name, dtype)
        settings = (
            dtype,
            module.block_share,
            module.block_size,
            module.use_cayley_neumann,
            module.num_cayley_neumann_terms,
            module.coft,
            module.eps,
        )
        v = module._parameters["weight"]
        return self._rotations.get(
            name, v, settings, lambda: functional.cayley(v, dtype=dtype, **self._cayley_arguments(module))
        )

    def _keep_active_rotations(self) -> None:
        """Compute and cache `D` of the active adapters, where a forward in evaluation would."""
        if self.disable_adapters or self.merged:
            return
        for name, module in self._active():
            if rotation_batch.can_share(module.weight):
                self._kept_rotation(name, module, self.get_base_layer().compute_dtype)

    def _index(
        self, names: list[str], block_size: int, adapter_names: list[str], rows_per_sample: int, device: torch.device
    ) -> Tensor:
        """Int64, for each row the index of its adapter in the stack of `names`, -1 for none."""

        def make() -> Tensor:
            index = torch.tensor([names.index(name) if name in names else -1 for name in adapter_names])
            return index.to(device).repeat_interleave(rows_per_sample)

        if torch.compiler.is_compiling():
            return make()
        batch = (tuple(names), tuple(adapter_names), rows_per_sample, device)

        def shared() -> Tensor:
            index = _indices.get(batch)
            if index is None:
                index = _indices[batch] = make()
            return index

        return self._rotations.derived((("index", block_size), *batch), (), shared)

    def _stacked_rotations(self, modules: dict[str, OFTRotationModule], x: Tensor) -> Tensor:
        """`D` of several adapters of one block size, `[A, B or 1, b, b]`, in the dtype of `x`."""
        rotations, kept = [], not torch.compiler.is_compiling()
        for name, module in modules.items():
            if self._keeps_rotation(name, module, x):
                rotations.append(self._kept_rotation(name, module, x.dtype))
            else:
                kept = False
                v, arguments = self._begin_forward(name, module)
                rotations.append(functional.cayley(v, dtype=x.dtype, **arguments))

        def stack() -> Tensor:
            blocks = max(d.shape[0] for d in rotations)
            return torch.stack([d.expand(blocks, -1, -1) for d in rotations])

        if not kept:
            return stack()
        kind = ("stack", rotations[0].shape[-1])
        return self._rotations.derived((kind, tuple(modules), x.dtype), tuple(rotations), stack)

    @torch.no_grad()
    def _rotation(self, name: str) -> Tensor:
        """The adapter's `D = R - I` for merging: float32, without dropout."""
        module = self.oft_R[name]
        require_whole(f"the adapter {name!r}", module.weight)
        v = module.weight.to(self.get_base_layer().W_q.device)
        return functional.cayley(v, dtype=torch.float32, **self._cayley_arguments(module))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense block-diagonal rotation `[K, K]` of an adapter, in the dtype and on the device of its parameter."""
        module = self.oft_R[adapter]
        d = functional.cayley(module.weight, **self._cayley_arguments(module))
        blocks = d + torch.eye(d.shape[-1], dtype=d.dtype, device=d.device)
        blocks = blocks.expand(self.in_features // d.shape[-1], -1, -1)
        return torch.block_diag(*blocks).to(module.weight.dtype)
