"""What PEFT does around HQQ layers that `patch_peft` corrects: each function here wraps one of PEFT's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peft.tuners.lora.hqq as peft_lora_hqq
import peft.tuners.lora.model as peft_lora_model
import peft.tuners.tuners_utils as peft_tuners
from hqq.core.quantize import HQQLinear
from peft import OFTConfig, TaskType
from peft.tuners.mixed.model import MixedModel
from peft.tuners.oft.model import OFTModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from ..quant.linears import SAME_FUNCTION

# The heads that PEFT adds to `modules_to_save` by itself; for the last two tasks only after it added the adapter.
_TRAINED_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def _include_hqq_layers(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of `target_modules="all-linear"`, which PEFT resolves to dense layers only, including routers."""

    @functools.wraps(original)
    def include(peft_config: Any, model: nn.Module) -> Any:
        targets = getattr(peft_config, "target_modules", None)
        peft_config = original(peft_config, model)
        all_linear = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        if all_linear and isinstance(peft_config, OFTConfig):
            dense = {name for name in peft_config.target_modules if not _is_other_layer(model.get_submodule(name))}
            peft_config.target_modules = {*dense, *_hqq_targets(peft_config, model)}
        return peft_config

    return include


def _is_other_layer(module: nn.Module) -> bool:
    """Whether a module is a subclass of `nn.Linear` with another function, or whose weight is read without calling it.

    The former are routers of some mixtures, the latter the output layer of `nn.MultiheadAttention`.
    """
    return isinstance(module, NonDynamicallyQuantizableLinear) or (
        isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__name__ not in SAME_FUNCTION
        and type(module).__module__.partition(".")[0] != "bitsandbytes"  # PEFT has layers for these
    )


def _hqq_targets(peft_config: OFTConfig, model: nn.Module) -> list[str]:
    """Names of the HQQ layers, without those that PEFT excludes: the output layer or head, and what a tuner wraps."""
    excluded: list[nn.Module | None] = []
    if isinstance(model, PreTrainedModel):
        excluded = [model.get_output_embeddings()]
        if excluded == [None] and peft_config.task_type == TaskType.SEQ_CLS:
            excluded = [getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES]
    wrapped = {part for module in model.modules() if isinstance(module, BaseTunerLayer) for part in module.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, HQQLinear) and module not in wrapped and not any(module is other for other in excluded)
    ]


def _refuse_trained_hqq_layers(original: Callable[..., None]) -> Callable[..., None]:
    """Of a new adapter, before anything is changed: PEFT would train the packed integers of `modules_to_save`."""

    @functools.wraps(original)
    def check(self: Any, config: Any) -> None:
        original(self, config)
        asked, heads = getattr(config, "modules_to_save", None) or (), _TRAINED_HEADS.get(config.task_type, ())
        for name, module in self.model.named_modules():
            ends = [end for end in (*heads, *asked) if name.endswith(end)]
            if ends and any(isinstance(part, HQQLinear) for part in module.modules()):
                reason = f"task_type={TaskType(config.task_type).value!r}" if ends[0] in heads else "modules_to_save"
                raise ValueError(
                    f"{reason} would train {name}, whose weight is HQQ-quantized: packed integers can't be trained. "
                    f"Leave it dense with quantize_model(..., skip_modules=[{name!r}]), or adapt it with "
                    "target_modules."
                )

    return check


def _wrap_whole_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of LoRA on a layer that has an adapter of another kind: PEFT wraps only the HQQ layer and drops that adapter."""

    @functools.wraps(original)
    def dispatch(target: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        layer = original(target, adapter_name, *args, **kwargs)
        if layer is not None and isinstance(target, BaseTunerLayer):
            layer.base_layer = target
        return layer

    return dispatch


def _refuse_merge_below(original: Callable[..., None]) -> Callable[..., None]:
    """Of LoRA into the HQQ layer below another adapter, which PEFT would drop."""

    @functools.wraps(original)
    def merge(self: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(self.base_layer, BaseTunerLayer):
            raise ValueError(
                f"Cannot merge LoRA into the HQQ weight below a {type(self.base_layer).__name__}: its adapters would "
                "be lost. Merge and unload them first."
            )
        original(self, *args, **kwargs)

    return merge


FIXES: tuple[tuple[Any, str, Callable[[Any], Any]], ...] = (
    (peft_tuners, "_maybe_include_all_linear_layers", _include_hqq_layers),
    (OFTModel, "_check_new_adapter_config", _refuse_trained_hqq_layers),
    (MixedModel, "_check_new_adapter_config", _refuse_trained_hqq_layers),
    (peft_lora_model, "dispatch_hqq", _wrap_whole_layer),
    (peft_lora_hqq.HqqLoraLinear, "merge", _refuse_merge_below),
)
"""Owner, name, and what makes the replacement from the original."""
