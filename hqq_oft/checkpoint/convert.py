"""`convert_checkpoint`: HQQ models that other programs stored, rewritten as `save_quantized` writes them."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import packaging.version
import torch
import transformers
from hqq.core.quantize import Quantizer
from torch import Tensor

from .._installation import __version__
from ..quant import hqq_layer
from .atomic_directory import check_replaceable
from .files import CONFIG, INDEX, QMODEL, SINGLE, Checkpoint, CheckpointError, read_json, write_checkpoint
from .layer_format import StoredLayer, tensors_of
from .load import load_quantized, model_class
from .patch import patch_transformers
from .save import parse_size, save_quantized


def convert_checkpoint(
    source: Path,
    target: Path,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    extra_files: Iterable[str | os.PathLike[str]] = (),
) -> list[str]:
    """Read an HQQ model of any known format, and write it to `target` as `save_quantized` does.

    The formats are `qmodel.pt` of HQQ's `save_quantized`, the safetensors files of its `save_to_safetensors`, and
    models stored by another version of transformers, whose names of tensors differ. No code from the files is executed.

    Args:
        source: the directory of the model.
        target: the directory to create.
        max_shard_size, overwrite, extra_files: as in `save_quantized`.

    Returns:
        Stored tensors that the model does not have, and were left out.

    Raises:
        FileNotFoundError: the source is no model.
        CheckpointError: a file is damaged or contains more than tensors and settings, or a tensor is missing.
        ValueError, FileExistsError, OSError: as `load_quantized` and `save_quantized`.
    """
    parse_size(max_shard_size)
    check_replaceable(target, overwrite)
    config_path = source / CONFIG
    if not config_path.is_file():
        raise FileNotFoundError(f"{source} contains no {CONFIG}: no saved model.")
    config = read_json(config_path)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}.convert-") as folder:
        prepared = Path(folder)
        if (source / QMODEL).is_file() and not any((source / name).is_file() for name in (SINGLE, INDEX)):
            write_checkpoint(prepared, _read_qmodel(source / QMODEL), 10**10, __version__)
        else:
            for path in (*source.glob("*.safetensors"), *source.glob(INDEX)):
                (prepared / path.name).symlink_to(path.resolve())
        if "quantization_config" not in config:
            config["dtype"] = config["torch_dtype"] = _stored_dtype(prepared)
            config["quantization_config"] = {"quant_method": "hqq", "quant_config": {}, "skip_modules": []}
        (prepared / CONFIG).write_text(json.dumps(config), "utf-8")
        model, left_out = _load(prepared, source)
        save_quantized(model, target, max_shard_size=max_shard_size, overwrite=overwrite, extra_files=extra_files)
    return left_out


def _load(prepared: Path, source: Path) -> tuple[Any, list[str]]:
    if packaging.version.parse(transformers.__version__).major < 5:
        return load_quantized(prepared, progress=False), []
    architecture, _ = model_class(source / CONFIG, read_json(prepared / CONFIG))
    with patch_transformers():
        model, info = architecture.from_pretrained(
            str(prepared), use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    if missing := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
        raise CheckpointError(
            f"{source}: tensor {missing[0]!r}: missing or of another shape, as {len(missing)} in all."
        )
    return model.eval(), sorted(info["unexpected_keys"])


def _stored_dtype(directory: Path) -> str:
    """Name of the compute dtype of the first HQQ layer, which HQQ casts the whole model to."""
    with Checkpoint(directory) as checkpoint:
        name = next((name for name in checkpoint.names if name.endswith(".W_q")), None)
        if name is None:
            raise CheckpointError(f"{directory}: the model has no HQQ layer.")
        return str(StoredLayer.read(checkpoint, name.removesuffix(".W_q")).compute_dtype).removeprefix("torch.")


def _read_qmodel(path: Path) -> dict[str, Tensor]:
    """All tensors of a `qmodel.pt`, with HQQ layers in the format of safetensors files."""
    try:
        modules = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged, or it contains more than tensors and settings; not loaded ({error})."
        ) from None
    if not isinstance(modules, dict) or not all(isinstance(state, Mapping) for state in modules.values()):
        raise CheckpointError(f"{path}: not the modules of a model by name.")
    tensors: dict[str, Tensor] = {}
    for name, state in modules.items():
        stored = _layer_tensors(path, name, state) if "W_q" in state else state
        tensors.update({f"{name}.{key}": value for key, value in stored.items() if isinstance(value, Tensor)})
    return tensors


def _layer_tensors(path: Path, name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """An HQQ layer of a `qmodel.pt` as `tensors_of` gives it; its values are Python's, of old versions in a `meta`."""
    meta = dict(state["meta"]) if "meta" in state else {key: state[key] for key in state if key not in _NOT_META}
    try:
        meta.setdefault("view_as_float", False)
        meta.setdefault("compute_dtype", torch.float16)  # HQQ's default
        meta["unpack_view_dtype"] = Quantizer.unpack_view_dtype[meta["packing"]]
        packed = hqq_layer.PackedState(state["W_q"].detach(), meta)
        packed.weight()  # validated
        layer = hqq_layer.make_layer(packed, None, {})
        weight = hqq_layer.own_settings(layer)["weight_quant_params"]
        weight.update({key: state[key] for key in ("optimize", "round_zero", "channel_wise") if key in state})
        layer.quant_config = {"weight_quant_params": weight, "scale_quant_params": None, "zero_quant_params": None}
        tensors = tensors_of(layer)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {name!r}: not a valid HQQ layer ({error}).") from error
    bias = state.get("bias")
    return tensors if bias is None else {**tensors, "bias": bias.detach()}


_NOT_META = ("W_q", "bias", "offload_meta", "encoded_state_dict", "stores_quant_config", "quant_config")
