"""Access by name to the tensors of a saved model, in one or more safetensors files.

`save_quantized` also writes `hqq_oft.json`, which contains the format version and a checksum of every tensor.
Directories written by transformers do not have this file and are read without verifying checksums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .safetensors_file import CheckpointError, Entry, TensorFile, crc32, write

SINGLE, INDEX, MANIFEST, CONFIG = "model.safetensors", "model.safetensors.index.json", "hqq_oft.json", "config.json"
FORMAT_VERSION = 1
_MAX_JSON = 64 << 20  # bytes


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of limited size.

    Raises:
        CheckpointError: the file is too large or not a JSON object.
        OSError: the file is missing or can't be read.
    """
    if path.stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{path}: larger than {_MAX_JSON} bytes.")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    return value


class Checkpoint:
    """The tensors in a directory, open for reading.

    Attributes:
        directory: the model directory.
        has_checksums: whether `read` verifies checksums.

    Raises:
        FileNotFoundError: the directory contains no model.
        CheckpointError: a file is damaged, truncated or missing, or the files are inconsistent.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with ExitStack() as stack:
            self._files: dict[str, TensorFile] = {}
            for path, names in self._listed().items():
                file = stack.enter_context(TensorFile(path))
                if names is not None and names != file.entries.keys():
                    odd = sorted(names ^ file.entries.keys())[0]
                    raise CheckpointError(f"{path}: tensor {odd!r}: not in both the file and {INDEX}.")
                self._files.update(dict.fromkeys(file.entries, file))
            self._sums = self._checksums()
            self._stack = stack.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    @property
    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._files.keys()

    @property
    def has_checksums(self) -> bool:
        """Whether `read` verifies checksums."""
        return self._sums is not None

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def _listed(self) -> dict[Path, set[str] | None]:
        """The files, each with the tensor names that the index lists for it; None without an index."""
        index = self.directory / INDEX
        if not index.is_file():
            single = self.directory / SINGLE
            if not single.is_file():
                raise FileNotFoundError(f"{self.directory} contains neither {SINGLE} nor {INDEX}: no saved model.")
            return {single: None}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map must be an object that maps tensors to files.")
        files: dict[Path, set[str] | None] = {}
        for name, file in weight_map.items():
            if not _is_file_name(file):
                raise CheckpointError(f"{index}: tensor {name!r}: {str(file)[:80]!r} is not a *.safetensors file name.")
            path = self.directory / file
            if not path.is_file():
                raise CheckpointError(f"{index}: tensor {name!r}: the file {file} is missing.")
            names = files.setdefault(path, set())
            assert names is not None
            names.add(name)
        return files

    def _checksums(self) -> dict[str, int] | None:
        path = self.directory / MANIFEST
        if not path.is_file():
            return None
        manifest = read_json(path)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: format_version is {version!r}; this hqq_oft reads {FORMAT_VERSION}. For a "
                "newer format install a newer hqq_oft."
            )
        sums = manifest.get("crc32")
        if not isinstance(sums, dict) or not all(type(value) is int for value in sums.values()):
            raise CheckpointError(f"{path}: crc32 must be an object that maps tensors to checksums.")
        if sums.keys() != self._files.keys():
            odd = sorted(sums.keys() ^ self._files.keys())[0]
            raise CheckpointError(f"{path}: tensor {odd!r}: not in both this file and the safetensors files.")
        return sums

    def error(self, name: str, why: str) -> CheckpointError:
        """Create, but do not raise, an error about the tensor `name`."""
        where = self._files[name].path if name in self._files else self.directory
        return CheckpointError(f"{where}: tensor {name!r}: {why}.")

    def entry(self, name: str) -> Entry:
        """Header entry of a tensor (dtype, shape, byte range); reads no data.

        Raises:
            CheckpointError: the tensor is missing.
        """
        if name not in self._files:
            raise self.error(name, "missing")
        return self._files[name].entries[name]

    def expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        """Check shape and dtype of a tensor without reading its data.

        Raises:
            CheckpointError: the tensor is missing or has a different shape or dtype.
        """
        entry = self.entry(name)
        if entry.shape != shape:
            raise self.error(name, f"its shape is {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in dtypes:
            raise self.error(name, f"its dtype is {entry.dtype}, expected {' or '.join(map(str, dtypes))}")

    def read(self, name: str) -> Tensor:
        """Read a tensor into host memory.

        Raises:
            CheckpointError: the tensor is missing or its checksum does not match.
        """
        self.entry(name)
        tensor = self._files[name].read(name)
        if self._sums is not None and crc32(tensor) != self._sums[name]:
            raise self.error(name, "damaged: its checksum does not match")
        return tensor


def _is_file_name(value: Any) -> bool:
    """Whether `value` is a plain file name. Paths are rejected, so that no file outside the directory is opened."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+\.safetensors", value) is not None


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int, version: str) -> None:
    """Write tensors into an empty directory: safetensors files, their index if there are several, and the manifest.

    Args:
        directory: the empty directory to write to.
        tensors: tensors by name, on any device; written in this order.
        max_shard_bytes: maximum size of the tensors in one file; a larger tensor gets its own file.
        version: version of this package, stored in the manifest.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    many = len(shards)
    files = [SINGLE] if many == 1 else [f"model-{i + 1:05}-of-{many:05}.safetensors" for i in range(many)]
    sums: dict[str, int] = {}
    for file, shard in zip(files, shards, strict=True):
        sums.update(write(directory / file, shard))
    if many > 1:
        total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(
        directory / MANIFEST, {"format_version": FORMAT_VERSION, "written_by": f"hqq_oft {version}", "crc32": sums}
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
