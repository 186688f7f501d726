"""Sharing work across the layers of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import rotation_batch as rotation_step
from .layer import HqqOFTLinear


class SharedRotations:
    """Handle returned by `share_rotations`: `remove()`, or the end of a `with` block, stops sharing."""

    def __init__(self, model: nn.Module) -> None:
        self._handles = [
            model.register_forward_pre_hook(_enter),
            model.register_forward_hook(_leave, always_call=True),
        ]

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
        layers = [module for module in model.modules() if isinstance(module, HqqOFTLinear)]
        members = [member for layer in layers for member in layer._rotations_to_share()]
        rotation_step.enter(rotation_step.RotationStep(model, members))


def _leave(model: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        rotation_step.leave(model)


def share_rotations(model: nn.Module) -> SharedRotations:
    """Compute the rotations of all adapters of a model in one launch per training forward.

    By default every layer computes its own, in forward and again in backward. With sharing, `functional.cayley_many`
    computes those of the same block size, series and dtype together and they are kept until backward: K x b elements
    more memory and two launches less per layer. Outputs and gradients are bitwise identical. This helps if training is
    bound by launch overhead: on GPUs with small batches, and for small layers.

    Layers fall back to computing their own if rotations cannot be shared: adapters with module dropout, parameters
    sharded by FSDP, compiled layers, the recomputation of gradient checkpointing.

    Args:
        model: the model whose `HqqOFTLinear` layers share; each of its forwards starts a step.

    Returns:
        A handle with `remove()`, which can be used in a `with` statement.

    Raises:
        ValueError: the model has no such layer.
    """
    if not any(isinstance(module, HqqOFTLinear) for module in model.modules()):
        raise ValueError(
            "the model has no HqqOFTLinear layer: there are no rotations to share. Call `patch_peft()` or `convert()` "
            "first."
        )
    return SharedRotations(model)
