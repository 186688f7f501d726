"""`QuantizedWeight`: an HQQ-quantized weight as one immutable value, independent of HQQ's storage format.

Nothing below `hqq_oft.ops.table` depends on HQQ's classes; this module is the only one that reads their attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .packing import LEVELS_PER_ELEMENT, PACKING_BITS, unpack, unpack_rows

# What plans depend on, of every weight seen -> one object for it, whose hash is cheap.
_LAYOUTS: dict[tuple[Any, ...], object] = {}


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight `W` of shape `[out_features, in_features]`, stored as `W = (level - zero) * scale`.

    HQQ splits `W` in row-major order into groups of `group_size` levels that share one scale and one zero, and stores
    them as a matrix of levels: `[groups, group_size]` for `axis=1`, `[group_size, groups]` for `axis=0`. The rows of
    that matrix are split into `f` equal bands, and a packed element holds one level of each band, the first band in the
    highest bits.

    Attributes:
        packed: `[ceil(rows / f), columns]` of the matrix of levels; uint8 with `f = 8 / bits`, or for 3 bits int32
            with `f = 10`, the rows padded to a multiple of ten.
        scale: `[groups]`, floating point.
        zero: `[groups]`, floating point.
        out_features: N.
        in_features: K.
        bits: width of one stored level: 8, 4, 3, 2 or 1.
        group_size: levels per group.
        axis: 0 or 1.

    Raises:
        ValueError: the parts do not match; the message says which and what is accepted.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    out_features: int
    in_features: int
    bits: int
    group_size: int
    axis: int

    def __post_init__(self) -> None:
        if self.bits not in LEVELS_PER_ELEMENT:
            raise ValueError(f"bits must be one of {sorted(LEVELS_PER_ELEMENT)}, got {self.bits}.")
        if self.axis not in (0, 1):
            raise ValueError(f"axis must be 0 or 1, got {self.axis}.")
        numel = self.out_features * self.in_features
        if self.group_size <= 0 or numel % self.group_size:
            raise ValueError(
                f"group_size must divide the {numel} elements of a {self.out_features}x{self.in_features} weight, "
                f"got {self.group_size}."
            )
        storage = torch.int32 if self.bits == 3 else torch.uint8
        if self.packed.dtype != storage:
            raise ValueError(f"packed must be {storage} for {self.bits} bits, got {self.packed.dtype}.")
        rows, columns = self.level_shape
        fields = LEVELS_PER_ELEMENT[self.bits]
        if self.bits != 3 and rows % fields:
            raise ValueError(
                f"{rows} rows of levels cannot be packed {fields} to a byte at {self.bits} bits: HQQ stores them "
                f"incompletely. Choose a group_size for which the rows are a multiple of {fields}."
            )
        expected = (-(-rows // fields), columns)
        if tuple(self.packed.shape) != expected:
            raise ValueError(
                f"packed must have shape {expected} for a {self.out_features}x{self.in_features} weight at {self.bits} "
                f"bits, group_size={self.group_size}, axis={self.axis}; got {tuple(self.packed.shape)}."
            )
        for name, value in (("scale", self.scale), ("zero", self.zero)):
            if not value.is_floating_point() or tuple(value.shape) != (self.groups,):
                raise ValueError(
                    f"{name} must be a floating point tensor of shape ({self.groups},), got {value.dtype} "
                    f"{tuple(value.shape)}."
                )

    @property
    def groups(self) -> int:
        """Number of groups: N * K / group_size."""
        return self.out_features * self.in_features // self.group_size

    @property
    def level_shape(self) -> tuple[int, int]:
        """Shape of the matrix of levels: `[groups, group_size]` for axis 1, `[group_size, groups]` for axis 0."""
        return (self.groups, self.group_size) if self.axis == 1 else (self.group_size, self.groups)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return (self.out_features, self.in_features)

    @property
    def device(self) -> torch.device:
        """Device of the packed levels."""
        return self.packed.device

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, int, int, int, int, int]:
        """The fields, in the order in which every operator schema lists them."""
        return (
            self.packed,
            self.scale,
            self.zero,
            self.out_features,
            self.in_features,
            self.bits,
            self.group_size,
            self.axis,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizedWeight, self.arguments()

    @classmethod
    def unchecked(cls, *parts: Any) -> QuantizedWeight:
        """From the fields, in order, which are taken as valid."""
        weight = object.__new__(cls)
        vars(weight).update(zip(cls.__dataclass_fields__, parts, strict=True))
        return weight

    @cached_property
    def layout(self) -> object | None:
        """Equal for weights of one shape, format, device and memory layout.

        None where a part is a tensor subclass or has no data.
        """
        tensors = (self.packed, self.scale, self.zero)
        if any(type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta for tensor in tensors):
            return None
        facts = tuple((t.dtype, t.device, t.shape, t.stride(), t.data_ptr() % 16) for t in tensors)
        if len(_LAYOUTS) >= 4096:
            _LAYOUTS.clear()
        return _LAYOUTS.setdefault((facts, *self.arguments()[3:]), object())

    def dense(self, dtype: torch.dtype) -> Tensor:
        """`W = (level - zero) * scale`, `[N, K]`, computed in float32 or wider and rounded once to `dtype`."""
        wide = torch.float64 if torch.float64 in (self.scale.dtype, dtype) else torch.float32
        levels = unpack(self.packed, self.bits, self.level_shape[0]).to(wide)
        scale, zero = (self.scale[:, None], self.zero[:, None]) if self.axis == 1 else (self.scale, self.zero)
        return ((levels - zero) * scale).reshape(self.shape).to(dtype)

    @property
    def groups_of_a_band(self) -> int:
        """A number of groups whose multiples are where a `band` may begin; all where only the whole weight is one."""
        if self.axis == 1:
            return self.in_features // math.gcd(self.in_features, self.group_size)
        return self.in_features if self.out_features % self.group_size == 0 else self.groups

    def band(self, first: int, last: int) -> QuantizedWeight:
        """Groups `first` to `last` as a weight of K in-features, whole rows of `W` in their order.

        With `axis=1` they are consecutive rows, whose levels are unpacked to a byte each: packed elements hold levels
        of rows far from each other. With `axis=0` they are as many rows of each part of `W` that has N / group_size.

        Args:
            first: a multiple of `groups_of_a_band`.
            last: another, or `groups`.
        """
        if (first, last) == (0, self.groups):
            return self
        if self.axis == 1:
            packed, bits = unpack_rows(self.packed, self.bits, first, last).to(torch.uint8), 8
        else:
            packed, bits = self.packed[:, first:last].contiguous(), self.bits
        rows = (last - first) * self.group_size // self.in_features
        settings = (rows, self.in_features, bits, self.group_size, self.axis)
        return QuantizedWeight.unchecked(packed, self.scale[first:last], self.zero[first:last], *settings)

    @classmethod
    def from_hqq(cls, layer: Any) -> QuantizedWeight:
        """View the weight of an initialised `hqq.core.quantize.HQQLinear`.

        The packed levels are shared with the layer, not copied, and so are scale and zero unless the layer holds them
        quantized or stacked (HQQ's deprecated `quant_scale`, `quant_zero` and `offload_meta`).

        Raises:
            TypeError: `layer` has no HQQ weight.
            ValueError: the layer is not quantized yet, or its parts do not match.
        """
        if not hasattr(layer, "W_q") or not hasattr(layer, "meta"):
            raise TypeError(
                f"expected an hqq.core.quantize.HQQLinear, got {type(layer).__name__}; quantize the layer first: "
                "HQQLinear(linear, quant_config, compute_dtype=..., device=...)."
            )
        if layer.W_q is None or layer.meta is None:
            raise ValueError(
                "the HQQLinear is not initialised: it holds no packed weight. Call initialize() or load_state_dict() "
                "on it first."
            )
        return cls.from_parts(layer.W_q, layer.meta)

    @classmethod
    def from_parts(cls, packed: Tensor, meta: Mapping[str, Any]) -> QuantizedWeight:
        """As `from_hqq`, from HQQ's packed tensor `W_q` and its `meta` dictionary.

        Raises:
            ValueError: the parts do not match, or `packed` is sharded.
        """
        require_whole("the packed weight", packed)
        packed = packed.detach()
        out_features, in_features = (int(size) for size in meta["shape"])
        axis = int(meta["axis"])
        scale, zero = _scale_and_zero(meta, packed.device)
        group_size = meta["group_size"]
        if scale.dim() == 0 or group_size is None:
            # One scale for the whole tensor (channel_wise=False) or per row or column: HQQ does not regroup in these
            # cases, so the matrix of levels is W itself.
            group_size = in_features if axis == 1 else out_features
        groups = out_features * in_features // int(group_size)

        if meta["packing"] is None:  # bitpack=False keeps one level per element, in a floating dtype
            packed, bits = packed.to(torch.uint8), 8
        else:
            if meta["packing"] not in PACKING_BITS:
                raise ValueError(f"packing must be one of {sorted(PACKING_BITS)} or None, got {meta['packing']!r}.")
            bits = PACKING_BITS[meta["packing"]]
            if meta.get("view_as_float"):
                packed = packed.view(torch.int32 if bits == 3 else torch.uint8)
        return cls(
            packed=packed,
            scale=_per_group(scale, groups),
            zero=_per_group(zero, groups),
            out_features=out_features,
            in_features=in_features,
            bits=bits,
            group_size=int(group_size),
            axis=axis,
        )


def require_whole(name: str, value: Tensor) -> None:
    """Raise if a tensor is sharded.

    Raises:
        ValueError: `value` is a `DTensor`; the message says where the full tensor is available.
    """
    if hasattr(value, "full_tensor"):
        raise ValueError(
            f"{name} is sharded across processes (a DTensor). It is only whole inside a forward of the module that "
            "`fully_shard` was called on; to merge, load the adapter that `full_adapter_state_dict` "
            "gathers into a model that is not sharded."
        )


def _per_group(value: Tensor, groups: int) -> Tensor:
    return value.expand(groups) if value.dim() == 0 else value.reshape(-1)


def _scale_and_zero(meta: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and zero from any of HQQ's formats: plain, stacked in host memory, or themselves quantized."""
    parts = meta
    if "zero_scale" in parts:
        stacked = parts["zero_scale"].to(device)
        names = ("zero_q", "scale_q") if stacked.dtype == torch.uint8 else ("zero", "scale")
        parts = {**meta, **dict(zip(names, stacked.unbind(0), strict=True))}
    values = []
    for name in ("scale", "zero"):
        if parts.get(f"quant_{name}"):
            inner, inner_meta = parts[f"{name}_q"].to(device), parts[f"meta_{name}"]
            values.append(_dequantize_inner(inner, inner_meta))
        elif name in parts:
            values.append(parts[name].to(device))
        else:
            raise ValueError(f"the HQQ meta data holds no {name}; it has {sorted(parts)}.")
    return values[0], values[1]


def _dequantize_inner(packed: Tensor, meta: Mapping[str, Any]) -> Tensor:
    """Dequantize a scale or zero that HQQ quantized itself: a small matrix."""
    shape = tuple(meta["shape"])
    inner = QuantizedWeight.from_parts(packed, {**meta, "shape": (shape[0], shape[1] if len(shape) > 1 else 1)})
    return inner.dense(meta.get("compute_dtype") or torch.float16)
