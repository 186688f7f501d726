"""Differentiable operations on rotations and quantized weights; arguments are validated here.

`hqq_oft.ops.autograd` defines the gradients and what is saved, `hqq_oft.ops.table` computes. Symbols: tokens M,
in-features K, out-features N, block size b, blocks B = K / b, stored blocks S (B, or 1 if all positions share one
block), adapters A.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .ops import checks
from .ops import table as ops
from .ops.autograd import Cayley, DequantizeRotate, Linear, OFTLinear, OFTRotate, Rotate, apply, rotation_of
from .ops.weight import QuantizedWeight


def _flatten(x: Tensor) -> Tensor:
    dims = x.dim()
    return x if dims == 2 else x.flatten(0, -2) if dims > 2 else x.unsqueeze(0)


def _recorded(*tensors: Tensor | None) -> bool:
    """Whether autograd records operations on these tensors; if not, the autograd node is skipped as overhead."""
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    # Tangents of forward-mode differentiation: the node raises for them, the plain operator would drop them.
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors
    )


# --- Public ----------------------------------------------------------------------------------------------------------


def cayley(
    v: Tensor,
    block_size: int,
    terms: int | None = None,
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
    checks.floating("v", v)
    if dtype is None:
        dtype = torch.promote_types(v.dtype, torch.float32)
    if _recorded(v):
        return apply(Cayley, v, keep, block_size, terms, max_norm, dtype)
    return ops.cayley(v, block_size, terms, keep, max_norm, dtype)


def cayley_many(
    vs: Sequence[Tensor],
    block_size: int,
    terms: int | None = None,
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
        checks.skew(v, block_size, terms, None)
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
            none. Any other value is a ValueError on the CPU; on a GPU, where checking would synchronize, the row gets
            none.

    Returns:
        Shape and dtype of `x`.

    Raises:
        TypeError: `x` or `d` is not floating point.
        ValueError: the shapes do not fit together, or the devices differ.
    """
    _check_rotatable(x)
    flat = _flatten(x)
    if _recorded(x, d):
        return apply(Rotate, flat, d, adapter_index, transpose).view(x.shape)
    return ops.rotate(flat, d, adapter_index, transpose).view(x.shape)


def _check_rotatable(x: Tensor) -> None:
    checks.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape [..., K], got a scalar.")


def dequantize(weight: QuantizedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """`W = (level - zero) * scale`, `[N, K]`, computed in float32 or wider and rounded once.

    Args:
        weight: the quantized weight; it has no gradient.
        dtype: of the result; by default that of the scale.
    """
    return ops.dequantize(weight, dtype or weight.scale.dtype)


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
    return apply(DequantizeRotate, weight, d, dtype or weight.scale.dtype)


def linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    d: Tensor | None = None,
    adapter_index: Tensor | None = None,
) -> Tensor:
    """`x * blockdiag(R) * W^T + bias`. Differentiable in `x`, `d` and `bias`.

    Args:
        x: `[..., K]`; the product is computed in its dtype.
        weight: the quantized weight, `[N, K]`.
        bias: `[N]` or None.
        d: `[B, b, b]` or `[1, b, b]`; with `adapter_index` `[A, B or 1, b, b]`; None for no rotation.
        adapter_index: int64 `[M]`, the adapter of each row of the flattened `x`, -1 for none; as for `rotate`.

    Returns:
        `[..., N]` in the dtype of `x`.

    Raises:
        TypeError: `x` or `d` is not floating point.
        ValueError: the shapes do not fit together, or the devices differ.
    """
    checks.features(x, weight.in_features)
    flat = _flatten(x)
    if _recorded(x, d, bias):
        y = apply(Linear, flat, weight, d, bias, adapter_index)
    else:
        y = ops.linear(flat, weight, d, bias, adapter_index)
    return y if flat is x else y.view(*x.shape[:-1], weight.out_features)


def _check_oft(
    v: Tensor, features: int, block_size: int, terms: int | None, keep: Tensor | None, d: Tensor | None
) -> None:
    checks.skew(v, block_size, terms, keep)
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
    terms: int | None = None,
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
    _check_rotatable(x)
    _check_oft(v, x.shape[-1], block_size, terms, keep, d)
    checks.same_device(x=x, v=v, keep=keep, d=d)
    flat, kept = _flatten(x), d is not None
    if d is None:
        d, _ = rotation_of(v, flat, block_size, terms, keep, max_norm)
    return apply(OFTRotate, flat, v, keep, d, kept, block_size, terms, max_norm).reshape(x.shape)


def oft_linear(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None = None,
    *,
    v: Tensor,
    block_size: int,
    terms: int | None = None,
    keep: Tensor | None = None,
    max_norm: float | None = None,
    d: Tensor | None = None,
) -> Tensor:
    """`linear(x, weight, bias, d=cayley(v, ...))` that keeps `x` and `v` for backward, and `D` only if it is small.

    Args, result and errors are those of `linear` and `cayley`; `d` as for `oft_rotate`.
    """
    checks.features(x, weight.in_features)
    _check_oft(v, weight.in_features, block_size, terms, keep, d)
    checks.same_device(x=x, v=v, weight=weight.packed, bias=bias, keep=keep, d=d)
    flat, kept = _flatten(x), d is not None
    if d is None:
        d, kept = rotation_of(v, flat, block_size, terms, keep, max_norm)
    y = apply(OFTLinear, flat, weight, v, bias, keep, d, kept, block_size, terms, max_norm)
    return y if flat is x else y.view(*x.shape[:-1], weight.out_features)
