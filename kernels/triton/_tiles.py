"""Tile selection from tables: `kernels/configs/<device>.json`, or `default.json` for a device without one.

A table maps an operation to entries, each valid up to its `m`; the entry with the smallest `m >= M` is used, or the
last one if M exceeds all. `regimes` holds the M from which W goes through scratch to the vendor's GEMM:
`scratch_from_m` in the forward, `backward_scratch_from_m` in the backward. There is no autotuning at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from hqq_oft.ops.backends import forget_plans
from hqq_oft.ops.device_tables import own_table

from ._launch import device_name


@dataclass(frozen=True)
class Tile:
    """Launch configuration: tile sizes, number of warps and of pipeline stages.

    Attributes:
        m: the largest M this is used for.
        bm: rows of x, tokens.
        bn: rows of the weight, out-features.
        bk: columns, in-features.
        warps: number of warps.
        stages: number of software pipeline stages.
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
    """Override entries of every device's table, for tuning: an operation's tiles, or `regimes`."""
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
    forget_plans()


@functools.lru_cache
def table(device: str) -> dict[str, Any]:
    """The table of a device, completed with the default's entries."""
    return own_table("default") | own_table(device) | _changes


@functools.lru_cache
def tiles(device: str, operation: str) -> tuple[Tile, ...]:
    """All entries of an operation, in ascending order of `m`.

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


def largest(tensor: Tensor, operation: str) -> int:
    """The number of rows that the operation's last tile on the tensor's device is for."""
    return tiles(device_name(tensor), operation)[-1].m


def regime(tensor: Tensor, boundary: str) -> int:
    """A threshold between two implementations of an operation on the tensor's device."""
    return int(table(device_name(tensor))["regimes"][boundary])
