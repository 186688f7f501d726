"""Read and write safetensors files. Headers are validated before anything is allocated.

A file consists of the header length (8 bytes, little-endian), the header (a JSON object that maps each name to
`{"dtype", "shape", "data_offsets"}`) and the bytes of the tensors
(https://github.com/huggingface/safetensors#format). Tensors are read and written one at a time.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 << 20  # bytes; the limit of the format
_MAX_DIMENSIONS = 16


class CheckpointError(ValueError):
    """A file of a saved model is damaged, truncated or invalid; the message names the file and the tensor."""


@dataclass(frozen=True)
class Entry:
    """Header entry of one tensor, validated against the file size."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        """Stored size in bytes."""
        return self.end - self.begin


class TensorFile:
    """A safetensors file, open for reading.

    Attributes:
        path: path of the file.
        entries: header entries by tensor name.

    Raises:
        CheckpointError: the file is truncated, or its header is invalid for a file of this size.
        OSError: the file can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        try:
            size = path.stat().st_size
            header, self._start = self._header(size)
            self.entries = {name: self._entry(name, value, size - self._start) for name, value in header.items()}
            self._check_layout(size - self._start)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read(self, name: str) -> Tensor:
        """Read a tensor into newly allocated host memory.

        Raises:
            CheckpointError: the file was truncated after it was opened.
        """
        entry = self.entries[name]
        data = torch.empty(entry.bytes, dtype=torch.uint8)
        self._file.seek(self._start + entry.begin)
        if self._file.readinto(_bytes(data)) != entry.bytes:
            raise self._error(name, "the file ends before the end of the tensor")
        return data.view(entry.dtype).reshape(entry.shape)

    def _error(self, name: str | None, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}." if name is None else f"{self.path}: tensor {name!r}: {why}.")

    def _header(self, size: int) -> tuple[dict[str, Any], int]:
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise self._error(None, f"truncated, or not a safetensors file: the header does not fit in {size} bytes")
        if length > MAX_HEADER:
            raise self._error(None, f"the header length is {length} bytes; at most {MAX_HEADER} are accepted")
        try:
            header = json.loads(self._file.read(length).decode(), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise self._error(None, f"the header is not valid JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._error(None, "the header is not a JSON object")
        header.pop("__metadata__", None)
        return header, 8 + length

    def _entry(self, name: str, value: Any, available: int) -> Entry:
        if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
            raise self._error(name, "its header entry lacks dtype, shape or data_offsets")
        if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
            raise self._error(name, f"dtype {value['dtype']!r} is not one of {', '.join(DTYPES)}")
        shape, offsets = value["shape"], value["data_offsets"]
        if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
            raise self._error(name, f"shape {str(shape)[:80]} is not a list of at most {_MAX_DIMENSIONS} sizes")
        if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= available:
            raise self._error(
                name,
                f"data_offsets {str(offsets)[:80]} are outside the {available} bytes of data: truncated or damaged",
            )
        dtype, (begin, end) = DTYPES[value["dtype"]], offsets
        needed = math.prod(shape) * dtype.itemsize
        if end - begin != needed:
            raise self._error(name, f"{end - begin} bytes are stored, but {value['dtype']} {shape} requires {needed}")
        return Entry(dtype, tuple(shape), begin, end)

    def _check_layout(self, available: int) -> None:
        """Check that the tensors cover the data section exactly, without overlaps or gaps."""
        reached = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != reached:
                raise self._error(name, f"it begins at byte {entry.begin}, expected {reached}")
            reached = entry.end
        if reached != available:
            raise self._error(None, f"the header covers {reached} of {available} bytes of data")


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("duplicate key")
    return result


def crc32(tensor: Tensor) -> int:
    """CRC-32 of the tensor's bytes in row-major order; the tensor must be in host memory."""
    return zlib.crc32(_bytes(tensor))


def write(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write a new safetensors file.

    Args:
        path: path of the file, which must not exist.
        tensors: tensors by name, on any device. They may be non-contiguous or share storage; each is written in full.

    Returns:
        The `crc32` of each tensor.

    Raises:
        TypeError: safetensors does not support the dtype of a tensor.
        OSError: the file exists, or can't be written.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"tensor {name!r}: safetensors does not support {tensor.dtype}.")
    # Sort by decreasing element size, so that every tensor is aligned to its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    sums = {}
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            host = tensors[name].detach().cpu()
            file.write(_bytes(host))
            sums[name] = crc32(host)
    return sums


def _bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor as a buffer; a copy if the tensor is not contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
