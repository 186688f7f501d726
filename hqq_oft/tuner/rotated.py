"""What a forward and a merge take from each adapter: its rotation `D = R - I`, and the input rotated by it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from peft.tuners.oft.layer import OFTRotationModule
from torch import Tensor

from .. import functional
from ..ops import table as ops
from ..ops.weight import require_whole
from . import rotation_batch
from .adapters import AdaptedLayer
from .snapshot import MergeState

# The index of a batch that mixes adapters, by what it is made of, while any layer caches it: one for all layers.
_indices: WeakValueDictionary[tuple[Any, ...], Tensor] = WeakValueDictionary()


class RotatedLayer(AdaptedLayer):
    """The part of this package's layers that rotates."""

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

    def _shared_rotation(self, v: Tensor, dtype: torch.dtype) -> Tensor | None:
        """`D` of the parameter, if it was computed together with other layers' (`hqq_oft.share_rotations`)."""
        if not self.training or torch.compiler.is_compiling():
            return None
        step = rotation_batch.current()
        d = None if step is None else step.rotation(v)
        return d if d is not None and d.dtype is dtype else None

    def _rotations_to_share(self) -> Iterator[rotation_batch.Member]:
        """The active adapters whose `D`, in a training forward, depends only on their parameter."""
        dtype = self._compute_dtype
        if not self.training or self.disable_adapters or self.merged or dtype is None:
            return
        for name, module in self._active():
            v = module.weight
            if not self._dropped_blocks(name, module) and rotation_batch.can_share(v):
                begin = partial(self._begin_forward, name, module)
                yield rotation_batch.Member(v, self._cayley_arguments(module), dtype, begin)

    def _rotate(self, x: Tensor, steps: list[tuple[str, OFTRotationModule]]) -> Tensor:
        """`x` rotated by each of these adapters in turn; only `x` and their parameters are kept for backward."""
        for name, module in steps:
            if self._keeps_rotation(name, module, x):
                x = functional.rotate(x, self._kept_rotation(name, module, x.dtype))
            else:
                v, arguments = self._begin_forward(name, module)
                x = functional.oft_rotate(x, v, d=self._shared_rotation(v, x.dtype), **arguments)
        return x

    # --- Cached rotations --------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> RotatedLayer:
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

    def _keeps_rotation(self, name: str, module: OFTRotationModule, x: Tensor) -> bool:
        """Whether `D` can be cached: in evaluation without a gradient; in a compiled graph if it is frozen."""
        if self.training or (torch.compiler.is_compiling() and self._rotations.frozen_rotation(name, x.dtype) is None):
            return False
        return not (torch.is_grad_enabled() and (x.requires_grad or module._parameters["weight"].requires_grad))

    def _kept_rotation(self, name: str, module: OFTRotationModule, dtype: torch.dtype) -> Tensor:
        if torch.compiler.is_compiling() and (frozen := self._rotations.frozen_rotation(name, dtype)) is not None:
            return frozen
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
        dtype = self._compute_dtype
        if self.disable_adapters or self.merged or dtype is None:
            return
        for name, module in self._active():
            if rotation_batch.can_share(module.weight):
                self._kept_rotation(name, module, dtype)

    # --- Batches that mix adapters -----------------------------------------------------------------------------------

    @staticmethod
    def _check_adapter_names(merge: MergeState, x: Tensor, adapter_names: list[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if merge.adapters:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )

    def _mixed_rotations(self, x: Tensor, adapter_names: list[str]) -> list[tuple[Tensor, Tensor]]:
        """`D` and index of `functional.rotate`, whose turns give each sample its adapter.

        A name that this layer does not have gets no rotation, as in PEFT's LoRA. Adapters of one block size share a
        stacked `D`; each row of `x` is in at most one stack.
        """
        modules = dict(self.oft_R._modules)
        stacks: dict[int, dict[str, OFTRotationModule]] = {}
        for name in dict.fromkeys(adapter_names):
            if name in modules:
                stacks.setdefault(modules[name].block_size, {})[name] = modules[name]
        rows = math.prod(x.shape[1:-1])
        return [
            (self._stacked_rotations(stack, x), self._index(list(stack), size, adapter_names, rows, x.device))
            for size, stack in stacks.items()
        ]

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
        v = module.weight.to(self._device)
        return functional.cayley(v, dtype=torch.float32, **self._cayley_arguments(module))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The dense block-diagonal rotation `[K, K]` of an adapter, in the dtype and on the device of its parameter."""
        module = self.oft_R[adapter]
        d = functional.cayley(module.weight, **self._cayley_arguments(module))
        blocks = d + torch.eye(d.shape[-1], dtype=d.dtype, device=d.device)
        blocks = blocks.expand(self.in_features // d.shape[-1], -1, -1)
        return torch.block_diag(*blocks).to(module.weight.dtype)
