"""What a model does with all its rotations at once: sharing launches in training, fixed addresses in inference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import rotation_batch
from .rotated import RotatedLayer


def _layers(model: nn.Module) -> list[RotatedLayer]:
    return [module for module in model.modules() if isinstance(module, RotatedLayer)]


class SharedRotations:
    """Handle returned by `share_rotations`: `remove()`, or the end of a `with` block, stops sharing."""

    def __init__(self, model: nn.Module) -> None:
        self._handles = [model.register_forward_pre_hook(_enter), model.register_forward_hook(_leave, always_call=True)]

    def __enter__(self) -> SharedRotations:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Stop sharing: every layer computes its own rotations again."""
        for handle in self._handles:
            handle.remove()


def _enter(model: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():
        members = [member for layer in _layers(model) for member in layer._rotations_to_share()]
        rotation_batch.enter(rotation_batch.RotationStep(model, members))


def _leave(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        rotation_batch.leave(model)


def share_rotations(model: nn.Module) -> SharedRotations:
    """Compute the rotations of all adapters of a model in one launch per training forward.

    By default every layer computes its own, in forward and again in backward. With sharing, `functional.cayley_many`
    computes those of the same block size, series and dtype together and they are kept until backward: K x b elements
    more memory and two launches less per layer. Outputs and gradients are bitwise identical. This helps if training is
    bound by launch overhead: on GPUs with small batches, and for small layers.

    Layers fall back to computing their own if rotations cannot be shared: adapters with module dropout, parameters
    sharded by FSDP, compiled layers, the recomputation of gradient checkpointing.

    Args:
        model: the model whose `HqqOFTLinear` and `OFTLinear` layers share; each of its forwards starts a step.

    Returns:
        A handle with `remove()`, which can be used in a `with` statement.

    Raises:
        ValueError: the model has no such layer.
    """
    if not _layers(model):
        raise ValueError(
            "the model has no HqqOFTLinear or OFTLinear layer: there are no rotations to share. Call `patch_peft()` or "
            "`convert()` first."
        )
    return SharedRotations(model)


@contextmanager
def frozen_rotations(model: nn.Module) -> Iterator[None]:
    """Keep the cached rotations at fixed addresses, for CUDA graphs captured inside the block.

    Without it a captured graph recomputes each rotation at every replay, and a batch that mixes adapters cannot be
    captured. A graph of `torch.compile` computes the rotations at every call, too, except inside the block, where it
    reads those of the active adapters; it does not notice a changed adapter. Inside the block, run each kind of batch
    once, capture it, then replay it; do not replay after the block, when the rotations may be freed. Adapters must not
    change inside the block: a forward with a changed adapter, and removing or replacing one, raises. Use one stream, or
    synchronize: streams share the cached rotations.

    Args:
        model: the model whose `HqqOFTLinear` and `OFTLinear` layers to freeze, in evaluation mode.

    Raises:
        ValueError: the model has no such layer, is in training mode, or is already frozen.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(
            "the model has no HqqOFTLinear or OFTLinear layer: nothing to freeze. Call `patch_peft()` or `convert()` "
            "first."
        )
    if any(layer.training for layer in layers):
        raise ValueError("rotations can only be frozen in evaluation mode: call `model.eval()` first.")
    if any(layer.rotations_frozen for layer in layers):
        raise ValueError("the rotations of this model are already frozen; leave that `frozen_rotations` block first.")
    for layer in layers:
        layer.rotations_frozen = True
    try:
        for layer in layers:
            layer._keep_active_rotations()
        yield
    finally:
        for layer in layers:
            layer.rotations_frozen = False
            layer.clear_rotations()
