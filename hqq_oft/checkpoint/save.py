"""`save_quantized` writes a model with HQQ layers to a directory of safetensors and JSON files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate.utils import convert_file_size_to_int
from hqq.core.quantize import HQQLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .._installation import __version__
from ..quant.marks import quantization_config
from . import diffusers_models
from .atomic_directory import staged_directory
from .files import CONFIG, write_checkpoint
from .layer_format import tensors_of


def save_quantized(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    extra_files: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Save a model with HQQ layers, so that `load_quantized` restores it bit for bit.

    The directory contains `config.json`, safetensors files in the format of HQQ's state dict, `generation_config.json`
    if the model has one, and `hqq_oft.json` with a checksum of each tensor. transformers loads it with
    `from_pretrained`, version 5 after `patch_transformers`. Tensors are written one at a time. The save is atomic: the
    directory appears complete or not at all.

    Args:
        model: a transformers or diffusers model, from `quantize_model`, `load_quantized`, `merge_and_unload`, or
            transformers with an `HqqConfig`.
        directory: the directory to create.
        max_shard_size: maximum size of the tensors in one file: bytes, or a string such as `"500MB"`.
        overwrite: replace an existing model.
        extra_files: files to copy into the directory, such as tokenizer files.

    Raises:
        FileExistsError: the directory exists and is not empty, and `overwrite` is False or it contains no model.
        TypeError: the model is neither a transformers nor a diffusers model.
        ValueError: the model has adapters or no HQQ layer; `max_shard_size` is invalid; a tensor is on the meta device.
        OSError: a file can't be read or written. On any of these errors nothing on disk has changed.
    """
    shard_bytes = parse_size(max_shard_size)
    _check_model(model)
    tensors = _tensors(model)
    config = _config(model)
    with staged_directory(Path(directory), overwrite) as staging:
        copy_into(staging, extra_files)
        generation_config = getattr(model, "generation_config", None)
        if generation_config is not None:
            (staging / "generation_config.json").write_text(generation_config.to_json_string(), "utf-8")
        write_checkpoint(staging, tensors, shard_bytes, __version__)
        (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def copy_into(directory: Path, files: Iterable[str | os.PathLike[str]]) -> None:
    """Copy files into a directory and keep their names."""
    for file in files:
        shutil.copyfile(file, directory / Path(file).name)


def parse_size(size: int | str) -> int:
    """Convert a number or a string such as `"500MB"` (powers of ten) or `"2GiB"` (powers of two) to bytes.

    Raises:
        ValueError: `size` is not a valid size.
    """
    text = str(size).replace(" ", "").upper()  # accelerate reads lower case "b" as bits
    try:
        found = convert_file_size_to_int(int(text) if text.isdecimal() else text)
    except (ValueError, OverflowError):
        found = 0
    if not found:
        raise ValueError(f"a size must be a number of bytes or like '500MB' or '2GiB', got {size!r}.")
    return found


def _check_model(model: nn.Module) -> None:
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "the model has adapters: merge them with model.merge_and_unload(), or remove them with "
            "model.unload() and save them with model.save_pretrained()."
        )
    if not (hasattr(getattr(model, "config", None), "to_json_string") or diffusers_models.is_diffusers_model(model)):
        raise TypeError(f"expected a transformers or diffusers model, got {type(model).__name__}, which has no config.")
    if not any(isinstance(module, HQQLinear) for module in model.modules()):
        raise ValueError("the model has no HQQ layer: call quantize_model first, or use model.save_pretrained.")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors to store, in module order; tied tensors are stored once, under their first name."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        own = {
            name: value
            for name, value in {**module._parameters, **module._buffers}.items()
            if value is not None and name not in module._non_persistent_buffers_set
        }
        found = tensors_of(module) if isinstance(module, HQQLinear) else own
        tensors.update({f"{prefix}.{name}" if prefix else name: value for name, value in found.items()})
    unique = {id(tensor): name for name, tensor in reversed(tensors.items())}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: load the model's weights first, without offloading.")
    return {name: tensor for name, tensor in tensors.items() if unique[id(tensor)] == name}


def _config(model: Any) -> dict[str, Any]:
    """Contents of `config.json`."""
    if diffusers_models.is_diffusers_model(model):
        config = json.loads(model.to_json_string())
    else:
        config = json.loads(model.config.to_json_string())
        config["architectures"] = [type(model).__name__]
    config["quantization_config"] = quantization_config(model)
    return config
