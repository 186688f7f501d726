"""Preconditions of the operations: what arguments are valid, and errors that say what is wrong with the others.

What is checked depends on dtypes, shapes and devices, so an operation checks once for all calls that share a plan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .packing import LEVELS_PER_ELEMENT
from .weight import QuantizedWeight


def nothing(*args: Any) -> None:
    """No precondition: the operation is called with what another one was given or returned."""


def cayley(
    v: Tensor, block_size: int, terms: int | None, keep: Tensor | None, max_norm: float | None, dtype: torch.dtype
) -> None:
    """Of `cayley`."""
    skew(v, block_size, terms, keep)
    same_device(v=v, keep=keep)


def project_(v: Tensor, max_norm: float) -> None:
    """Of `project_`."""
    floating("v", v)
    if v.dim() != 2 or not max_norm > 0:
        raise ValueError(f"v must have two dimensions and max_norm be positive, got {tuple(v.shape)} and {max_norm}.")


def rotate(x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool) -> None:
    """Of `rotate`."""
    rotation(x.shape[-1], d, adapter_index, x.shape[0])
    same_device(x=x, d=d, adapter_index=adapter_index)


def dequantize_rotate(weight: QuantizedWeight, d: Tensor, dtype: torch.dtype) -> None:
    """Of `dequantize_rotate`."""
    rotation(weight.in_features, d, None, 0)
    same_device(weight=weight.packed, d=d)


def linear(
    x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, adapter_index: Tensor | None
) -> None:
    """Of `linear`."""
    features(x, weight.in_features)
    _bias(bias, weight.out_features)
    if d is not None:
        rotation(weight.in_features, d, adapter_index, x.shape[0])
    elif adapter_index is not None:
        raise ValueError("adapter_index requires d, the adapters' stacked rotations.")
    same_device(x=x, d=d, weight=weight.packed, bias=bias, adapter_index=adapter_index)


def quantize(
    w: Tensor,
    levels: int,
    bits: int,
    group_size: int,
    axis: int,
    round_zero: bool,
    iterations: int,
    dtype: torch.dtype,
    errors: Tensor | None,
) -> None:
    """Of `quantize`."""
    floating("w", w)
    if w.dim() != 2 or w.numel() == 0:
        raise ValueError(f"w must be a matrix that is not empty, got shape {tuple(w.shape)}.")
    if bits not in LEVELS_PER_ELEMENT or not 2 <= levels <= 2**bits:
        raise ValueError(
            f"bits must be one of {sorted(LEVELS_PER_ELEMENT)} and levels from 2 to 2^bits; got bits={bits}, "
            f"levels={levels}."
        )
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 or 1, got {axis}.")
    if group_size < 1 or w.numel() % group_size:
        raise ValueError(f"group_size must divide the {w.shape[0]}x{w.shape[1]} weights, got {group_size}.")
    packable(w.numel() // group_size if axis == 1 else group_size, bits)
    if iterations < 0 or not dtype.is_floating_point:
        raise ValueError(f"iterations must be 0 or more and dtype floating, got {iterations} and {dtype}.")
    if errors is not None and (errors.dtype != torch.float64 or tuple(errors.shape) != (iterations,)):
        raise ValueError(
            f"errors must be a float64 tensor of shape ({iterations},), got {errors.dtype} {tuple(errors.shape)}."
        )
    same_device(w=w, errors=errors)


def packable(rows: int, bits: int) -> None:
    """Rows of levels fill whole elements; words of ten 3-bit levels may have room for more."""
    fields = LEVELS_PER_ELEMENT[bits]
    if bits != 3 and rows % fields:
        raise ValueError(f"{rows} rows of levels cannot be packed {fields} per byte; choose another group_size.")


def floating(name: str, value: Tensor) -> None:
    """A tensor is floating point."""
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {value.dtype}; cast it first.")


def skew(v: Tensor, block_size: int, terms: int | None, keep: Tensor | None) -> None:
    """Skew-symmetric parameters and the settings of the map."""
    floating("v", v)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}.")
    elements = block_size * (block_size - 1) // 2
    if v.dim() != 2 or v.shape[1] != elements:
        raise ValueError(
            f"v must have shape [stored blocks, {elements}] for block_size={block_size}, got {tuple(v.shape)}."
        )
    if terms is not None and terms < 1:
        raise ValueError(f"terms must be at least 1, or None for the exact Cayley map; got {terms}.")
    if keep is not None and (keep.dtype != torch.bool or keep.dim() != 1 or v.shape[0] not in (1, keep.shape[0])):
        raise ValueError(
            f"keep must be a bool tensor with one entry per block, for {v.shape[0]} stored blocks; got {keep.dtype} "
            f"{tuple(keep.shape)}."
        )


def rotation(features: int, d: Tensor, adapter_index: Tensor | None, rows: int) -> None:
    """A rotation `D` fits so many features, and the index of adapters so many rows."""
    floating("d", d)
    dims = 3 if adapter_index is None else 4
    if d.dim() != dims or d.shape[-1] != d.shape[-2] or d.shape[-1] == 0:
        layout = "[blocks, b, b]" if dims == 3 else "[adapters, blocks, b, b], as adapter_index is given"
        raise ValueError(f"d must have shape {layout}; got {tuple(d.shape)}.")
    blocks, block_size = d.shape[-3], d.shape[-1]
    if features % block_size or blocks not in (1, features // block_size):
        raise ValueError(
            f"d must rotate {features} features with blocks that divide them, one per position or one shared; got "
            f"{blocks} blocks of {block_size}."
        )
    if adapter_index is not None and (adapter_index.dtype != torch.int64 or tuple(adapter_index.shape) != (rows,)):
        raise ValueError(
            f"adapter_index must be an int64 tensor of shape ({rows},), one entry per row of x; got "
            f"{adapter_index.dtype} {tuple(adapter_index.shape)}."
        )


def index(d: Tensor | None, adapter_index: Tensor | None) -> None:
    """The index of adapters is within -1 ... A - 1; not checked on a GPU, where reading it would synchronize."""
    if d is None or adapter_index is None or not adapter_index.is_cpu or adapter_index.numel() == 0:
        return
    least, most = torch.aminmax(adapter_index)
    if least < -1 or most >= d.shape[0]:
        raise ValueError(
            f"adapter_index must be from -1, for no adapter, to {d.shape[0] - 1}, as d stacks {d.shape[0]} of them; "
            f"got {int(least)} to {int(most)}."
        )


def features(x: Tensor, in_features: int) -> None:
    """An input has so many features."""
    floating("x", x)
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x must have shape [..., {in_features}], got {tuple(x.shape)}.")


def _bias(bias: Tensor | None, out_features: int) -> None:
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}.")


def same_device(**tensors: Tensor | None) -> None:
    """All tensors are on one device."""
    # With a meta tensor among its arguments an operator would run its fake kernel, which returns no values.
    devices = [tensor.device for tensor in tensors.values() if tensor is not None]
    if devices.count(devices[0]) < len(devices):
        given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
        places = ", ".join(f"{name} is on {device}" for name, device in given.items())
        raise ValueError(f"all tensors must be on one device: {places}.")
