"""Sharing work across the layers of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import rotation_step
from .layer import HqqOFTLinear


class SharedRotations:
    """Returned by `share_rotations`: `remove()` takes it back, as the end of a `with` block does."""

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
        """Let every layer compute its own rotations again."""
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

    Without it every layer computes its own, in forward and again in backward. With it `functional.cayley_many` computes
    those of one block size, series and dtype together and they are kept until backward: K x b elements per layer more
    memory, for two launches per layer less. Outputs and gradients are the same bit for bit. It pays where launches are
    what a step waits for: on GPUs with short batches, and for small layers.

    Layers compute their own where the rotations can't be shared: adapters with module dropout, parameters that FSDP
    shards, compiled layers, the second forward of gradient checkpointing.

    Args:
        model: whose `HqqOFTLinear` layers share; its own forward is what starts a step.

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
