"""Every operation in plain PyTorch: the specification that the other backends are tested against.

Written to be read without knowledge of kernels. Half-precision inputs are upcast to float32 for everything except the
two large matrix products, which run in the input's dtype as in a dense layer. Symbols: tokens M,
in-features K, out-features N, block size b, blocks B = K / b, adapters A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import Planner
from .quantizer import quantize
from .weight import QuantizedWeight


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 if any input has it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


# --- Cayley ----------------------------------------------------------------------------------------------------------


def skew(v: Tensor, block_size: int) -> Tensor:
    """Skew-symmetric blocks `[B, b, b]` whose strict upper triangles, row by row, are `v` `[B, b(b-1)/2]`."""
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=v.device)
    upper = v.new_zeros(v.shape[0], block_size, block_size)
    upper[:, rows, columns] = v
    return upper - upper.transpose(1, 2)


def project(v: Tensor, max_norm: float) -> Tensor:
    """Scale each row of `v` so that its skew block's Frobenius norm, sqrt(2)*|v|, is at most `max_norm`.

    Norms are float64 and may exceed the bound by the rounding error of v's dtype, so that projecting is idempotent.
    """
    wide = v.double()
    norm = (2 * wide.square().sum(dim=1, keepdim=True)).sqrt()
    inside = norm <= max_norm * (1 + torch.finfo(v.dtype).eps)
    return torch.where(inside, v, (wide * (max_norm / norm)).to(v.dtype))


def project_(v: Tensor, max_norm: float) -> None:
    """`project` in place, as constrained OFT does with its parameter `v` `[S, b(b-1)/2]` before a training forward."""
    v.copy_(project(v, max_norm))


def series_coefficients(terms: int) -> list[int]:
    """Coefficients of Q, Q^2, ... in `D = R - I` for PEFT's Cayley-Neumann series of `terms` terms.

    PEFT (0.18 and later) sums I + 2Q + ... + 2Q^(n-2) + Q^(n-1); three terms are the same as four, one term gives I and
    two give I + 2Q.
    """
    if terms < 3:
        return [2] * (terms - 1)
    terms = max(terms, 4)
    return [2] * (terms - 2) + [1]


def cayley(
    v: Tensor, block_size: int, terms: int | None, keep: Tensor | None, max_norm: float | None, dtype: torch.dtype
) -> Tensor:
    """`D = R - I` from skew parameters: the Cayley-Neumann series, or for `terms=None` the Cayley map.

    The series is R = I + 2Q + 2Q^2 + ... (see `series_coefficients`); the Cayley map is PEFT's R = (I - Q)(I + Q)^-1,
    that is D = -2Q(I + Q)^-1.

    Args:
        v: `[S, b(b-1)/2]` with S the number of stored blocks: B, or 1 if all positions share one.
        block_size: b.
        terms: number of series terms, at least 1; None for the exact map.
        keep: bool `[B]`; False replaces a block's rotation with the identity. None keeps all.
        max_norm: bound on each skew block's Frobenius norm (`project`), or None.
        dtype: of the result.

    Returns:
        `[S, b, b]`, or `[B, b, b]` if `keep` is given.
    """
    v = v.to(wide_dtype(v.dtype))
    if max_norm is not None:
        v = project(v, max_norm)
    q = skew(v, block_size)
    if terms is None:
        identity = torch.eye(block_size, dtype=q.dtype, device=q.device)
        d = torch.linalg.solve(identity + q, -2 * q, left=False)
    else:
        d = torch.zeros_like(q)
        power = q
        for k, coefficient in enumerate(series_coefficients(terms)):
            power = power @ q if k else q
            d = d + coefficient * power
    if keep is not None:
        d = torch.where(keep[:, None, None], d, torch.zeros_like(d))
    return d.to(dtype).contiguous()


def cayley_backward(
    grad: Tensor, v: Tensor, block_size: int, terms: int | None, keep: Tensor | None, max_norm: float | None
) -> Tensor:
    """Gradient with respect to `v` `[S, b(b-1)/2]` of `cayley`, from `grad` = dL/dD.

    Series: reverse recurrence over the powers, with P_k = Q^k and c_k their coefficients: g_k = c_k G + g_{k+1} Q^T and
    dQ = g_1 + sum_k P_k^T g_{k+1}. Exact map: dQ = -1/2 (R + I)^T G (R + I)^T. Then dv_jk = dQ_jk - dQ_kj. The
    projection to `max_norm` uses a straight-through gradient, as in PEFT, which projects the parameter in place.
    """
    wide = wide_dtype(v.dtype)
    grad = grad.to(wide)
    if keep is not None:
        grad = torch.where(keep[:, None, None], grad, torch.zeros_like(grad))
    if grad.shape[0] != v.shape[0]:  # one stored block, broadcast to all positions by `keep`
        grad = grad.sum(dim=0, keepdim=True)
    v_wide = v.to(wide)
    if max_norm is not None:
        v_wide = project(v_wide, max_norm)
    q = skew(v_wide, block_size)
    if terms is None:
        identity = torch.eye(block_size, dtype=wide, device=q.device)
        d = torch.linalg.solve(identity + q, -2 * q, left=False)
        outer = (d + 2 * identity).transpose(1, 2)
        dq = -0.5 * (outer @ grad @ outer)
    else:
        coefficients = series_coefficients(terms)
        powers = [q]
        for _ in coefficients[2:]:
            powers.append(powers[-1] @ q)
        dq = torch.zeros_like(q)
        if coefficients:
            dp = coefficients[-1] * grad
            for k in range(len(coefficients) - 1, 0, -1):
                dq = dq + powers[k - 1].transpose(1, 2) @ dp
                dp = coefficients[k - 1] * grad + dp @ q.transpose(1, 2)
            dq = dq + dp
    rows, columns = torch.triu_indices(block_size, block_size, 1, device=v.device)
    return (dq[:, rows, columns] - dq[:, columns, rows]).to(v.dtype)


# --- Rotation --------------------------------------------------------------------------------------------------------


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """`[M, K]` seen as blocks `[B, M, b]`."""
    return x.reshape(x.shape[0], x.shape[1] // block_size, block_size).transpose(0, 1)


def rotate(x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool) -> Tensor:
    """`x + x * blockdiag(D)`, or with `transpose` `x + x * blockdiag(D)^T`, in the dtype of `x`.

    Args:
        x: `[M, K]`.
        d: `[B, b, b]`, or `[1, b, b]` for one block shared by all; with `adapter_index` `[A, B or 1, b, b]`.
        adapter_index: int64 `[M]`, which of the A adapters each row gets; -1 leaves a row unchanged.
        transpose: rotate by the transposed blocks.
    """
    if adapter_index is not None:
        out = x.clone(memory_format=torch.contiguous_format)
        for adapter in range(d.shape[0]):
            rows = (adapter_index == adapter).nonzero().squeeze(1)
            out[rows] = rotate(x[rows], d[adapter], None, transpose)
        return out
    wide = wide_dtype(x.dtype)
    blocks = d.to(wide).transpose(1, 2) if transpose else d.to(wide)
    x_wide = x.to(wide)
    delta = _blocks(x_wide, d.shape[-1]) @ blocks
    return (x_wide + delta.transpose(0, 1).reshape(x.shape)).to(x.dtype).contiguous()


def rotate_backward(
    grad: Tensor, x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool, need_x: bool, need_d: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `rotate`: `dx = g + g * D^T` and `dD_i = x_i^T g_i` (both transposed with `transpose`).

    Returns:
        dx `[M, K]` in the dtype of `grad`, and dD shaped as `d` in float32 or float64. What is not needed comes back
        empty.
    """
    dx = rotate(grad, d, adapter_index, not transpose) if need_x else grad.new_empty(0)
    wide = wide_dtype(x.dtype, d.dtype)
    if not need_d:
        return dx, d.new_empty(0, dtype=wide)
    if adapter_index is not None:
        per_adapter = []
        for adapter in range(d.shape[0]):
            rows = (adapter_index == adapter).nonzero().squeeze(1)
            per_adapter.append(rotate_backward(grad[rows], x[rows], d[adapter], None, transpose, False, True)[1])
        return dx, torch.stack(per_adapter)
    left, right = (grad, x) if transpose else (x, grad)
    dd = _blocks(left.to(wide), d.shape[-1]).transpose(1, 2) @ _blocks(right.to(wide), d.shape[-1])
    if d.shape[0] == 1:
        dd = dd.sum(dim=0, keepdim=True)
    return dx, dd


# --- Weights ---------------------------------------------------------------------------------------------------------


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """`W = (level - zero) * scale`, `[N, K]`, computed wide and rounded once to `dtype`."""
    return weight.dense(dtype)


def dequantize_rotate(weight: QuantizedWeight, d: Tensor, dtype: torch.dtype) -> Tensor:
    """`W * R^T = W + W * blockdiag(D)^T`, `[N, K]`: the weight with the rotation of its input folded in."""
    dense = weight.dense(wide_dtype(weight.scale.dtype, dtype))
    return rotate(dense, d, None, True).to(dtype)


def linear(
    x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, adapter_index: Tensor | None
) -> Tensor:
    """`y = x * blockdiag(R) * W^T + bias`, `[M, N]` in the dtype of `x`; no rotation if `d` is None."""
    if d is not None:
        x = rotate(x, d, adapter_index, False)
    return F.linear(x, weight.dense(x.dtype), None if bias is None else bias.to(x.dtype))


def linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    d: Tensor | None,
    adapter_index: Tensor | None,
    need_x: bool,
    need_d: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `linear`: `g = dy * W`, then those of `rotate` at (x, g).

    Returns:
        dx `[M, K]` in the dtype of `grad`, and dD shaped as `d` in float32 or float64. Results that are not needed are
        empty.
    """
    g = grad @ weight.dense(grad.dtype)
    if d is None:
        return g, g.new_empty(0)
    return rotate_backward(g, x, d, adapter_index, False, need_x, need_d)


_ALL = (
    cayley,
    cayley_backward,
    project_,
    rotate,
    rotate_backward,
    dequantize,
    dequantize_rotate,
    linear,
    linear_backward,
    quantize,
)
OPERATIONS: dict[str, Planner] = {
    function.__name__: lambda by_name, *args, function=function: function for function in _ALL
}
