"""The operations of `hqq_oft.ops.reference` on compiled kernels.

On the CPU the product has two paths. For few rows, and with the bfloat16 dot product for any number, the packed weight
is decoded in registers (`linear` and `linear_transposed` of the library). Otherwise W is decoded into a bounded scratch
buffer, chunk by chunk, and multiplied by the vendor's GEMM; as a CPU is bound by arithmetic, this path rotates
whichever of x [M, K] and W [N, K] has fewer rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqq_oft._config import cpu_instruction_set, scratch_bytes
from hqq_oft.ops.backends import Unsupported
from hqq_oft.ops.native import cuda

_lib: Any = torch.ops.hqq_oft_native
_CPU_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16))
# Largest M for decoding in registers in float32: above it, decoding the weight once into a scratch buffer is faster.
_FEW_ROWS = 16
# Larger chunks do not make the GEMM faster. They exceed the last-level cache, and the allocator returns them to the
# system when freed, so that the next one causes a page fault per 4 KiB.
_CHUNK_BYTES = 8 * 2**20


def load(library: Path) -> None:
    """Load the shared library and select the instruction set named by `HQQ_OFT_CPU_ISA`.

    Raises:
        ValueError: this processor or this build does not support that instruction set.
    """
    torch.ops.load_library(str(library))
    wanted = cpu_instruction_set()
    if wanted != "auto":
        use_instruction_set(wanted)


def use_instruction_set(name: str) -> None:
    """Select the instruction set of the CPU kernels.

    Raises:
        ValueError: this machine has no kernels for it; the message lists the available ones.
    """
    if not _lib.select_instruction_set(name):
        raise ValueError(
            f"this machine has no CPU kernels for {name!r}; it has {_lib.instruction_sets()}. Unset HQQ_OFT_CPU_ISA to "
            "use the last."
        )


def instruction_sets() -> list[str]:
    """Names of the instruction sets available on this machine, fastest last."""
    return str(_lib.instruction_sets()).split(", ")


def instruction_set() -> str:
    """Name of the selected instruction set."""
    return str(_lib.instruction_set())


def _check(*tensors: Tensor | None) -> None:
    """Raise `Unsupported` unless all tensors are on the CPU and of a supported dtype."""
    for tensor in tensors:
        if tensor is None or (tensor.is_cpu and tensor.dtype in _CPU_DTYPES):
            continue
        if not tensor.is_cpu:
            raise Unsupported(f"these native kernels run on the CPU, and a tensor is on {tensor.device}")
        raise Unsupported(f"the native CPU kernels compute in float32, and a tensor is {tensor.dtype}")


def _check_result(dtype: torch.dtype) -> None:
    if dtype not in _CPU_DTYPES:
        raise Unsupported(f"the native CPU kernels compute in float32, and the requested dtype is {dtype}")


def _chunk(total: int, bytes_each: int) -> int:
    """Number of rows or columns of W (`bytes_each` bytes) decoded at a time: a multiple of 64 if possible."""
    fit = max(1, min(scratch_bytes(), _CHUNK_BYTES) // bytes_each)
    return min(total, fit // 64 * 64 or fit)


def _operand(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a product: on a CPU PyTorch's float16 matmul can be a thousand times slower than float32."""
    return torch.float32 if dtype == torch.float16 else dtype


# --- Cayley, rotation ------------------------------------------------------------------------------------------------


def cayley(
    v: Tensor, block_size: int, terms: int | None, keep: Tensor | None, max_norm: float | None, dtype: torch.dtype
) -> Tensor:
    """`hqq_oft.ops.reference.cayley`."""
    _check(v)
    _check_result(dtype)
    return _lib.cayley(v, block_size, terms, keep, max_norm, dtype)


def cayley_backward(
    grad: Tensor, v: Tensor, block_size: int, terms: int | None, keep: Tensor | None, max_norm: float | None
) -> Tensor:
    """`hqq_oft.ops.reference.cayley_backward`."""
    _check(grad, v)
    return _lib.cayley_backward(grad, v, block_size, terms, keep, max_norm)


def rotate(x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool) -> Tensor:
    """`hqq_oft.ops.reference.rotate`."""
    _check(x, d)
    return _lib.rotate(x, d, adapter_index, transpose)


def rotate_backward(
    grad: Tensor, x: Tensor, d: Tensor, adapter_index: Tensor | None, transpose: bool, need_x: bool, need_d: bool
) -> tuple[Tensor, Tensor]:
    """`hqq_oft.ops.reference.rotate_backward`."""
    _check(grad, x, d)
    return _lib.rotate_backward(grad, x, d, adapter_index, transpose, need_x, need_d)


# --- Weights ---------------------------------------------------------------------------------------------------------


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor, out_features: int, in_features: int, bits: int, group_size: int,
    axis: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`hqq_oft.ops.reference.dequantize`."""
    _check(scale, zero)
    _check_result(dtype)
    return _lib.dequantize(packed, scale, zero, out_features, in_features, bits, group_size, axis, dtype)


def dequantize_rotate(
    packed: Tensor, scale: Tensor, zero: Tensor, out_features: int, in_features: int, bits: int, group_size: int,
    axis: int, d: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`hqq_oft.ops.reference.dequantize_rotate`."""
    _check(scale, zero, d)
    _check_result(dtype)
    return _lib.dequantize_rotate(packed, scale, zero, out_features, in_features, bits, group_size, axis, d, dtype)


# --- Products --------------------------------------------------------------------------------------------------------


def linear(
    x: Tensor, d: Tensor | None, packed: Tensor, scale: Tensor, zero: Tensor, out_features: int, in_features: int,
    bits: int, group_size: int, axis: int, bias: Tensor | None, adapter_index: Tensor | None,
) -> Tensor:  # fmt: skip
    """`hqq_oft.ops.reference.linear`; the path is selected by M, on a GPU it is the decode kernel."""
    if x.is_cuda:
        return cuda.linear(
            x, d, packed, scale, zero, out_features, in_features, bits, group_size, axis, bias, adapter_index
        )
    _check(x, d, scale, zero, bias)
    weight = (packed, scale, zero, out_features, in_features, bits, group_size, axis)
    M = x.shape[0]
    if M <= _FEW_ROWS or _lib.multiplies_packed(x, *weight[3:]):
        return _lib.linear(x, d, *weight, bias, adapter_index)
    if d is not None and (out_features > M or adapter_index is not None):
        x, d = _lib.rotate(x, d, adapter_index, False), None
    dtype, operand = x.dtype, _operand(x.dtype)
    x = x.to(operand)
    y = x.new_empty(M, out_features)
    bias = None if bias is None else bias.to(operand)
    rows = _chunk(out_features, in_features * x.element_size())
    scratch = x.new_empty(rows, in_features)
    for first in range(0, out_features, rows):
        chunk = scratch[: min(rows, out_features - first)]
        _lib.dequantize_into(chunk, *weight, d, first, 0)
        outputs = slice(first, first + chunk.shape[0])
        if bias is None:
            torch.mm(x, chunk.t(), out=y[:, outputs])
        else:
            torch.addmm(bias[outputs], x, chunk.t(), out=y[:, outputs])
    return y.to(dtype)


def _through_scratch(
    grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, out_features: int, in_features: int, bits: int,
    group_size: int, axis: int,
) -> Tensor:  # fmt: skip
    """`dy * W` by chunks of decoded columns: chunks are never summed, so no partial sums are in half precision."""
    dy = grad.to(_operand(grad.dtype))
    g = dy.new_empty(dy.shape[0], in_features)
    columns = _chunk(in_features, out_features * dy.element_size())
    scratch = dy.new_empty(out_features * columns)
    for first in range(0, in_features, columns):
        width = min(columns, in_features - first)
        chunk = scratch[: out_features * width].view(out_features, width)
        _lib.dequantize_into(
            chunk, packed, scale, zero, out_features, in_features, bits, group_size, axis, None, 0, first
        )
        torch.mm(dy, chunk, out=g[:, first : first + width])
    return g


def linear_backward(
    grad: Tensor, x: Tensor, d: Tensor | None, packed: Tensor, scale: Tensor, zero: Tensor, out_features: int,
    in_features: int, bits: int, group_size: int, axis: int, adapter_index: Tensor | None, need_x: bool, need_d: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`hqq_oft.ops.reference.linear_backward`: `g = dy * W`, then the gradients of the rotation; dx overwrites g."""
    _check(grad, x, d, scale, zero)
    weight = (packed, scale, zero, out_features, in_features, bits, group_size, axis)
    product = _lib.linear_transposed if _lib.multiplies_packed(grad, *weight[3:]) else _through_scratch
    g = product(grad, *weight)
    if d is None:
        return g.to(grad.dtype), grad.new_empty(0)
    dd = _lib.rotate_backward(g, x, d, adapter_index, False, False, need_d)[1]
    if not need_x:
        return grad.new_empty(0), dd
    dx = g if g.dtype == grad.dtype else torch.empty_like(g, dtype=grad.dtype)
    _lib.rotate_into(g, d, adapter_index, True, dx)
    return dx, dd


OPERATIONS: dict[str, Any] = {
    "cayley": cayley,
    "cayley_backward": cayley_backward,
    "rotate": rotate,
    "rotate_backward": rotate_backward,
    "dequantize": dequantize,
    "dequantize_rotate": dequantize_rotate,
    "linear": linear,
    "linear_backward": linear_backward,
}
