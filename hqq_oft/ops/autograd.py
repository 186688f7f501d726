"""Autograd functions over `hqq_oft.ops.table`: the gradients, and what is saved for backward.

Only inputs are saved, in their own dtype, and a rotation that is small beside them: never a dense weight. All functions
have a `setup_context`, as the transforms of `torch.func` require.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import table as ops
from .weight import QuantizedWeight

# D is kept for backward if it has at most 1/8 as many elements as x; otherwise it is recomputed.
_SMALL = 8


def apply(function: type[Function], *args: Any) -> Any:
    """`function.apply(*args)`, without what that does for default arguments and transforms, which takes tens of us."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]


class Cayley(Function):
    @staticmethod
    def forward(v: Tensor, keep: Tensor | None, block_size: int, terms: Any, max_norm: Any, dtype: Any) -> Any:
        return ops.cayley(v, block_size, terms, keep, max_norm, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        v, keep, block_size, terms, max_norm, _ = inputs
        ctx.save_for_backward(v, keep)
        ctx.spec = (block_size, terms, max_norm)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        v, keep = ctx.saved_tensors
        block_size, terms, max_norm = ctx.spec
        return ops.cayley_backward(grad, v, block_size, terms, keep, max_norm), None, None, None, None, None


class Rotate(Function):
    @staticmethod
    def forward(x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool) -> Any:
        return ops.rotate(x, d, adapter_index, transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, d, adapter_index, ctx.transpose = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, d, adapter_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, d, adapter_index = ctx.saved_tensors
        need_x, need_d = ctx.needs_input_grad[:2]
        if x is None:
            return ops.rotate(grad, d, adapter_index, not ctx.transpose), None, None, None
        dx, dd = ops.rotate_backward(grad, x, d, adapter_index, ctx.transpose, need_x, need_d)
        return dx if need_x else None, dd.to(d.dtype), None, None


def rotation_of(
    v: Tensor, x: Tensor, block_size: int, terms: int | None, keep: Tensor | None, max_norm: float | None
) -> tuple[Tensor, bool]:
    """`D` of `v` in the dtype of `x`, outside of autograd, and whether it is small enough to be kept for backward."""
    with torch.no_grad():
        d = ops.cayley(v, block_size, terms, keep, max_norm, x.dtype)
    return d, v.requires_grad and not torch.compiler.is_compiling() and _SMALL * d.numel() <= x.numel()


class OFTRotate(Function):
    """`Cayley` and `Rotate` in one node, so that D is not saved: without `kept`, backward recomputes it from `v`.

    A kept `d` is stored on `ctx`, not with `save_for_backward`: gradient checkpointing compares what its two forwards
    save, and the recomputation may have no `d`.
    """

    @staticmethod
    def forward(
        x: Tensor,
        v: Tensor,
        keep: Tensor | None,
        d: Tensor,
        kept: bool,
        block_size: int,
        terms: Any,
        max_norm: Any,
    ) -> Any:
        return ops.rotate(x, d, None, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, v, keep, d, kept, *ctx.spec = inputs
        need_x, need_v = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_v else None, v if need_x or need_v else None, keep)
        ctx.d = d if kept else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, v, keep = ctx.saved_tensors
        block_size, terms, max_norm = ctx.spec
        need_x, need_v = ctx.needs_input_grad[:2]
        d, ctx.d = ctx.d, None  # autograd frees only what is saved
        if d is None:
            d = ops.cayley(v, block_size, terms, keep, max_norm, grad.dtype)
        # If v needs no gradient, x is neither saved nor read: grad is passed as a placeholder for it.
        dx, dd = ops.rotate_backward(grad, grad if x is None else x, d, None, False, need_x, need_v)
        dv = ops.cayley_backward(dd, v, block_size, terms, keep, max_norm) if need_v else None
        return dx if need_x else None, dv, None, None, None, None, None, None


class DequantizeRotate(Function):
    @staticmethod
    def forward(weight: QuantizedWeight, d: Tensor, dtype: torch.dtype) -> Any:
        return ops.dequantize_rotate(weight, d, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.weight, d, _ = inputs
        ctx.save_for_backward(d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        (d,) = ctx.saved_tensors
        weight = ops.dequantize(ctx.weight, grad.dtype)
        dd = ops.rotate_backward(grad, weight, d, None, True, False, True)[1]
        return None, dd.to(d.dtype), None


class Linear(Function):
    @staticmethod
    def forward(x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, index: Tensor | None) -> Any:
        return ops.linear(x, weight, d, bias, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.weight, d, bias, index = inputs
        need_x, _, need_d, need_bias, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_d else None, d if need_x or need_d else None, index)
        ctx.bias_dtype = bias.dtype if need_bias and bias is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, d, index = ctx.saved_tensors
        need_x, _, need_d, _, _ = ctx.needs_input_grad
        dx: Any = None
        dd: Any = None
        if need_x or need_d:
            # Where D needs no gradient, x is neither saved nor read; grad is a placeholder for it in the schema.
            dx, dd = ops.linear_backward(grad, grad if x is None else x, ctx.weight, d, index, need_x, need_d)
        dd = dd.to(d.dtype) if need_d else None
        return dx if need_x else None, None, dd, _bias_gradient(grad, ctx.bias_dtype), None


class OFTLinear(Function):
    """`Cayley` and `Linear` in one node; saved tensors and a kept `d` are handled as in `OFTRotate`."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: QuantizedWeight,
        v: Tensor,
        bias: Tensor | None,
        keep: Tensor | None,
        d: Tensor,
        kept: bool,
        block_size: int,
        terms: Any,
        max_norm: Any,
    ) -> Any:
        return ops.linear(x, weight, d, bias, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.weight, v, bias, keep, d, kept, *ctx.spec = inputs
        need_x, _, need_v, need_bias = ctx.needs_input_grad[:4]
        ctx.save_for_backward(x if need_v else None, v if need_x or need_v else None, keep)
        ctx.d = d if kept else None
        ctx.bias_dtype = bias.dtype if need_bias and bias is not None else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, v, keep = ctx.saved_tensors
        block_size, terms, max_norm = ctx.spec
        need_x, _, need_v = ctx.needs_input_grad[:3]
        dx = dv = None
        if need_x or need_v:
            d, ctx.d = ctx.d, None  # autograd frees only what is saved
            if d is None:
                d = ops.cayley(v, block_size, terms, keep, max_norm, grad.dtype)
            dx, dd = ops.linear_backward(grad, grad if x is None else x, ctx.weight, d, None, need_x, need_v)
            if need_v:
                dv = ops.cayley_backward(dd, v, block_size, terms, keep, max_norm)
        dx, dbias = dx if need_x else None, _bias_gradient(grad, ctx.bias_dtype)
        return dx, None, dv, dbias, None, None, None, None, None, None


def _bias_gradient(grad: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    return None if dtype is None else grad.sum(dim=0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(dtype)
