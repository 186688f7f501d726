"""Tile choice as data: `kernels/configs/<device>.json`, or `default.json` where a device has no table.

A table maps an operation to entries with the largest M each is meant for; the entry nearest to M from above (the last
one, beyond it) is taken. `regimes` holds the boundaries between the ways to run an operation. Nothing is tuned at run
time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from hqq_oft.device_tables import own_table

from ._launch import device_name


@dataclass(frozen=True)
class Tile:
    """One choice: tile sizes, and how many warps and pipeline stages run it.

    Attributes:
        m: the largest M this is meant for.
        bm: rows of x, tokens.
        bn: rows of the weight, out-features.
        bk: columns, in-features.
        warps: of 32 threads.
        stages: of the software pipeline over the loop.
    """

    m: int
    bm: int
    bn: int
    bk: int
    warps: int
    stages: int


_changes: dict[str, Any] = {}


@contextmanager
def using(changes: dict[str, Any]) -> Iterator[None]:
    """Entries in place of every device's own, for tuning: an operation's tiles, or `regimes`."""
    global _changes
    before, _changes = _changes, _changes | changes
    _forget()
    try:
        yield
    finally:
        _changes = before
        _forget()


def _forget() -> None:
    for cached in (table, tiles, _choose):
        cached.cache_clear()


@functools.lru_cache
def table(device: str) -> dict[str, Any]:
    """The table of a device, with the default's operations where it lacks them."""
    return own_table("default") | own_table(device) | _changes


@functools.lru_cache
def tiles(device: str, operation: str) -> tuple[Tile, ...]:
    """All entries of an operation, by rising M.

    Raises:
        ValueError: the table's entry for the operation is malformed.
    """
    names = {field.name for field in fields(Tile)}
    entries = table(device)[operation]
    for entry in entries:
        if set(entry) != names:
            raise ValueError(f"a tile of {operation!r} for {device!r} must have {sorted(names)}, got {sorted(entry)}.")
    return tuple(sorted((Tile(**entry) for entry in entries), key=lambda tile: tile.m))


@functools.lru_cache
def _choose(device: str, operation: str, m: int) -> Tile:
    entries = tiles(device, operation)
    return next((tile for tile in entries if m <= tile.m), entries[-1])


def choose(tensor: Tensor, operation: str, m: int) -> Tile:
    """The tile for `m` rows on the tensor's device."""
    return _choose(device_name(tensor), operation, m)


def regime(tensor: Tensor, boundary: str) -> int:
    """A boundary between two ways to run an operation on the tensor's device."""
    return int(table(device_name(tensor))["regimes"][boundary])
