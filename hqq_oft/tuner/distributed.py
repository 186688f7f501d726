"""Models with FSDP-sharded parameters: their state dicts, accelerate's preparation of them, their adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import accelerate.accelerator
import torch.distributed as dist
from hqq.core.quantize import HQQLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..quant.hqq_layer import move_meta


def full_adapter_state_dict(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """The full parameters of one adapter in host memory, whether or not `fully_shard` has sharded them.

    A collective: every process must call it, and gets all parameters. One process then writes an ordinary checkpoint:
    `model.save_pretrained(folder, state_dict=state)`.

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


def patches() -> Iterator[tuple[object, str, Any]]:
    """What `patch_peft` replaces, so that sharded HQQ layers can be prepared, saved and loaded: owner, name, value."""
    # HQQ's state dicts hold settings, which are neither parameters nor buffers: PyTorch's distributed checkpoints and
    # accelerate expect nothing else. The state of a sharded layer is its parameters, which FSDP manages; scale and zero
    # are constants of the base model, whole in every process.
    for name in ("state_dict", "_load_from_state_dict"):
        yield HQQLinear, name, _module_method_if_sharded(getattr(HQQLinear, name), getattr(nn.Module, name))
    if hasattr(accelerate.accelerator, "fsdp2_prepare_model"):  # since accelerate 1.6
        yield (
            accelerate.accelerator,
            "fsdp2_prepare_model",
            _keeping_constants(accelerate.accelerator.fsdp2_prepare_model),
        )


def _module_method_if_sharded(hqq_method: Callable[..., Any], module_method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hqq_method)
    def method(self: HQQLinear, *args: Any, **kwargs: Any) -> Any:
        return (module_method if isinstance(self.W_q, DTensor) else hqq_method)(self, *args, **kwargs)

    return method


def _keeping_constants(prepare_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(prepare_model)
    def prepare(accelerator: Any, model: nn.Module) -> nn.Module:
        # With `cpu_ram_efficient_loading` only the first process has the weights: accelerate moves the model to the
        # meta device and broadcasts the parameters.
        broadcast = accelerator.state.fsdp_plugin.cpu_ram_efficient_loading
        layers = [module for module in model.modules() if isinstance(module, HQQLinear)]
        constants = [_of_first_process(layer) if broadcast else _constants(layer) for layer in layers]
        prepared = prepare_model(accelerator, model)
        for layer, (meta, bias) in zip(layers, constants, strict=True):
            layer.meta, layer.device = move_meta(meta, accelerator.device), str(accelerator.device)
            if bias is not None:
                layer.bias = bias.to(accelerator.device)
        return prepared

    return prepare


def _constants(layer: HQQLinear) -> tuple[dict[str, Any], Tensor | None]:
    """What an HQQ layer holds besides parameters: meta data, and a bias that HQQ made."""
    return layer.meta, None if isinstance(layer.bias, nn.Parameter) else layer.bias


def _of_first_process(layer: HQQLinear) -> tuple[dict[str, Any], Tensor | None]:
    """The `_constants` of the first process, in host memory; a collective."""
    state: list[Any] = [None]
    if dist.get_rank() == 0:
        meta, bias = _constants(layer)
        state = [(move_meta(meta, "cpu"), None if bias is None else bias.cpu())]
    dist.broadcast_object_list(state, src=0)
    return state[0]
