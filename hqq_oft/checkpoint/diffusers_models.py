"""The configurations of diffusers models, which `save_quantized` and `load_quantized` store as diffusers does.

A diffusers model writes its configuration itself: the arguments of its class, the name of which is `_class_name`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .files import CheckpointError

CLASS_NAME = "_class_name"


def is_diffusers_model(model: nn.Module) -> bool:
    """Whether diffusers' `ConfigMixin` describes the model."""
    return isinstance(getattr(model, "config", None), Mapping) and hasattr(model, "to_json_string")


def read(path: Path, raw: dict[str, Any]) -> tuple[Callable[[dict[str, Any]], nn.Module], dict[str, Any]]:
    """A function that makes the model of a configuration, and the configuration.

    Args:
        path: the `config.json`.
        raw: its contents, with `_class_name`.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the installed diffusers does not have the model class.
    """
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{path}: {raw[CLASS_NAME]!r} is a model of diffusers, which is not installed.") from error
    name = raw[CLASS_NAME]
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, diffusers.ModelMixin):
        raise ValueError(f"{path}: {name!r} is not a model class of diffusers {diffusers.__version__}.")

    def make(config: dict[str, Any]) -> nn.Module:
        try:
            return found.from_config(config)  # type: ignore[attr-defined]
        except Exception as error:
            raise CheckpointError(f"{path}: not a valid configuration of {name} ({error}).") from error

    return make, {key: value for key, value in raw.items() if key != "quantization_config"}


def number_of_layers(config: Mapping[str, Any]) -> tuple[str, int]:
    """The largest number of layers in a configuration, with the name of its setting."""
    found = [(key, value) for key, value in config.items() if "layers" in key and isinstance(value, int)]
    return max(found, key=lambda item: item[1], default=("num_layers", 0))
