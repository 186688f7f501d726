"""The operations of `hqq_oft.ops.reference` on compiled kernels.

On the CPU the product has two paths. For few rows, and with the bfloat16 dot product for any number, the packed weight
is decoded in registers (`linear` and `linear_transposed` of the library). Otherwise W is decoded into a bounded scratch
buffer, chunk by chunk, and multiplied by the vendor's GEMM; as a CPU is bound by arithmetic, this path rotates
whichever of x [M, K] and W [N, K] has fewer rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqq_oft._config import cpu_instruction_set, scratch_bytes
from hqq_oft.ops.backends import Planner, Unsupported, forget_plans
from hqq_oft.ops.native import cuda
from hqq_oft.ops.reference import project_
from hqq_oft.ops.weight import QuantizedWeight

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
    forget_plans()


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


# --- Planners --------------------------------------------------------------------------------------------------------


def plan_cayley(by_name: bool, v: Tensor, *settings: Any) -> Any:
    """Of `hqq_oft.ops.reference.cayley`."""
    _check(v)
    _check_result(settings[-1])
    return _lib.cayley


def _planner(name: str, tensors: int) -> Planner:
    """Of an operator with the operation's own arguments, the first `tensors` of which it computes with."""

    def plan(by_name: bool, *args: Any) -> Any:
        _check(*args[:tensors])
        return getattr(_lib, name)

    return plan


def plan_project_(by_name: bool, v: Tensor, max_norm: float) -> Any:
    """Of `hqq_oft.ops.reference.project_`, whose few operations need no kernel on a CPU."""
    _check(v)
    return project_


def plan_dequantize(by_name: bool, weight: QuantizedWeight, dtype: torch.dtype) -> Any:
    """Of `hqq_oft.ops.reference.dequantize`."""
    _check(weight.scale, weight.zero)
    _check_result(dtype)
    return dequantize


def plan_quantize(by_name: bool, w: Tensor, *settings: Any) -> Any:
    """Of `hqq_oft.ops.reference.quantize`."""
    _check(w)
    *_, dtype, _ = settings
    _check_result(dtype)
    return _lib.quantize


def plan_dequantize_rotate(by_name: bool, weight: QuantizedWeight, d: Tensor, dtype: torch.dtype) -> Any:
    """Of `hqq_oft.ops.reference.dequantize_rotate`."""
    _check(weight.scale, weight.zero, d)
    _check_result(dtype)
    return dequantize_rotate


def plan_linear(
    by_name: bool, x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, index: Tensor | None
) -> Any:
    """Of `hqq_oft.ops.reference.linear`: packed or through a scratch, by M; on a GPU by the decode kernel."""
    if x.is_cuda:
        return cuda.plan_linear(by_name, x, weight, d, bias, index)
    _check(x, d, weight.scale, weight.zero, bias)
    return linear_packed if x.shape[0] <= _FEW_ROWS or _multiplies_packed(x, weight) else linear_through_scratch


def plan_linear_backward(
    by_name: bool, grad: Tensor, x: Tensor, weight: QuantizedWeight, d: Tensor | None, *settings: Any
) -> Any:
    """Of `hqq_oft.ops.reference.linear_backward`."""
    _check(grad, x, d, weight.scale, weight.zero)
    return partial(linear_backward, _packed if _multiplies_packed(grad, weight) else _through_scratch)


def _multiplies_packed(x: Tensor, weight: QuantizedWeight) -> bool:
    return bool(_lib.multiplies_packed(x, *weight.arguments()[3:]))


# --- Weights ---------------------------------------------------------------------------------------------------------


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """`W`, `[N, K]`."""
    return _lib.dequantize(*weight.arguments(), dtype)


def dequantize_rotate(weight: QuantizedWeight, d: Tensor, dtype: torch.dtype) -> Tensor:
    """`W * R^T`, `[N, K]`."""
    return _lib.dequantize_rotate(*weight.arguments(), d, dtype)


# --- Products --------------------------------------------------------------------------------------------------------


def linear_packed(
    x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, adapter_index: Tensor | None
) -> Tensor:
    """The product from packed levels, decoded in registers."""
    state = vars(weight)
    handle = state.get("_kept")
    if handle is None and "_kept" in state:  # not one that the dispatcher has put together for a single call
        handle = state["_kept"] = _keep(weight)
    if handle:
        return _lib.linear_kept(x, d, handle, bias, adapter_index)
    state.setdefault("_kept", None)
    return _lib.linear(x, d, *weight.arguments(), bias, adapter_index)


def _keep(weight: QuantizedWeight) -> int:
    """The library's handle for a weight, released with it; 0 if it keeps none."""
    handle = int(_lib.keep_weight(*weight.arguments()))
    if handle:
        weakref.finalize(weight, _lib.release_weight, handle).atexit = False
    return handle


@torch.no_grad()
def linear_through_scratch(
    x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, adapter_index: Tensor | None
) -> Tensor:
    """The product by the vendor's GEMM with W decoded into a scratch, chunk by chunk of rows."""
    M, N = x.shape[0], weight.out_features
    if d is not None and (N > M or adapter_index is not None):
        x, d = _lib.rotate(x, d, adapter_index, False), None
    dtype, operand = x.dtype, _operand(x.dtype)
    x = x.to(operand)
    y = x.new_empty(M, N)
    bias = None if bias is None else bias.to(operand)
    rows = _chunk(N, weight.in_features * x.element_size())
    scratch = x.new_empty(rows, weight.in_features)
    for first in range(0, N, rows):
        chunk = scratch[: min(rows, N - first)]
        _lib.dequantize_into(chunk, *weight.arguments(), d, first, 0)
        outputs = slice(first, first + chunk.shape[0])
        if bias is None:
            torch.mm(x, chunk.t(), out=y[:, outputs])
        else:
            torch.addmm(bias[outputs], x, chunk.t(), out=y[:, outputs])
    return y.to(dtype)


def _packed(grad: Tensor, weight: QuantizedWeight) -> Tensor:
    """`dy * W` from packed levels."""
    return _lib.linear_transposed(grad, *weight.arguments())


@torch.no_grad()
def _through_scratch(grad: Tensor, weight: QuantizedWeight) -> Tensor:
    """`dy * W`, chunk by chunk of decoded columns: each is a whole product, and nothing is summed in half precision."""
    dy = grad.to(_operand(grad.dtype))
    N, K = weight.shape
    g = dy.new_empty(dy.shape[0], K)
    columns = _chunk(K, N * dy.element_size())
    scratch = dy.new_empty(N * columns)
    for first in range(0, K, columns):
        width = min(columns, K - first)
        chunk = scratch[: N * width].view(N, width)
        _lib.dequantize_into(chunk, *weight.arguments(), None, 0, first)
        torch.mm(dy, chunk, out=g[:, first : first + width])
    return g


def linear_backward(
    product: Callable[[Tensor, QuantizedWeight], Tensor],
    grad: Tensor,
    x: Tensor,
    weight: QuantizedWeight,
    d: Tensor | None,
    adapter_index: Tensor | None,
    need_x: bool,
    need_d: bool,
) -> tuple[Tensor, Tensor]:
    """`g = dy * W` by the product given, then the gradients of the rotation, dx in place of g."""
    handle = vars(weight).get("_kept")
    if handle and need_x and need_d and d is not None and product is _packed:
        return _lib.linear_backward_kept(grad, x, d, handle, adapter_index)
    g = product(grad, weight)
    if d is None:
        return g.to(grad.dtype), grad.new_empty(0)
    if not need_x:
        return grad.new_empty(0), _lib.rotate_backward(g, x, d, adapter_index, False, False, need_d)[1]
    if not need_d:
        return _lib.rotate(g, d, adapter_index, True).to(grad.dtype), d.new_empty(0, dtype=torch.float32)
    dd = _lib.rotate_backward_in_place(g, x, d, adapter_index)
    return g.to(grad.dtype), dd


OPERATIONS: dict[str, Planner] = {
    "cayley": plan_cayley,
    "cayley_backward": _planner("cayley_backward", 2),
    "project_": plan_project_,
    "rotate": _planner("rotate", 2),
    "rotate_backward": _planner("rotate_backward", 3),
    "dequantize": plan_dequantize,
    "dequantize_rotate": plan_dequantize_rotate,
    "linear": plan_linear,
    "linear_backward": plan_linear_backward,
    "quantize": plan_quantize,
}
