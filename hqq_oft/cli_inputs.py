"""What the commands of `hqq-oft` check and prepare before they load a model, and the types of their options."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import Quantizer
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from .checkpoint.files import read_json
from .quant.report import QuantizationReport
from .quant.selection import select
from .quant.settings import QuantizationSettings

# Files that belong to a model but are not written when it is saved: tokenizers, processors, templates, licences.
COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model"),
    *("*processor_config.json", "chat_template*", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)


class CommandError(Exception):
    """An error that the user can fix: the message goes to stderr."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def local_directory(name: str, *files: str) -> Path:
    """The directory of a model or adapter: `name` itself, or the local copy of the repository `OWNER/NAME` on the hub.

    Args:
        name: of the directory or repository.
        files: patterns of files that are needed besides configuration, safetensors files and `COMPANIONS`.

    Raises:
        CommandError: the hub can't provide it.
    """
    path = Path(name)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name, re.ASCII):
        return path  # the commands say what a directory lacks
    try:
        patterns = ["*.json", "*.safetensors", *files, *COMPANIONS]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns="*/*"))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise CommandError(
            f"{name} is not a directory, and the Hugging Face hub does not provide it: {reason}."
        ) from error


def check_device(name: str) -> None:
    """Raise CommandError unless torch can compute on the device."""
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise CommandError(
            f"--device {name} can't be used here ({reason}); see `hqq-oft env` for the devices."
        ) from error


def check_settings(
    model_class: Any, config: Any, settings: QuantizationSettings, skip: list[str], overrides: Mapping[str, Any]
) -> None:
    """Raise ValueError, as `quantize_model` does, if settings don't fit the shapes of a model's layers."""
    with torch.device("meta"):
        outline = model_class(config)
    outline.tie_weights()
    select(outline, settings, skip, overrides, QuantizationReport())


def check_adapter(directory: Path) -> None:
    """Raise CommandError unless the directory holds an OFT adapter of PEFT."""
    path = directory / "adapter_config.json"
    if not path.is_file():
        raise CommandError(f"{directory} contains no {path.name}: give the directory of a PEFT adapter.")
    if (kind := read_json(path).get("peft_type")) != "OFT":
        raise CommandError(f"{directory} holds a {kind} adapter; only OFT adapters can be merged.")


def load_dense(model_class: Any, source: Path) -> Any:
    """The model in the dtypes that it is stored in, whose weights are pages of the mapped files until they are changed.

    Raises:
        CommandError: a weight is missing, which transformers would initialize with random numbers.
    """
    model, loaded = model_class.from_pretrained(
        str(source), dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    if missing := sorted(loaded["missing_keys"]):
        others = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CommandError(f"{source} lacks weights of {model_class.__name__}: {', '.join(missing[:5])}{others}.")
    return model


@contextmanager
def silenced(quiet: bool) -> Iterator[None]:
    """Without transformers' and the hub's progress bars, messages and deprecations, if `quiet`."""
    if not quiet:
        yield
        return
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    bars, verbosity, hub_bars = (
        logging.is_progress_bar_enabled(),
        logging.get_verbosity(),
        not are_progress_bars_disabled(),
    )
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("ignore", category)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value == int(value) else value


def bits(text: str) -> float:
    """The value of `--nbits`."""
    value = _number(text)
    if value not in Quantizer.SUPPORTED_BITS:
        raise argparse.ArgumentTypeError(f"must be one of {Quantizer.SUPPORTED_BITS}, got {text}")
    return value


def positive(text: str) -> int:
    """A positive integer."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def into(text: str) -> float | str:
    """The value of `--into`."""
    return text if text == "dense" else bits(text)


def override(text: str) -> tuple[str, dict[str, float] | None]:
    """The name and settings of an `--override`."""
    name, _, settings = text.partition("=")
    if not name or not settings:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SETTINGS")
    if settings == "dense":
        return name, None
    try:
        return name, {key: _number(value) for key, value in (pair.split(":") for pair in settings.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{settings!r} must be 'dense' or like nbits:8,group_size:32") from None
