"""Adapters of models whose parameters FSDP shards."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def full_adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The parameters of one adapter, whole and in host memory, whether `fully_shard` has sharded them or not.

    Every process must call it, and gets all of them. One process then writes a checkpoint like any other:
    `model.save_pretrained(folder, state_dict=state)`. PyTorch's own `get_model_state_dict` can't serve a model with
    HQQ layers, whose state dicts hold more than parameters and buffers.

    Args:
        model: a `PeftModel`.
        adapter_name: which adapter.

    Returns:
        Name in `model.state_dict()` -> tensor; with it, what PEFT saves along (`modules_to_save`).

    Raises:
        ValueError: the model has no adapter of that name.
    """
    state = {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().cpu()
        for name, parameter in model.named_parameters()
        if adapter_name in name.split(".")
    }
    if not state:
        raise ValueError(f"the model has no adapter {adapter_name!r}.")
    return state
