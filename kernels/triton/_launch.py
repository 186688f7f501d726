"""What the launchers share: which calls Triton serves, on which device they run, how outputs are made."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft import backends
from hqq_oft.backends import Unsupported
from hqq_oft.device_tables import table_name

INTERPRETED = bool(triton.knobs.runtime.interpret)
# The interpreter has no multiprocessors; this many make it split sums as a GPU does.
_INTERPRETED_MULTIPROCESSORS = 8


def check_device(tensor: Tensor) -> None:
    """Raise `Unsupported` where Triton has no business with the tensor."""
    kind = tensor.device.type
    if kind == "cuda":
        if torch.version.hip is None and _properties(tensor.device.index).major < 8:
            raise Unsupported("the Triton kernels need compute capability 8.0 (Ampere) or later")
        if tensor.dtype == torch.float64:
            raise Unsupported("the Triton kernels compute in float32 on a GPU, and the input is float64")
        return
    if kind != "cpu":
        raise Unsupported(f"the Triton kernels run on CUDA and ROCm devices, and the tensor is on {tensor.device}")
    if not INTERPRETED:
        raise Unsupported(
            "the tensor is on the CPU; Triton needs a GPU (or its interpreter: TRITON_INTERPRET=1 before Python starts)"
        )
    if backends.selected_backend() == "auto":
        raise Unsupported("on the CPU Triton only interprets its kernels, for tests: ask for it by name")


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launch on the tensor's device, on its current stream."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised output. All of them are made here, so that tests can fill them with NaN."""
    return like.new_empty(shape, dtype=dtype or like.dtype)


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` with unit stride in its last dimension; its rows may be apart."""
    return x if x.stride(-1) == 1 else x.contiguous()


def wide(*dtypes: torch.dtype) -> Any:
    """The dtype that kernels compute in: float64 where any input has it, else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def operand(*dtypes: torch.dtype) -> Any:
    """The dtype of a product's operands: that of all where they agree, else the wider one."""
    if len(set(dtypes)) == 1:
        return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtypes[0], wide(*dtypes))
    return wide(*dtypes)


def float32_precision() -> str:
    """Three TF32 products in place of a float32 one: all but its last bits (2^-21), on tensor cores.

    Without them the compiler keeps whole operands in registers and spills. Where there are none: float32 products.
    """
    return "ieee" if INTERPRETED or torch.version.hip is not None else "tf32x3"


def product_precision(operands: Any) -> str:
    """How products of such operands are computed: one TF32 product only where the user allowed it for matrix products.

    16-bit operands have exact products, to which this does not apply.
    """
    if operands != tl.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else float32_precision()


@functools.lru_cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def multiprocessors(tensor: Tensor) -> int:
    """Number of multiprocessors of the tensor's device."""
    if not tensor.is_cuda:
        return _INTERPRETED_MULTIPROCESSORS
    return int(_properties(tensor.device.index).multi_processor_count)


def device_name(tensor: Tensor) -> str:
    """Name of the tensor's device, as the files of tuned tiles are named: `nvidia_h100_80gb_hbm3`."""
    return table_name(_properties(tensor.device.index).name if tensor.is_cuda else "interpreter")


def split_buffers(like: Tensor, splits: int, shape: tuple[int, int], tiles: int) -> tuple[Tensor, Tensor]:
    """What `_pieces.sum_splits` needs: room for the parts, and a zero for each tile. Nothing where nothing is split."""
    if splits == 1:
        return like, like
    part = empty(like, (splits, *shape), torch.promote_types(like.dtype, torch.float32))
    return part, torch.zeros(tiles, dtype=torch.int32, device=like.device)


def splits_for(programs: int, steps: int, tensor: Tensor, most: int = 16) -> int:
    """Into how many parts, a power of two, to split a sum of `steps` so that `programs` tiles fill the device twice."""
    splits = 1
    while splits < most and programs * splits < 2 * multiprocessors(tensor) and 4 * splits <= steps:
        splits *= 2
    return splits
