"""Shared by the launchers: which calls Triton supports, the launch device, output allocation, precision, splits."""

from __future__ import annotations

import functools
import logging
import secrets
import subprocess
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hqq_oft.ops.backends import Unsupported
from hqq_oft.ops.device_tables import table_name

logger = logging.getLogger("hqq_oft")

INTERPRETED = bool(triton.knobs.runtime.interpret)
# Whether kernels may contain inline assembly.
PTX = not INTERPRETED and torch.version.hip is None
# Of this process's arrivals at tiles (`split_buffers`): 48 bits that memory holds by chance only, then 16 zeros.
_STAMP = (secrets.randbits(46) | 1 << 46) << 16
_LARGEST_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)
# Assumed under the interpreter, which has no multiprocessors, so that it splits sums as a GPU would.
_INTERPRETED_MULTIPROCESSORS = 8


def check_device(tensor: Tensor, by_name: bool) -> None:
    """Raise `Unsupported` if Triton cannot run on the tensor's device or in its dtype.

    Args:
        tensor: an argument of the call.
        by_name: whether the user selected Triton, not `auto`.
    """
    kind = tensor.device.type
    if kind == "cuda":
        if torch.version.hip is None and _properties(tensor.device.index).major < 8:
            raise Unsupported("the Triton kernels need compute capability 8.0 (Ampere) or later")
        if tensor.dtype == torch.float64:
            raise Unsupported("the Triton kernels compute in float32 on a GPU, but the input is float64")
        failure = None if INTERPRETED else launcher_failure()
        if failure is not None:
            raise Unsupported(failure)
        return
    if kind != "cpu":
        raise Unsupported(f"the Triton kernels run on CUDA and ROCm devices, but the tensor is on {tensor.device}")
    if not INTERPRETED:
        raise Unsupported(
            "the tensor is on the CPU; Triton needs a GPU (or its interpreter: TRITON_INTERPRET=1 before Python starts)"
        )
    if not by_name:
        raise Unsupported("on the CPU Triton only interprets its kernels, for tests: select it explicitly")


@functools.lru_cache
def launcher_failure() -> str | None:
    """Why Triton cannot launch anything in this process; None if it can.

    Triton compiles the C code that talks to the driver at its first use, or finds it in its cache.
    """
    try:
        _ = triton.runtime.driver.active.utils
    except (RuntimeError, OSError, AssertionError, subprocess.SubprocessError) as error:
        reason = f"Triton cannot build its launcher ({error}): install gcc and Python's headers, or set CC"
        logger.warning("hqq_oft runs without its Triton kernels: %s", reason)
        return reason
    return None


class Launch:
    """One kernel with its grid and constants, compiled at the first call; later ones skip Triton's argument binder.

    All calls must have arguments of the same dtypes, integer values and pointer alignment, which a plan guarantees.

    Args:
        kernel: a `triton.jit` function whose constants follow its other parameters.
        grid: number of programs in up to three dimensions.
        operands: dtype of the operands of its products, whose precision the user may change at any time.
        **constants: its `tl.constexpr` parameters, and Triton's options.

    Raises:
        Unsupported: the grid is larger than a GPU accepts.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], operands: Any = None, **constants: Any) -> None:
        self._kernel, self._grid, self._operands = kernel, grid + (1,) * (3 - len(grid)), operands
        if any(size > limit for size, limit in zip(self._grid, _LARGEST_GRID, strict=True)):
            raise Unsupported(f"a grid of {self._grid} programs is too large: a GPU accepts {_LARGEST_GRID}")
        self._constants = {"enable_fp_fusion": True, **constants}
        # Precision, compiled kernel and the constants that it takes as arguments: replaced as one, for other threads.
        self._ready: tuple[str | None, Any, tuple[Any, ...]] | None = None

    def __call__(self, *args: Any) -> None:
        """Launch on the device of the first argument, a tensor, on its current stream."""
        device = args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(device.index, args)
        else:
            self._launch(device.index, args)

    def _launch(self, device: int | None, args: tuple[Any, ...]) -> None:
        precision = None if self._operands is None else product_precision(self._operands)
        ready = self._ready
        if ready is not None and ready[0] == precision:
            stream = triton.runtime.driver.active.get_current_stream(device or 0)
            ready[1](*args, *ready[2], stream=stream)
            return
        constants = self._constants if precision is None else {**self._constants, "PRECISION": precision}
        compiled = self._kernel[self._grid](*args, **constants)
        if compiled is not None:  # not interpreted
            rest = tuple(constants[name] for name in self._kernel.arg_names[len(args) :])
            self._ready = (precision, compiled[self._grid], rest)


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized output. All outputs are allocated here, so that tests can fill them with NaN."""
    return like.new_empty(shape, dtype=dtype or like.dtype)


def optional(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    """`tensor`, contiguous, or a placeholder pointer that the kernel never reads."""
    return placeholder if tensor is None else tensor.contiguous()


def adapters(d: Tensor | None, adapter_index: Tensor | None) -> tuple[int, int]:
    """Stride between the rotations of adapters, and their number; of one rotation for all rows, 0 and 1."""
    return (0, 1) if d is None or adapter_index is None else (d.stride(0), d.shape[0])


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` with unit stride in its last dimension; the row stride is arbitrary."""
    return x if x.stride(-1) == 1 else x.contiguous()


def wide(*dtypes: torch.dtype) -> Any:
    """The dtype that kernels compute in: float64 if any input is float64, else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def operand(*dtypes: torch.dtype) -> Any:
    """The dtype of a product's operands: the common dtype if all agree, else the accumulator dtype."""
    if len(set(dtypes)) == 1:
        return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtypes[0], wide(*dtypes))
    return wide(*dtypes)


def float32_precision() -> str:
    """Three TF32 products instead of a float32 one: on tensor cores, accurate to about 2^-21.

    Plain float32 products keep whole operands in registers and spill. Without TF32 (ROCm, interpreter): float32.
    """
    return "ieee" if INTERPRETED or torch.version.hip is not None else "tf32x3"


def product_precision(operands: Any) -> str:
    """Input precision of products of such operands: a single TF32 product only if PyTorch is set to allow TF32 matmuls.

    Not relevant for 16-bit operands, whose products are exact.
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
    """Name of the tensor's device as in the names of tile tables: `nvidia_h100_80gb_hbm3`."""
    return table_name(_properties(tensor.device.index).name if tensor.is_cuda else "interpreter")


def has_wgmma(tensor: Tensor) -> bool:
    """Whether the tensor's device multiplies by warp groups (Hopper), which fixes how operands lie in registers."""
    return tensor.is_cuda and torch.version.hip is None and _properties(tensor.device.index).major == 9


def split_buffers(like: Tensor, splits: int, shape: tuple[int, int], tiles: int) -> tuple[Tensor, int]:
    """A buffer of partial sums followed by a ticket per tile, and the stamp of arrivals, for `_pieces.sum_splits`.

    The buffer belongs to one launch and need not be initialized (`_pieces.arrive_last`): no launch clears counters, and
    launches on other streams or replays of CUDA graphs share nothing. One split needs no buffer.
    """
    if splits == 1:
        return like, _STAMP
    size = splits * shape[0] * shape[1] + 2 * tiles
    return empty(like, (size,), torch.promote_types(like.dtype, torch.float32)), _STAMP


def splits_for(programs: int, steps: int, tensor: Tensor, most: int = 16) -> int:
    """Number of splits, a power of two, of a loop of `steps` so that `programs` tiles fill the device twice."""
    splits = 1
    while splits < most and programs * splits < 2 * multiprocessors(tensor) and 4 * splits <= steps:
        splits *= 2
    return splits
