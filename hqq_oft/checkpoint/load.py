"""`load_quantized` loads a saved model layer by layer; the dense weights are never materialized."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from tqdm import tqdm

from ..quant.defaults import kept_in_float32
from ..quant.linears import expose, mark_origin, reads_weight
from ..quant.marks import mark_quantized
from ..quant.model import check_compute_dtype
from . import diffusers_models
from .files import CONFIG, QMODEL, Checkpoint, CheckpointError, read_json
from .layer_format import FIELDS, StoredLayer

_SPECIAL_FLOATS = ("Infinity", "-Infinity", "NaN")
_FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Sizes of non-persistent buffers depend only on config.json, so they are limited. Real ones are tables of a few MiB.
_MAX_COMPUTED_BUFFERS = 1 << 30


def load_quantized(
    directory: str | os.PathLike[str],
    *,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Any:
    """Load a transformers or diffusers model saved by `save_quantized`, or by transformers with an `HqqConfig`.

    Models of other formats (HQQ's own, or with names of tensors that differ in the installed transformers) are
    converted by `hqq-oft convert`; the error says so.

    No code from the directory is executed. Names, shapes and dtypes of all tensors are validated against `config.json`
    before the first weight is read, and sizes are validated before memory is allocated. If `save_quantized` stored
    checksums, they are verified.

    Args:
        directory: the model directory.
        compute_dtype: floating dtype of the HQQ layers, to which the model's other parameters are cast too, or to
            float32 where transformers keeps them in it; as stored by default.
        device: device to load the model onto, layer by layer; host memory by default.
        progress: show a progress bar on a terminal.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: the directory contains no model.
        CheckpointError: a file is damaged, truncated or inconsistent; the message names the file and the tensor.
        ValueError: the installed transformers or diffusers does not have the model class.
        ImportError: the model is one of diffusers, which is not installed.
        TypeError: `compute_dtype` is not a floating dtype.
        OSError: a file can't be read.
    """
    check_compute_dtype(compute_dtype)
    directory, device = Path(directory), torch.device("cpu" if device is None else device)
    torch.empty(0, device=device)
    config_path = directory / CONFIG
    architecture, config = read_config(config_path)
    with Checkpoint(directory) as checkpoint:
        setting, layers = _number_of_layers(config)
        if layers > len(checkpoint):
            raise CheckpointError(
                f"{config_path}: {setting} is {layers}, more than the number of tensors ({len(checkpoint)})."
            )
        # Build on the meta device first, so that nothing is allocated before all sizes match the stored tensors.
        outline = _build(architecture, config, torch.device("meta"), checkpoint)
        try:
            plan = _plan(outline, checkpoint, config_path)
        except CheckpointError as error:
            if not _has_other_names(outline, checkpoint):
                raise
            raise CheckpointError(
                f"{error} If another version of transformers wrote these names, or save_pretrained, "
                f"`hqq-oft convert {directory} NEW` converts them."
            ) from None
        del outline
        model = _build(architecture, config, init_empty_weights(include_buffers=False), checkpoint)
        _fill(model, plan, checkpoint, compute_dtype, device, progress)
    if (directory / "generation_config.json").is_file() and hasattr(model, "can_generate") and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(directory))
    mark_quantized(model)
    return model.eval()


def read_config(path: Path) -> tuple[Any, Any]:
    """Model class and configuration of an HQQ model, without `quantization_config`, which transformers 5 rejects.

    Raises:
        FileNotFoundError, CheckpointError, ValueError: as `load_quantized`.
    """
    if not path.is_file():
        is_adapter = (path.parent / "adapter_config.json").is_file()
        what = "a PEFT adapter: load its base model, then PeftModel.from_pretrained" if is_adapter else "no saved model"
        raise FileNotFoundError(f"{path.parent} contains no {CONFIG}: it is {what}.")
    raw = read_json(path)
    method = (raw.get("quantization_config") or {}).get("quant_method")
    if method != "hqq":
        raise CheckpointError(f"{path}: no quantization_config for HQQ: {_other_kind(path.parent, method)}.")
    return diffusers_models.read(path, raw) if diffusers_models.CLASS_NAME in raw else model_class(path, raw)


def model_class(path: Path, raw: dict[str, Any]) -> tuple[Any, Any]:
    """Model class and configuration that the contents of a `config.json` describe; as `read_config`."""
    import transformers

    architectures = raw.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ValueError(
            f"{path}: architectures is {architectures!r}, which is not a model class of transformers "
            f"{transformers.__version__}; custom model code is not supported."
        )
    values = {key: _decoded(value) for key, value in raw.items() if key != "quantization_config"}
    try:
        config = found.config_class.from_dict(values)  # type: ignore[attr-defined]
    except Exception as error:
        raise CheckpointError(f"{path}: not a valid configuration of {name} ({error}).") from error
    config.name_or_path = str(path.parent)
    return found, config


def _decoded(value: Any) -> Any:
    """transformers 5 stores infinity as `{"__float__": "Infinity"}`, version 4 as plain `Infinity`."""
    if isinstance(value, dict):
        tagged = value.get("__float__") if len(value) == 1 else None
        return float(tagged) if tagged in _SPECIAL_FLOATS else {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _other_kind(directory: Path, method: Any) -> str:
    """What a directory without HQQ's `quantization_config` contains, and what reads it."""
    if method is not None:
        return f"the model is quantized with {method!r}, which transformers' from_pretrained may load"
    if (directory / QMODEL).is_file():
        return f"{directory / QMODEL} is in HQQ's own format; `hqq-oft convert {directory} NEW` converts it"
    with Checkpoint(directory) as checkpoint:
        if any(name.endswith(".W_q") for name in checkpoint.names):
            return (
                "its HQQ layers were stored by another function, such as HQQ's save_to_safetensors; "
                f"`hqq-oft convert {directory} NEW` adds it"
            )
    return "the model is dense: load it with transformers' from_pretrained, or quantize it with `hqq-oft quantize`"


def _number_of_layers(config: Any) -> tuple[str, int]:
    """The setting that gives the number of layers, and its value."""
    if isinstance(config, dict):
        return diffusers_models.number_of_layers(config)
    return "num_hidden_layers", getattr(config.get_text_config(), "num_hidden_layers", None) or 0


def _build(architecture: Any, config: Any, where: AbstractContextManager[Any], checkpoint: Checkpoint) -> Any:
    with where:
        model = architecture(copy.deepcopy(config))
    if hasattr(model, "tie_weights"):  # diffusers ties none
        model.tie_weights()
    expose(model, lambda name: f"{name}.W_q" in checkpoint)
    return model


@dataclass
class _Plan:
    """The tensors to read, validated but not read yet.

    Attributes:
        layers: settings of each HQQ layer, by name.
        dense: all names in the model of each stored parameter or buffer, by its stored name.
    """

    layers: dict[str, StoredLayer] = field(default_factory=dict)
    dense: dict[str, list[str]] = field(default_factory=dict)


def _tensors(model: nn.Module, inside: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers with all their names, except those of the modules in `inside`."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if prefix not in inside:
            for name, value in (*module._parameters.items(), *module._buffers.items()):
                if value is not None:
                    yield f"{prefix}.{name}" if prefix else name, value


def _computed(model: nn.Module) -> set[str]:
    """Names of the non-persistent buffers."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }


def _plan(outline: Any, checkpoint: Checkpoint, config_path: Path) -> _Plan:
    plan, expected = _Plan(), set()
    for name, module in outline.named_modules():
        if isinstance(module, nn.Linear) and not reads_weight(outline, name) and f"{name}.W_q" in checkpoint:
            plan.layers[name] = StoredLayer.read(
                checkpoint, name, (module.out_features, module.in_features), module.bias is not None
            )
            fields = set(FIELDS) - (set() if module.bias is not None else {"bias"})
            expected |= {f"{name}.{field}" for field in fields}
    computed = _computed(outline)
    names_of: dict[int, list[str]] = {}
    tensors = dict(_tensors(outline, inside=set(plan.layers)))
    for name, tensor in tensors.items():
        if name not in computed:
            names_of.setdefault(id(tensor), []).append(name)
    for names in names_of.values():
        stored = next((name for name in names if name in checkpoint), names[0])
        tensor = tensors[stored]
        checkpoint.expect(stored, tuple(tensor.shape), _FLOATING if tensor.is_floating_point() else (tensor.dtype,))
        plan.dense[stored] = names
        expected |= set(names)
    ignored = getattr(outline, "_keys_to_ignore_on_load_unexpected", None) or []
    for name in checkpoint.names:
        if name not in expected and not any(re.search(pattern, name) for pattern in ignored):
            raise checkpoint.error(name, f"the model that {config_path} describes has no such tensor")
    size = sum(tensors[name].numel() * tensors[name].element_size() for name in computed & tensors.keys())
    if size > _MAX_COMPUTED_BUFFERS:
        raise CheckpointError(f"{config_path}: {size} bytes of buffers; the limit is {_MAX_COMPUTED_BUFFERS}.")
    return plan


def _has_other_names(outline: nn.Module, checkpoint: Checkpoint) -> bool:
    """Whether any stored tensor is neither a parameter or buffer nor a field of a linear layer that may be HQQ's."""
    known = {name for name, _ in _tensors(outline, inside=set())}
    for name, module in outline.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) and not reads_weight(outline, name):
            known |= {f"{name}.{field}" for field in FIELDS}
    return not known.issuperset(checkpoint.names)


def _fill(
    model: Any, plan: _Plan, checkpoint: Checkpoint, dtype: torch.dtype | None, device: torch.device, progress: bool
) -> None:
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(name)
    modules = {name: model.get_submodule(name) for name in plan.layers}
    for name, stored in tqdm(plan.layers.items(), disable=None if progress else True, desc="Loading", unit="layer"):
        layer = stored.load(checkpoint, name, modules[name].bias is not None, device, dtype)
        mark_origin(modules[name], layer)
        for place in places[id(modules[name])]:
            _set(model, place, layer)
    float32 = kept_in_float32(model, dtype)
    for name, names in plan.dense.items():
        tensor = checkpoint.read(name)
        cast = torch.float32 if float32.intersection(names) else dtype
        tensor = tensor.to(device, cast if tensor.is_floating_point() else None)
        old = _get(model, names[0])
        if isinstance(old, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=old.requires_grad)
        for place in names:
            _set(model, place, tensor)
    for name in _computed(model):
        buffer = _get(model, name)
        if buffer is not None:
            _set(model, name, buffer.to(device))


def _get(model: nn.Module, name: str) -> Any:
    parent, _, child = name.rpartition(".")
    return getattr(model.get_submodule(parent), child)


def _set(model: nn.Module, name: str, value: Any) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, value)
