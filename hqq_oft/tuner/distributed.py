"""Adapters of models with FSDP-sharded parameters."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def full_adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The full parameters of one adapter in host memory, whether or not `fully_shard` has sharded them.

    A collective: every process must call it, and gets all parameters. One process then writes an ordinary checkpoint:
    `model.save_pretrained(folder, state_dict=state)`. PyTorch's own `get_model_state_dict` does not work with HQQ
    layers, whose state dicts contain more than parameters and buffers.

    Args:
        model: a `PeftModel`.
        adapter_name: which adapter.

    Returns:
        Name in `model.state_dict()` -> tensor, including the modules that PEFT saves too (`modules_to_save`).

    Raises:
        ValueError: the model has no adapter of that name.
    """
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            continue
        for attribute in (*module.adapter_layer_names, *module.other_param_names):
            adapters = getattr(module, attribute, None)
            if isinstance(adapters, (nn.ModuleDict, nn.ParameterDict)) and adapter_name in adapters:
                place, own = ".".join(filter(None, (prefix, attribute, adapter_name))), adapters[adapter_name]
                if isinstance(own, nn.Module):
                    found.update(own.named_parameters(prefix=place))
                elif isinstance(own, nn.Parameter):
                    found[place] = own
    state = {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().cpu()
        for name, parameter in found.items()
    }
    if not state:
        raise ValueError(f"the model has no adapter {adapter_name!r}.")
    return state
