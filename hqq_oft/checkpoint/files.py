"""Access by name to the tensors of a saved model, in one or more safetensors files.

`save_quantized` also writes `hqq_oft.json`, which contains the format version and a checksum of every tensor.
Directories written by transformers do not have this file and are read without verifying checksums.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
}
SINGLE, INDEX, MANIFEST, CONFIG = "model.safetensors", "model.safetensors.index.json", "hqq_oft.json", "config.json"
QMODEL = "qmodel.pt"  # what HQQ's own save_quantized writes
FORMAT_VERSION = 1
_MAX_JSON = 64 << 20  # bytes


class CheckpointError(ValueError):
    """A file of a saved model is damaged, truncated or invalid; the message names the file and the tensor."""


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


class TensorSource(ABC):
    """Tensors by name, which are validated before they are used."""

    @abstractmethod
    def error(self, name: str, why: str) -> CheckpointError:
        """Create, but do not raise, an error about the tensor `name`."""

    @abstractmethod
    def _header(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor; reads no data."""

    @abstractmethod
    def _data(self, name: str) -> Tensor:
        """The tensor `name`, which exists."""

    def expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        """Check shape and dtype of a tensor without reading its data.

        Raises:
            CheckpointError: the tensor is missing or has a different shape or dtype.
        """
        dtype, found = self._header(name)
        if found != shape:
            raise self.error(name, f"its shape is {list(found)}, expected {list(shape)}")
        if dtype not in dtypes:
            raise self.error(name, f"its dtype is {dtype}, expected {' or '.join(map(str, dtypes))}")

    def read(self, name: str, max_bytes: int | None = None) -> Tensor:
        """Read a tensor, of a `Checkpoint` into host memory.

        Raises:
            CheckpointError: the tensor is missing, larger than `max_bytes` or damaged.
        """
        dtype, shape = self._header(name)
        size = math.prod(shape) * dtype.itemsize
        if max_bytes is not None and size > max_bytes:
            raise self.error(name, f"{size} bytes are too many, at most {max_bytes} are accepted")
        return self._data(name)


class LoadedTensors(TensorSource):
    """Tensors that are in memory already.

    Args:
        tensors: the tensors by name.
        where: what the errors name beside the tensor, such as the file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self._tensors, self._where = tensors, where

    def error(self, name: str, why: str) -> CheckpointError:
        """Create, but do not raise, an error about the tensor `name`."""
        return CheckpointError(f"{self._where}: tensor {name!r}: {why}.")

    def _header(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        if name not in self._tensors:
            raise self.error(name, "missing")
        return self._tensors[name].dtype, tuple(self._tensors[name].shape)

    def _data(self, name: str) -> Tensor:
        return self._tensors[name]


class Checkpoint(TensorSource):
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
            self._files: dict[str, tuple[Path, Any]] = {}
            for path, names in self._listed().items():
                try:
                    # Not mapped into memory: reading a mapped file that another process truncates kills this one.
                    file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                except SafetensorError as error:
                    raise CheckpointError(f"{path}: truncated, damaged or not a safetensors file ({error}).") from None
                found = set(file.keys())
                if names is not None and names != found:
                    odd = sorted(names ^ found)[0]
                    raise CheckpointError(f"{path}: tensor {odd!r}: not in both the file and {INDEX}.")
                self._files.update(dict.fromkeys(found, (path, file)))
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
        where = self._files[name][0] if name in self._files else self.directory
        return CheckpointError(f"{where}: tensor {name!r}: {why}.")

    def _header(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor, which safetensors has compared with the size of the file; reads no data."""
        if name not in self._files:
            raise self.error(name, "missing")
        entry = self._files[name][1].get_slice(name)
        if entry.get_dtype() not in DTYPES:
            raise self.error(name, f"dtype {entry.get_dtype()} is not one of {', '.join(DTYPES)}")
        return DTYPES[entry.get_dtype()], tuple(entry.get_shape())

    def _data(self, name: str) -> Tensor:
        try:
            tensor: Tensor = self._files[name][1].get_tensor(name)
        except SafetensorError as error:
            raise self.error(name, f"truncated or damaged after the file was opened ({error})") from error
        if self._sums is not None and crc32(tensor) != self._sums[name]:
            raise self.error(name, "damaged: its checksum does not match")
        return tensor


def crc32(tensor: Tensor) -> int:
    """CRC-32 of the tensor's bytes in row-major order; the tensor must be in host memory."""
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _is_file_name(value: Any) -> bool:
    """Whether `value` is a plain file name. Paths are rejected, so that no file outside the directory is opened."""
    return isinstance(value, str) and re.fullmatch(r"[\w.-]+\.safetensors", value) is not None


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int, version: str) -> None:
    """Write tensors into an empty directory: safetensors files, their index if there are several, and the manifest.

    Args:
        directory: the empty directory to write to.
        tensors: tensors by name, on any device. One file's tensors at a time are copied to host memory.
        max_shard_bytes: maximum size of the tensors in one file; a larger tensor gets its own file.
        version: version of this package, stored in the manifest.

    Raises:
        TypeError: the dtype of a tensor is not supported.
        OSError: a file can't be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise TypeError(f"tensor {name!r}: {tensor.dtype} can't be stored; accepted are {', '.join(DTYPES)}.")
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_bytes)
    sums: dict[str, int] = {}
    for file, names in split.filename_to_tensors.items():
        shard = {name: tensors[name].detach().cpu().contiguous() for name in names}
        sums.update({name: crc32(tensor) for name, tensor in shard.items()})
        _write(directory / file, shard)
    if split.is_sharded:
        _write_json(directory / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    _write_json(
        directory / MANIFEST, {"format_version": FORMAT_VERSION, "written_by": f"hqq_oft {version}", "crc32": sums}
    )


def _write(path: Path, shard: dict[str, Tensor]) -> None:
    """Write a new safetensors file of contiguous tensors in host memory."""
    owners: dict[int, str] = {}
    for name, tensor in shard.items():
        if owners.setdefault(tensor.untyped_storage().data_ptr(), name) != name:
            shard[name] = tensor.clone()  # safetensors refuses tensors that share memory
    path.touch(exist_ok=False)
    mode = path.stat().st_mode
    try:
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors makes files that only their owner can read
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.EIO
        raise OSError(number, os.strerror(number)) from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
