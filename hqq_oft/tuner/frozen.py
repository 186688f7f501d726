"""Model-level support for serving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .layer import HqqOFTLinear


@contextmanager
def frozen_rotations(model: nn.Module) -> Iterator[None]:
    """Keep the cached rotations at fixed addresses, for CUDA graphs captured inside the block.

    Without it a captured graph recomputes each rotation at every replay, and a batch that mixes adapters cannot be
    captured. Inside the block, run each kind of batch once, capture it, then replay it; do not replay after the block,
    when the rotations may be freed. Adapters must not change inside the block: a forward with a changed adapter, and
    removing or replacing one, raises. Use one stream, or synchronize: streams share the cached rotations.

    Args:
        model: the model whose `HqqOFTLinear` layers to freeze, in evaluation mode.

    Raises:
        ValueError: the model has no such layer, is in training mode, or is already frozen.
    """
    layers = [module for module in model.modules() if isinstance(module, HqqOFTLinear)]
    if not layers:
        raise ValueError(
            "the model has no HqqOFTLinear layer: nothing to freeze. Call `patch_peft()` or `convert()` first."
        )
    if any(layer.training for layer in layers):
        raise ValueError("rotations can only be frozen in evaluation mode: call `model.eval()` first.")
    if any(layer.rotations_frozen for layer in layers):
        raise ValueError("the rotations of this model are already frozen; leave that `frozen_rotations` block first.")
    for layer in layers:
        layer.rotations_frozen = True
    try:
        yield
    finally:
        for layer in layers:
            layer.rotations_frozen = False
            layer.clear_rotations()
