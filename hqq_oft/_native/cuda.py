"""`linear` of the native CUDA decode kernel (csrc/cuda): up to 16 tokens, one launch, HQQ's own bytes.

Under `auto` it serves only what a measurement on the device at hand says it does faster than the Triton kernel: the
entry `native_decode` of `kernels/configs/<device>.json`, which maps bits to the largest number of tokens for which that
holds. Asked for by name it serves all that it can.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hqq_oft.backends import Unsupported, selected_backend
from hqq_oft.device_tables import own_table, table_name
from hqq_oft.weight import LEVELS_PER_ELEMENT

_MOST_TOKENS = {8: 16, 4: 16, 3: 8, 2: 16, 1: 16}  # by bits: `max_tokens` of csrc/cuda/layout.h
_GROUP_UNIT = 32  # of csrc/cuda/layout.h
_BLOCK_UNIT = 16  # columns of one matrix instruction
_ALIGNMENT = 16  # bytes of one copy of packed levels


@functools.lru_cache
def measured_tokens(device: str, bits: int) -> int:
    """The largest M at which this kernel was measured to beat Triton's on a device; 0 where nothing says so.

    Args:
        device: name of the device's table, for example `nvidia_h100_80gb_hbm3`.
        bits: width of one level.
    """
    return int(own_table(device).get("native_decode", {}).get(str(bits), 0))


@functools.lru_cache
def _device(index: int) -> tuple[str, tuple[int, int]]:
    """A device's name, as its table is named, and its compute capability."""
    return table_name(torch.cuda.get_device_name(index)), torch.cuda.get_device_capability(index)


@functools.lru_cache
def has_kernels() -> bool:
    """Whether the library was built with its CUDA part."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("hqq_oft_native::linear", "CUDA")


def check_device(x: Tensor, bits: int) -> None:
    """Raise `Unsupported` where the kernel does not run, or under `auto` is not known to be worth it."""
    if not x.is_cuda or torch.version.hip is not None:
        raise Unsupported(f"the native decode kernel runs on CUDA devices, and the tensor is on {x.device}")
    if not has_kernels():
        raise Unsupported("this build of hqq_oft has no CUDA kernels: install it where there is an `nvcc`")
    name, capability = _device(x.device.index)
    if capability < (8, 0):
        raise Unsupported("the native decode kernel needs compute capability 8.0 (Ampere) or later")
    if selected_backend() == "auto" and x.shape[0] > measured_tokens(name, bits):
        raise Unsupported(
            f"no measurement on this device says that the native decode kernel is faster at {bits} bits and "
            f"{x.shape[0]} tokens"
        )


def check_call(
    x: Tensor, d: Tensor | None, packed: Tensor, scale: Tensor, zero: Tensor, out_features: int, in_features: int,
    bits: int, group_size: int, axis: int,
) -> None:  # fmt: skip
    """Raise `Unsupported` with the reason why the kernel cannot serve these arguments of `linear`, if there is one."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise Unsupported(f"the native decode kernel takes float16 and bfloat16, and x is {x.dtype}")
    if x.shape[0] > _MOST_TOKENS[bits]:
        raise Unsupported(f"the native decode kernel takes up to {_MOST_TOKENS[bits]} tokens at {bits} bits")
    for name, tensor in (("D", d), ("scale", scale), ("zero", zero)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise Unsupported(f"the native decode kernel takes one dtype; x is {x.dtype} and {name} {tensor.dtype}")
    if axis != 1:
        raise Unsupported("the native decode kernel needs axis=1: with axis=0 every input has a scale of its own")
    fields = LEVELS_PER_ELEMENT[bits]
    if out_features % fields:
        raise Unsupported(
            f"the {out_features} outputs are no multiple of {fields}, so packed elements straddle rows of the weight"
        )
    if in_features % group_size or group_size % _GROUP_UNIT:
        raise Unsupported(
            f"the native decode kernel needs groups of a multiple of {_GROUP_UNIT} that divide the {in_features} "
            f"inputs, and group_size is {group_size}"
        )
    if d is not None and d.shape[-1] % _BLOCK_UNIT:
        raise Unsupported(
            f"the native decode kernel needs rotations of a multiple of {_BLOCK_UNIT}, and these are of {d.shape[-1]}"
        )
    if not packed.is_contiguous() or packed.data_ptr() % _ALIGNMENT:
        raise Unsupported(f"the packed weight must be contiguous, from an address that {_ALIGNMENT} divides")


def linear(
    x: Tensor, d: Tensor | None, packed: Tensor, scale: Tensor, zero: Tensor, out_features: int, in_features: int,
    bits: int, group_size: int, axis: int, bias: Tensor | None, adapter_index: Tensor | None,
) -> Tensor:  # fmt: skip
    """`hqq_oft.reference.linear` for up to 16 tokens on a CUDA device."""
    # First the reasons that most calls with many tokens meet, and that do not tell one number of them from another.
    check_call(x, d, packed, scale, zero, out_features, in_features, bits, group_size, axis)
    check_device(x, bits)
    if bias is not None:
        bias = bias.to(x.dtype)
    return torch.ops.hqq_oft_native.linear(
        x, d, packed, scale, zero, out_features, in_features, bits, group_size, axis, bias,
        adapter_index if d is not None else None,
    )  # fmt: skip
