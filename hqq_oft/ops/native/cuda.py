"""`linear` of the native CUDA decode kernel (csrc/cuda): up to 16 tokens, one launch, HQQ's own layout.

With `auto` it is only used where it was measured to be faster than the Triton kernel on the current device: the entry
`native_decode` of `kernels/configs/<device>.json` maps bits to the largest number of tokens for which that holds. If
selected by name it runs every call that it supports.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from hqq_oft.ops.backends import Unsupported
from hqq_oft.ops.device_tables import own_table, table_name
from hqq_oft.ops.packing import LEVELS_PER_ELEMENT
from hqq_oft.ops.weight import QuantizedWeight

_MOST_TOKENS = {8: 16, 4: 16, 3: 8, 2: 16, 1: 16}  # by bits: `max_tokens` of csrc/cuda/layout.h
_GROUP_UNIT = 32  # of csrc/cuda/layout.h
_BLOCK_UNIT = 16  # columns of one matrix instruction
_ALIGNMENT = 16  # bytes of one copy of packed levels


@functools.lru_cache
def measured_tokens(device: str, bits: int) -> int:
    """The largest M at which this kernel was measured to be faster than Triton's on a device; 0 if not measured.

    Args:
        device: name of the device's table, for example `nvidia_h100_80gb_hbm3`.
        bits: width of one level.
    """
    return int(own_table(device).get("native_decode", {}).get(str(bits), 0))


@functools.lru_cache
def _device(index: int) -> tuple[str, tuple[int, int]]:
    """The name of a device's table, and its compute capability."""
    return table_name(torch.cuda.get_device_name(index)), torch.cuda.get_device_capability(index)


@functools.lru_cache
def has_kernels() -> bool:
    """Whether the library was built with its CUDA part."""
    return hasattr(torch.ops.hqq_oft_native, "decode")


def check_device(x: Tensor, bits: int, by_name: bool) -> None:
    """Raise `Unsupported` if the kernel can't run here, or under `auto` is not known to be worth it."""
    if not x.is_cuda or torch.version.hip is not None:
        raise Unsupported(f"the native decode kernel runs on CUDA devices, and the tensor is on {x.device}")
    if not has_kernels():
        raise Unsupported("this build of hqq_oft has no CUDA kernels: install it with `nvcc` 12.0 or later")
    name, capability = _device(x.device.index)
    if capability < (8, 0):
        raise Unsupported("the native decode kernel requires compute capability 8.0 (Ampere) or later")
    if not by_name and x.shape[0] > measured_tokens(name, bits):
        raise Unsupported(
            f"the native decode kernel was not measured to be faster on this device at {bits} bits and "
            f"{x.shape[0]} tokens"
        )


def check_call(x: Tensor, weight: QuantizedWeight, d: Tensor | None) -> None:
    """Raise `Unsupported` with the reason if the kernel does not support these arguments of `linear`."""
    bits, group_size, packed = weight.bits, weight.group_size, weight.packed
    out_features, in_features = weight.shape
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise Unsupported(f"the native decode kernel takes float16 and bfloat16, and x is {x.dtype}")
    if x.shape[0] > _MOST_TOKENS[bits]:
        raise Unsupported(f"the native decode kernel takes up to {_MOST_TOKENS[bits]} tokens at {bits} bits")
    for name, tensor in (("D", d), ("scale", weight.scale), ("zero", weight.zero)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise Unsupported(f"the native decode kernel takes one dtype; x is {x.dtype} and {name} {tensor.dtype}")
    if weight.axis != 1:
        raise Unsupported("the native decode kernel requires axis=1: with axis=0 every input has its own scale")
    fields = LEVELS_PER_ELEMENT[bits]
    if out_features % fields:
        raise Unsupported(
            f"the {out_features} outputs are not a multiple of {fields}, so packed elements straddle rows of the weight"
        )
    if in_features % group_size or group_size % _GROUP_UNIT:
        raise Unsupported(
            f"the native decode kernel requires a group_size that is a multiple of {_GROUP_UNIT} and divides the "
            f"{in_features} inputs, and group_size is {group_size}"
        )
    if d is not None and d.shape[-1] % _BLOCK_UNIT:
        raise Unsupported(
            f"the native decode kernel requires a block size that is a multiple of {_BLOCK_UNIT}, got {d.shape[-1]}"
        )
    if not packed.is_contiguous() or packed.data_ptr() % _ALIGNMENT:
        raise Unsupported(f"the packed weight must be contiguous and aligned to {_ALIGNMENT} bytes")


def plan_linear(
    by_name: bool, x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, index: Tensor | None
) -> Any:
    """Of `hqq_oft.ops.reference.linear` for up to 16 tokens on a CUDA device."""
    check_call(x, weight, d)
    check_device(x, weight.bits, by_name)
    return linear


def linear(
    x: Tensor, weight: QuantizedWeight, d: Tensor | None, bias: Tensor | None, adapter_index: Tensor | None
) -> Tensor:
    """The decode kernel."""
    bias = None if bias is None else bias.to(x.dtype)
    index = adapter_index if d is not None else None
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    return torch.ops.hqq_oft_native.decode(x, d, *weight.arguments(), bias, index, stream)
