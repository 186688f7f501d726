"""How HQQ packs levels: names and widths of its packings, packing and unpacking."""

from __future__ import annotations

import torch
from torch import Tensor

# HQQ's name of a packing -> width of one stored level in bits. 5- and 6-bit levels are stored as 8, 1.58-bit as 2.
PACKING_BITS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}
# Levels in one packed element: a byte, or for 3 bits an int32 word of ten.
LEVELS_PER_ELEMENT = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """Levels `[rows, columns]` from packed elements: one band of rows per field, the first in the highest bits."""
    fields = LEVELS_PER_ELEMENT[bits]
    mask = 2**bits - 1
    bands = [(packed >> (bits * (fields - 1 - field))) & mask for field in range(fields)]
    return torch.cat(bands)[:rows]


def pack(levels: Tensor, bits: int) -> Tensor:
    """Packed elements from levels `[rows, columns]`: the inverse of `unpack`, rows past the last band's end are 0."""
    fields = LEVELS_PER_ELEMENT[bits]
    rows = -(-levels.shape[0] // fields)
    packed = levels.new_zeros(rows, levels.shape[1], dtype=torch.int32 if bits == 3 else torch.uint8)
    for band in levels.to(packed.dtype).split(rows):
        packed <<= bits
        packed[: band.shape[0]] |= band
    return packed << bits * (fields - len(levels.split(rows)))
