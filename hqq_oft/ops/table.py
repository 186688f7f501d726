"""The package's operators: one schema per operation, registered with `torch.library`.

Each operator is opaque to autograd (`hqq_oft.ops.autograd` has the derivatives) and to `torch.compile`, which traces it
through its fake implementation. At run time `hqq_oft.ops.backends` selects the kernel. Arguments and results are
those of the functions of the same name in `hqq_oft.ops.reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import without_autocast
from .backends import dispatch
from .reference import wide_dtype

_WEIGHT = (
    "Tensor packed, Tensor scale, Tensor zero, SymInt out_features, SymInt in_features, int bits, "
    "SymInt group_size, int axis"
)
SCHEMAS = {
    "cayley": "(Tensor v, int block_size, int? terms, Tensor? keep, float? max_norm, ScalarType dtype) -> Tensor",
    "cayley_backward": "(Tensor grad, Tensor v, int block_size, int? terms, Tensor? keep, float? max_norm) -> Tensor",
    "rotate": "(Tensor x, Tensor d, Tensor? adapter_index, bool transpose) -> Tensor",
    "rotate_backward": "(Tensor grad, Tensor x, Tensor d, Tensor? adapter_index, bool transpose, bool need_x, "
    "bool need_d) -> (Tensor, Tensor)",
    "dequantize": f"({_WEIGHT}, ScalarType dtype) -> Tensor",
    "dequantize_rotate": f"({_WEIGHT}, Tensor d, ScalarType dtype) -> Tensor",
    "linear": f"(Tensor x, Tensor? d, {_WEIGHT}, Tensor? bias, Tensor? adapter_index) -> Tensor",
    "linear_backward": f"(Tensor grad, Tensor x, Tensor? d, {_WEIGHT}, Tensor? adapter_index, bool need_x, "
    "bool need_d) -> (Tensor, Tensor)",
}


def _implementation(name: str) -> Any:
    def run(tensor: Tensor, *args: Any) -> Any:
        with without_autocast(tensor.device.type):
            return dispatch(name, tensor, *args)

    return run


for _name, _schema in SCHEMAS.items():
    torch.library.define(f"hqq_oft::{_name}", _schema)
    torch.library.impl(f"hqq_oft::{_name}", "CompositeExplicitAutograd", _implementation(_name))


@torch.library.register_fake("hqq_oft::cayley")
def _(v, block_size, terms, keep, max_norm, dtype):
    blocks = v.shape[0] if keep is None else keep.shape[0]
    return v.new_empty(blocks, block_size, block_size, dtype=dtype)


@torch.library.register_fake("hqq_oft::cayley_backward")
def _(grad, v, block_size, terms, keep, max_norm):
    return v.new_empty(v.shape)


@torch.library.register_fake("hqq_oft::rotate")
def _(x, d, adapter_index, transpose):
    return x.new_empty(x.shape)


@torch.library.register_fake("hqq_oft::rotate_backward")
def _(grad, x, d, adapter_index, transpose, need_x, need_d):
    dtype = wide_dtype(x.dtype, d.dtype)
    return (
        grad.new_empty(grad.shape if need_x else 0),
        d.new_empty(d.shape if need_d else 0, dtype=dtype),
    )


@torch.library.register_fake("hqq_oft::dequantize")
def _(packed, scale, zero, out_features, in_features, bits, group_size, axis, dtype):
    return packed.new_empty(out_features, in_features, dtype=dtype)


@torch.library.register_fake("hqq_oft::dequantize_rotate")
def _(packed, scale, zero, out_features, in_features, bits, group_size, axis, d, dtype):
    return packed.new_empty(out_features, in_features, dtype=dtype)


@torch.library.register_fake("hqq_oft::linear")
def _(x, d, packed, scale, zero, out_features, in_features, bits, group_size, axis, bias, adapter_index):
    return x.new_empty(x.shape[0], out_features)


@torch.library.register_fake("hqq_oft::linear_backward")
def _(
    grad, x, d, packed, scale, zero, out_features, in_features, bits, group_size, axis, adapter_index, need_x, need_d
):
    dx = grad.new_empty((grad.shape[0], in_features) if need_x else 0)
    if d is None:
        return dx, grad.new_empty(0)
    return dx, d.new_empty(d.shape if need_d else 0, dtype=wide_dtype(x.dtype, d.dtype))


cayley = torch.ops.hqq_oft.cayley
cayley_backward = torch.ops.hqq_oft.cayley_backward
rotate = torch.ops.hqq_oft.rotate
rotate_backward = torch.ops.hqq_oft.rotate_backward
dequantize = torch.ops.hqq_oft.dequantize
dequantize_rotate = torch.ops.hqq_oft.dequantize_rotate
linear = torch.ops.hqq_oft.linear
linear_backward = torch.ops.hqq_oft.linear_backward
