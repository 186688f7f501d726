"""A float64 oracle, independent of PEFT, HQQ and this package: unpacks bit by bit, builds dense rotations."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def levels(packed: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """Levels `[rows, columns]`: element [i, j] of band k holds row k * bands + i, the first band in the high bits."""
    per_element = 10 if bits == 3 else 8 // bits
    band = packed.shape[0]
    out = np.zeros((band * per_element, packed.shape[1]))
    for field in range(per_element):
        for bit in range(bits):
            shift = bits * (per_element - 1 - field) + bit
            out[field * band : (field + 1) * band] += ((packed.astype(np.int64) >> shift) & 1) * 2.0**bit
    return out[:rows]


def weight(
    packed: Tensor, scale: Tensor, zero: Tensor, shape: tuple[int, int], bits: int, group: int, axis: int
) -> Tensor:
    """`W` `[N, K]`, element by element: flat index e of W is in group e // g (axis 1) or e mod groups (axis 0)."""
    n, k = shape
    groups = n * k // group
    rows = groups if axis == 1 else group
    flat = levels(packed.numpy(), bits, rows).reshape(-1)
    index = np.arange(n * k)
    of_group = index // group if axis == 1 else index % groups
    s = scale.double().numpy().reshape(-1)[of_group]
    z = zero.double().numpy().reshape(-1)[of_group]
    return torch.from_numpy(((flat - z) * s).reshape(n, k))


def of_layer(layer: torch.nn.Module) -> Tensor:
    """`weight` of an `HQQLinear` in its plain form."""
    meta = layer.meta
    bits = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}[meta["packing"]]
    packed = layer.W_q.detach()
    if meta["view_as_float"]:
        packed = packed.view(torch.int32 if bits == 3 else torch.uint8)
    return weight(packed, meta["scale"], meta["zero"], tuple(meta["shape"]), bits, meta["group_size"], meta["axis"])


def block(v: Tensor, b: int, terms: int | None) -> Tensor:
    """One rotation `[b, b]` from its skew parameters, differentiable; `terms=None` is (I - Q)(I + Q)^-1."""
    q = torch.zeros(b, b, dtype=torch.float64)
    entry = 0
    for i in range(b):
        width = b - 1 - i
        row = torch.nn.functional.pad(v[entry : entry + width].double(), (i + 1, 0))
        q = q + torch.nn.functional.pad(row[None], (0, 0, i, b - 1 - i))
        entry += width
    q = q - q.T
    identity = torch.eye(b, dtype=torch.float64)
    if terms is None:
        return (identity - q) @ torch.linalg.inv(identity + q)
    if terms == 1:
        return identity
    if terms == 2:
        return identity + 2 * q
    last = max(terms, 4) - 1
    r = identity
    for power in range(1, last):
        r = r + 2 * torch.linalg.matrix_power(q, power)
    return r + torch.linalg.matrix_power(q, last)


def rotation(v: Tensor, b: int, features: int, terms: int | None, max_norm: float | None = None) -> Tensor:
    """The dense `[K, K]` rotation, differentiable in the (projected) `v`."""
    if max_norm is not None:
        norms = (2 * v.double().square().sum(1, keepdim=True)).sqrt()
        v = torch.where(norms <= max_norm, v.double(), v.double() * max_norm / norms)
    blocks = [block(row, b, terms) for row in v]
    if len(blocks) == 1:
        blocks = blocks * (features // b)
    return torch.block_diag(*blocks)
