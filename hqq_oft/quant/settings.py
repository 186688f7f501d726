"""Settings of a layer's quantization, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from torch import nn

from ..ops.packing import LEVELS_PER_ELEMENT, PACKING_BITS

Overrides = Mapping[str, Mapping[str, Any] | None]


@dataclass(frozen=True)
class QuantizationSettings:
    """Quantization settings of one layer.

    Attributes:
        nbits: 8, 6, 5, 4, 3, 2, 1.58 or 1.
        group_size: weights per scale and zero: a multiple of 8, or None for a whole row (axis 1) or column (axis 0).
        axis: axis of the groups: 1 along a row, 0 down a column.

    Raises:
        ValueError: a value is out of range.
        TypeError: `from_hqq` got another kind of configuration.
    """

    nbits: float = 4
    group_size: int | None = 64
    axis: int = 1

    def __post_init__(self) -> None:
        if self.nbits not in Quantizer.SUPPORTED_BITS:
            raise ValueError(f"nbits must be one of {Quantizer.SUPPORTED_BITS}, got {self.nbits!r}.")
        size = self.group_size
        if size is not None and (not isinstance(size, int) or size <= 0 or size % 8):
            raise ValueError(f"group_size must be a positive multiple of 8, or None for a whole row; got {size!r}.")
        if self.axis not in (0, 1):
            raise ValueError(f"axis must be 0 or 1, got {self.axis!r}.")

    def why_not(self, linear: nn.Linear) -> str | None:
        """Why a layer can't be packed with these settings; None if it can."""
        rows, columns = linear.weight.shape
        group = self.group_size or (columns if self.axis == 1 else rows)
        if rows * columns % group:
            return f"group_size={group} does not divide the {rows}x{columns} weights"
        levels = rows * columns // group if self.axis == 1 else group
        fields = LEVELS_PER_ELEMENT[PACKING_BITS[Quantizer.bit_to_packing[self.nbits]]]
        if self.nbits != 3 and levels % fields:
            return f"its {levels} rows of levels can't be packed {fields} per byte at {self.nbits} bits"
        return None

    @classmethod
    def from_hqq(cls, config: Any) -> QuantizationSettings:
        """The settings in HQQ's `BaseQuantizeConfig` or transformers' `HqqConfig`.

        Other options than number of bits, group size and axis must have the values that `BaseQuantizeConfig` gives
        them: quantized or offloaded scales and zeros, in particular, are refused.
        """
        config = getattr(config, "quant_config", config)
        accepted = "accepted are BaseQuantizeConfig(nbits=..., group_size=..., axis=...) and HqqConfig of the same"
        if not isinstance(config, Mapping):
            raise TypeError(f"quant_config is a {type(config).__name__}; {accepted}.")
        weight = config.get("weight_quant_params")
        if not isinstance(weight, Mapping):
            raise ValueError(f"quant_config has no weight_quant_params; {accepted}; use overrides= for dynamic_config.")
        settings = cls(**{name: weight[name] for name in ("nbits", "group_size", "axis") if name in weight})
        usual = settings.for_hqq()
        found = {**weight, **{key: value for key, value in config.items() if key != "weight_quant_params"}}
        expected = {**usual.pop("weight_quant_params"), **usual}
        if odd := [f"{key}={value!r}" for key, value in found.items() if value != expected.get(key)]:
            raise ValueError(f"quant_config: {', '.join(odd)} is not supported; {accepted}.")
        return settings

    def for_hqq(self) -> dict[str, Any]:
        """The settings as HQQ's `quant_config`."""
        return BaseQuantizeConfig(nbits=self.nbits, group_size=self.group_size, axis=self.axis)


def overridden(
    default: QuantizationSettings, pattern: str, values: Mapping[str, Any] | None
) -> QuantizationSettings | None:
    """The settings that `overrides[pattern]` gives; None if it leaves layers dense.

    Raises:
        ValueError: `values` has an unknown name or a value out of range.
    """
    if values is None:
        return None
    if unknown := set(values) - set(vars(default)):
        raise ValueError(f"overrides[{pattern!r}]: {sorted(unknown)} are not among {sorted(vars(default))}.")
    try:
        return QuantizationSettings(**{**vars(default), **values})
    except ValueError as error:
        raise ValueError(f"overrides[{pattern!r}]: {error}") from None
