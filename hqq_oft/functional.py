"""Differentiable operations on rotations and quantized weights; arguments are validated here.

`hqq_oft.ops.autograd` defines the gradients and what is saved, `hqq_oft.ops.table` computes. Symbols: tokens M,
in-features K, out-features N, block size b, blocks B = K / b, stored blocks S (B, or 1 if all positions share one
block), adapters A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from .ops import table as ops
from .ops.autograd import Cayley, DequantizeRotate, Linear, OFTLinear, OFTRotate, Rotate
from .ops.weight import QuantizedWeight

# --- Checks ----------------------------------------------------------------------------------------------------------


def _check_floating(name: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating point tensor, got {value.dtype}; cast it first.")


def _check_cayley(v: Tensor, block_size: int, terms: int | None, keep: Tensor | None) -> None:
    _check_floating("v", v)
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


def _check_rotation(features: int, d: Tensor, adapter_index: Tensor | None, rows: int) -> None:
    _check_floating("d", d)
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


def _check_input(x: Tensor, features: int) -> None:
    _check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"x must have shape [..., {features}], got {tuple(x.shape)}.")


def _check_bias(bias: Tensor | None, out_features: int) -> None:
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias must have shape ({out_features},), got {tuple(bias.shape)}.")


def _check_devices(**tensors: Tensor | None) -> None:
    # With a meta tensor among its arguments an operator would run its fake kernel, which returns no values.
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
        places = ", ".join(f"{name} is on {device}" for name, device in given.items())
        raise ValueError(f"all tensors must be on one device: {places}.")


def _flatten(x: Tensor) -> Tensor:
    # not -1: it can't be inferred for an empty batch
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on these tensors; if not, the autograd node is skipped as overhead."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)):
        return True
    # Tangents of forward-mode differentiation: the node raises for them, the plain operator would drop them.
    return any(unpack_dual(tensor).tangent is not None for tensor in given)


# --- Public ----------------------------------------------------------------------------------------------------------


def cayley(
    v: Tensor,
    block_size: int,
    terms: int | None = 5,
    *,
    keep: Tensor | None = None,
    max_norm: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Orthogonal blocks from skew-symmetric parameters, as `D = R - I`.

    `terms=n` is the Cayley-Neumann series of PEFT 0.18 and later, R = I + 2Q + ... + 2Q^(n-2) + Q^(n-1), only
    approximately orthogonal (n=1: I; n=2: I + 2Q; n=3 is the same as n=4). `terms=None` is the exact Cayley map,
    R = (I - Q)(I + Q)^-1. Computed in float32, or float64 if `v` is float64. Differentiable in `v`.

    Args:
        v: `[S, b(b-1)/2]`, the strict upper triangle of each skew-symmetric block `Q`, row by row; any float dtype.
        block_size: b.
        terms: number of series terms, at least 1, or None.
        keep: bool `[B]`; False replaces that block's rotation with the identity (module dropout). One stored block is
            broadcast to all B positions.
        max_norm: blocks with a larger Frobenius norm are scaled down to it first (constrained OFT); the projection
            uses a straight-through gradient, as in PEFT.
        dtype: of the result; by default float32, or float64 if `v` is.

    Returns:
        D, `[S, b, b]`, or `[B, b, b]` with `keep`.

    Raises:
        TypeError: `v` is not floating point.
        ValueError: a shape or value is out of range, or the devices differ.
    """
    _check_cayley(v, block_size, terms, keep)
    _check_devices(v=v, keep=keep)
    if dtype is None:
        dtype = torch.promote_types(v.dtype, torch.float32)
    return Cayley.apply(v, keep, block_size, terms, max_norm, dtype)


def cayley_many(
    vs: Sequence[Tensor],
    block_size: int,
    terms: int | None = 5,
    *,
    max_norm: float | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`cayley` of several layers' parameters in one launch, which for small layers takes as long as for one.

    Args:
        vs: each `[S, b(b-1)/2]`, all of the same dtype and on the same device.
        block_size: as for `cayley`, the same for all.
        terms: as for `cayley`, the same for all.
        max_norm: as for `cayley`, the same for all.
        dtype: as for `cayley`, the same for all.

    Returns:
        D of each, `[S, b, b]`, as views of one tensor. Differentiable in every entry of `vs`.

    Raises:
        TypeError: an entry is not floating point.
        ValueError: `vs` is empty; dtypes or devices differ; a shape or value is out of range.
    """
    if not vs:
        raise ValueError("vs must hold at least one tensor.")
    for v in vs:
        _check_cayley(v, block_size, terms, None)
    kinds = {(str(v.dtype), str(v.device)) for v in vs}
    if len(kinds) > 1:
        raise ValueError(f"vs must have one dtype and be on one device, got {sorted(kinds)}.")
    d = cayley(torch.cat(list(vs)), block_size, terms, max_norm=max_norm, dtype=dtype)
    return list(d.split([v.shape[0] for v in vs]))


def rotate(x: Tensor, d: Tensor, *, transpose: bool = False, adapter_index: Tensor | None = None) -> Tensor:
    """`x * blockdiag(R)` as `x + x * blockdiag(D)`; with `transpose`, `x * blockdiag(R)^T`. Differentiable in both.

    Args:
        x: `[..., K]`, any float dtype; half precision is computed in float32 and rounded once.
        d: `[B, b, b]`, or `[1, b, b]` shared by all positions; with `adapter_index` `[A, B or 1, b, b]`.
        transpose: rotate by the transposed blocks.
        adapter_index: int64 `[M]` with M the product of the leading dimensions of `x`: the adapter of each row, -1 for
            none.

    Returns:
        Shape and dtype of `x`.

    Raises:
        TypeError: `x` or `d` is not floating point.
        ValueError: the shapes do not fit together, or the devices differ.
    """
    _check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [..., K], got a scalar.")
    flat = _flatten(x)
    _check_rotation(x.shape[-1], d, adapter_index, flat.shape[0])
    _check_devices(x=x, d=d, adapter_index=adapter_index)
    if _recorded(x, d):
        return Rotate.apply(flat, d, adapter_index, transpose).reshape(x.shape)
    return ops.rotate(flat, d, adapter_index, transpose).reshape(x.shape)


def dequantize(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """`W = (level - zero) * scale`, `[N, K]`, computed in float32 or wider and rounded once.

    Args:
        weight: the quantized weight; it has no gradient.
        dtype: of the result; by default that of the scale.
    """
    return ops.dequantize(*weight.arguments(), dtype or weight.scale.dtype)


def dequantize_rotate(weight: QuantizedWeight, d: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`W * blockdiag(R)^T`, `[N, K]`: the weight with the rotation of its input folded in. Differentiable in `d`.

    Args:
        weight: the quantized weight.
        d: `[B, b, b]` or `[1, b, b]`.
        dtype: of the result; by default that of the scale.

    Raises:
        TypeError: `d` is not floating point.
        ValueError: `d` does not match the weight's in-features, or is on another device.
    """
    _check_rotation(weight.in_features, d, None, 0)
    _check_devices(weight=weight.packed, d=d)
    return DequantizeRotate.apply(d, dtype or weight.scale.dtype, *weight.arguments())


def linear(
    x: Tensor,
    d: Tensor | None,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """`x * blockdiag(R) * W^T + bias`. Differentiable in `x`, `d` and `bias`.

    Args:
        x: `[..., K]`; the product is computed in its dtype.
        d: `[B, b, b]` or `[1, b, b]`; with `adapter_index` `[A, B or 1, b, b]`; None for no rotation.
        weight: the quantized weight, `[N, K]`.
        bias: `[N]` or None.
        adapter_index: int64 `[M]`, the adapter of each row of the flattened `x`, -1 for none.

    Returns:
        `[..., N]` in the dtype of `x`.

    Raises:
        TypeError: `x` or `d` is not floating point.
        ValueError: the shapes do not fit together, or the devices differ.
    """
    _check_input(x, weight.in_features)
    _check_bias(bias, weight.out_features)
    flat = _flatten(x)
    if d is not None:
        _check_rotation(weight.in_features, d, adapter_index, flat.shape[0])
    elif adapter_index is not None:
        raise ValueError("adapter_index requires d, the adapters' stacked rotations.")
    _check_devices(x=x, d=d, weight=weight.packed, bias=bias, adapter_index=adapter_index)
    if _recorded(x, d, bias):
        y = Linear.apply(flat, d, bias, adapter_index, *weight.arguments())
    else:
        y = ops.linear(flat, d, *weight.arguments(), bias, adapter_index)
    return y.reshape(*x.shape[:-1], weight.out_features)


def _check_oft(
    v: Tensor, features: int, block_size: int, terms: int | None, keep: Tensor | None, d: Tensor | None
) -> None:
    _check_cayley(v, block_size, terms, keep)
    stored = v.shape[0] if keep is None else keep.shape[0]
    if features % block_size or stored not in (1, features // block_size):
        raise ValueError(
            f"v must rotate {features} features with blocks that divide them, one per position or one shared; got "
            f"{stored} blocks of {block_size}."
        )
    if d is not None and tuple(d.shape) != (stored, block_size, block_size):
        raise ValueError(f"d must have shape {(stored, block_size, block_size)} to match v, got {tuple(d.shape)}.")


def oft_rotate(
    x: Tensor,
    v: Tensor,
    *,
    block_size: int,
    terms: int | None = 5,
    keep: Tensor | None = None,
    max_norm: float | None = None,
    d: Tensor | None = None,
) -> Tensor:
    """`rotate(x, cayley(v, ...))` that keeps only `x` and `v` for backward, not `D`.

    Args, result and errors are those of `rotate` and `cayley`, and:

    Args:
        d: precomputed `cayley(v, ...)` in the dtype of `x`; not validated. It is kept until backward, so that neither
            forward nor backward recomputes it; gradients still go to `v`.
    """
    _check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [..., K], got a scalar.")
    _check_oft(v, x.shape[-1], block_size, terms, keep, d)
    _check_devices(x=x, v=v, keep=keep, d=d)
    return OFTRotate.apply(_flatten(x), v, keep, d, block_size, terms, max_norm).reshape(x.shape)


def oft_linear(
    x: Tensor,
    v: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    block_size: int,
    terms: int | None = 5,
    keep: Tensor | None = None,
    max_norm: float | None = None,
    d: Tensor | None = None,
) -> Tensor:
    """`linear(x, cayley(v, ...), weight, bias)` that keeps only `x` and `v` for backward, not `D`.

    Args, result and errors are those of `linear` and `cayley`; `d` as for `oft_rotate`.
    """
    _check_input(x, weight.in_features)
    _check_bias(bias, weight.out_features)
    _check_oft(v, weight.in_features, block_size, terms, keep, d)
    _check_devices(x=x, v=v, weight=weight.packed, bias=bias, keep=keep, d=d)
    y = OFTLinear.apply(_flatten(x), v, bias, keep, d, block_size, terms, max_norm, *weight.arguments())
    return y.reshape(*x.shape[:-1], weight.out_features)
