"""How HQQ packs levels: names and widths of its packings, packing and unpacking."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# HQQ's name of a packing -> width of one stored level in bits. 5- and 6-bit levels are stored as 8, 1.58-bit as 2.
PACKING_BITS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}
# Levels in one packed element: a byte, or for 3 bits an int32 word of ten.
LEVELS_PER_ELEMENT = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Levels `[rows, columns]` from packed elements: one band of rows per field, the first in the highest bits."""
    return unpack_rows(packed, bits, 0, rows)


def unpack_rows(packed: Tensor, bits: int, first: int, last: int) -> Tensor:
    """Rows `first` to `last` of the levels."""
    return torch.cat([(rows >> shift) & (2**bits - 1) for rows, shift, _ in _fields(packed, bits, first, last)])


def set_rows(packed: Tensor, bits: int, first: int, levels: Tensor) -> None:
    """Set rows `first` and following of the levels in `packed` to `levels`, integers."""
    for rows, shift, of_levels in _fields(packed, bits, first, first + levels.shape[0]):
        rows &= ~((2**bits - 1) << shift) & (2**30 - 1 if bits == 3 else 255)
        rows |= levels[of_levels].to(packed.dtype) << shift


def _fields(packed: Tensor, bits: int, first: int, last: int) -> Iterator[tuple[Tensor, int, slice]]:
    """Where rows `first` to `last` of the levels are: rows of `packed`, the shift of their field, which levels."""
    rows, begin = packed.shape[0], first
    while begin < last:
        field = begin // rows
        end = min(last, (field + 1) * rows)
        shift = bits * (LEVELS_PER_ELEMENT[bits] - 1 - field)
        yield packed[begin - field * rows : end - field * rows], shift, slice(begin - first, end - first)
        begin = end


def pack(levels: Tensor, bits: int) -> Tensor:
    """Packed elements from levels `[rows, columns]`: the inverse of `unpack`, rows past the last band's end are 0."""
    fields = LEVELS_PER_ELEMENT[bits]
    rows = -(-levels.shape[0] // fields)
    packed = levels.new_zeros(rows, levels.shape[1], dtype=torch.int32 if bits == 3 else torch.uint8)
    for band in levels.to(packed.dtype).split(rows):
        packed <<= bits
        packed[: band.shape[0]] |= band
    return packed << bits * (fields - len(levels.split(rows)))
