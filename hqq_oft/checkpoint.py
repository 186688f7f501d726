"""The tensors of a stored model, in one safetensors file or several, by name.

Beside them stands `hqq_oft.json`, which `save_quantized` writes last: the format's version and a checksum of every
tensor. Directories that transformers made have none, and are read without checksums.
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
    """The JSON object in a file of reasonable size.

    Raises:
        CheckpointError: it is none.
        OSError: the file is missing or can't be read.
    """
    if path.stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{path}: more than {_MAX_JSON} bytes.")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not the JSON it should be ({error}).") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object.")
    return value


class Checkpoint:
    """The tensors in a directory, open for reading.

    Attributes:
        directory: where they are.
        has_checksums: whether `read` compares checksums.

    Raises:
        FileNotFoundError: there is no model in the directory.
        CheckpointError: a file is damaged, truncated or missing, or the files don't agree.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with ExitStack() as stack:
            self._files: dict[str, TensorFile] = {}
            for path, names in self._listed().items():
                file = stack.enter_context(TensorFile(path))
                if names is not None and names != file.entries.keys():
                    odd = sorted(names ^ file.entries.keys())[0]
                    raise CheckpointError(f"{path}: tensor {odd!r}: it is not in both the file and {INDEX}.")
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
        """Whether `read` compares checksums."""
        return self._sums is not None

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __len__(self) -> int:
        return len(self._files)

    def _listed(self) -> dict[Path, set[str] | None]:
        """The files, each with the names that the index says it holds; None without an index."""
        index = self.directory / INDEX
        if not index.is_file():
            single = self.directory / SINGLE
            if not single.is_file():
                raise FileNotFoundError(f"{self.directory} holds neither {SINGLE} nor {INDEX}: no model is there.")
            return {single: None}
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: weight_map is not an object of tensor -> file.")
        files: dict[Path, set[str] | None] = {}
        for name, file in weight_map.items():
            if not _is_file_name(file):
                raise CheckpointError(f"{index}: tensor {name!r}: {str(file)[:80]!r} is no file name *.safetensors.")
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
                f"{path}: format_version is {version!r}; this hqq_oft reads {FORMAT_VERSION}. For a higher "
                "one install a newer hqq_oft."
            )
        sums = manifest.get("crc32")
        if not isinstance(sums, dict) or not all(type(value) is int for value in sums.values()):
            raise CheckpointError(f"{path}: crc32 is not an object of tensor -> checksum.")
        if sums.keys() != self._files.keys():
            odd = sorted(sums.keys() ^ self._files.keys())[0]
            raise CheckpointError(f"{path}: tensor {odd!r}: it is not in both this file and the safetensors files.")
        return sums

    def error(self, name: str, why: str) -> CheckpointError:
        """An error about the tensor `name`, to be raised."""
        where = self._files[name].path if name in self._files else self.directory
        return CheckpointError(f"{where}: tensor {name!r}: {why}.")

    def entry(self, name: str) -> Entry:
        """What is known of a tensor without reading it.

        Raises:
            CheckpointError: it is missing.
        """
        if name not in self._files:
            raise self.error(name, "missing")
        return self._files[name].entries[name]

    def expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        """Check a tensor without reading it.

        Raises:
            CheckpointError: it is missing, or of another shape or dtype.
        """
        entry = self.entry(name)
        if entry.shape != shape:
            raise self.error(name, f"its shape is {list(entry.shape)}, and should be {list(shape)}")
        if entry.dtype not in dtypes:
            raise self.error(name, f"its dtype is {entry.dtype}, and should be {' or '.join(map(str, dtypes))}")

    def read(self, name: str) -> Tensor:
        """A tensor, in host memory.

        Raises:
            CheckpointError: it is missing, or its bytes are not those that were written.
        """
        self.entry(name)
        tensor = self._files[name].read(name)
        if self._sums is not None and crc32(tensor) != self._sums[name]:
            raise self.error(name, "damaged: its checksum is not that of what was written")
        return tensor


def _is_file_name(value: Any) -> bool:
    """Whether an index may name that file: no path, so that nothing outside its directory is opened."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+\.safetensors", value) is not None


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int, version: str) -> None:
    """Write tensors into an empty directory: safetensors files, their index if there are several, and the manifest.

    Args:
        directory: where to.
        tensors: by name, on any device; files are filled in this order.
        max_shard_bytes: of one file's tensors; a larger tensor gets a file of its own.
        version: of this package, for the manifest.
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
