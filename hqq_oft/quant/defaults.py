"""Which layers of a model are not quantized unless the user names them: heads, float32 modules, routers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from .experts import Experts

HEADS = frozenset({"lm_head", "score", "classifier"})
"""Names of heads in models that are not transformers' own; the last two are those that PEFT trains in whole."""


def kept_by_default(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """The reason for each layer of the model, by name, that stays dense by default.

    `layers` are the modules that hold the layers' weights. Reasons are:

    * output heads: `get_output_embeddings()` of the model and of the models inside it;
    * other heads: what a model such as `BertForSequenceClassification` has outside its base model, and modules with a
      name in `HEADS`;
    * modules in `_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict`;
    * routers and gates of a mixture of experts.
    """
    reasons: dict[str, str] = {}
    for name in layers:
        if HEADS.intersection(name.split(".")):
            reasons[name] = "it is a head by its name"
    for name in _routers(model):
        reasons[name] = "it routes tokens to experts"
    owners = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, PreTrainedModel)}
    for name, layer in layers.items():
        for prefix in _prefixes(name):
            if (owner := owners.get(prefix)) is None:
                continue
            inside = name[len(prefix) + 1 :] if prefix else name
            if layer is _output_embeddings(owner):
                reasons[name] = f"it is the output head of {type(owner).__name__}"
            elif (key := _float32_key(_float32_keys(owner), f"{inside}.weight")) is not None:
                reasons[name] = f"{type(owner).__name__} keeps {key!r} in float32"
        nearest = next((owners[prefix] for prefix in _prefixes(name) if prefix in owners), None)
        if nearest is not None and name not in reasons and _is_outside_base(nearest, layer):
            reasons[name] = f"it is in the head of {type(nearest).__name__}"
    return reasons


def _prefixes(name: str) -> Iterator[str]:
    """Names of the modules that contain the module `name`, innermost first; the last is the whole model, `""`."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):  # models without a head
        return None


def kept_in_float32(model: nn.Module, dtype: torch.dtype | None) -> set[str]:
    """Names of the parameters and buffers that transformers keeps in float32 in a model of this dtype."""
    names: set[str] = set()
    for prefix, owner in model.named_modules(remove_duplicate=False):
        if not isinstance(owner, PreTrainedModel) or not (keys := _float32_keys(owner, dtype)):
            continue
        for inside, module in owner.named_modules(remove_duplicate=False):
            for tensor in (*module._parameters, *module._buffers):
                name = f"{inside}.{tensor}" if inside else tensor
                if _float32_key(keys, name) is not None:
                    names.add(f"{prefix}.{name}" if prefix else name)
    return names


def _float32_keys(model: PreTrainedModel, dtype: torch.dtype | None = torch.float16) -> list[str]:
    """The model's lists of float32 modules: one is for float16 only, the other for bfloat16 too."""
    keys: list[str] = []
    if dtype is torch.float16:
        keys += model._keep_in_fp32_modules or ()
    if dtype in (torch.float16, torch.bfloat16):
        keys += model._keep_in_fp32_modules_strict or ()
    return keys


def _float32_key(keys: Iterable[str], name: str) -> str | None:
    """The key that matches a parameter, as transformers matches it."""
    for key in keys:
        pattern = re.escape(key).replace(r"\*", ".*")
        if re.search(rf"(^|\.){pattern}($|\.)", name):
            return key
    return None


def _is_outside_base(model: PreTrainedModel, layer: nn.Module) -> bool:
    base = model.base_model
    return base is not model and isinstance(base, nn.Module) and all(layer is not module for module in base.modules())


def _routers(model: nn.Module) -> Iterator[str]:
    for prefix, parent in model.named_modules(remove_duplicate=False):
        experts = number_of_experts(getattr(parent, "experts", None))
        routes = re.search("router|gating", type(parent).__name__, re.IGNORECASE) is not None
        for name, child in parent.named_children():
            # A shared expert is weighted by a layer with one output.
            if isinstance(child, nn.Linear) and (routes or (experts and child.out_features in (1, experts))):
                yield f"{prefix}.{name}" if prefix else name


def number_of_experts(experts: object) -> int:
    """Number of experts in a list, in `Experts` or in a module with three-dimensional parameters; 0 for others."""
    if isinstance(experts, Experts):
        return experts.num_experts
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        return len(experts)
    if not isinstance(experts, nn.Module):
        return 0
    return next((parameter.shape[0] for parameter in experts.parameters() if parameter.dim() == 3), 0)
