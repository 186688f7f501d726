"""The settings of one OFT adapter, validated before use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of one adapter, as `HqqOFTLinear` documents them.

    Raises:
        ValueError: a value is out of range; the message says what is accepted.
    """

    r: int = 8
    oft_block_size: int = 0
    module_dropout: float = 0.0
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        if self.r < 0 or self.oft_block_size < 0 or (self.r == 0) == (self.oft_block_size == 0):
            raise ValueError(
                "give either `r`, the number of blocks, or `oft_block_size`, and set the other to 0 (r x "
                f"oft_block_size = in_features); got r={self.r}, oft_block_size={self.oft_block_size}."
            )
        if not 0.0 <= self.module_dropout <= 1.0:
            raise ValueError(f"module_dropout must be between 0 and 1, got {self.module_dropout}.")
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"Unknown initialization init_weights={self.init_weights!r}; accepted are True and False.")
        if self.coft and not self.eps > 0:
            raise ValueError(f"eps must be positive with coft=True, got {self.eps}.")
        if self.use_cayley_neumann and self.num_cayley_neumann_terms < 1:
            raise ValueError(f"num_cayley_neumann_terms must be at least 1, got {self.num_cayley_neumann_terms}.")

    @classmethod
    def from_config(cls, config: Any) -> AdapterSettings:
        """From a `peft.OFTConfig`.

        Raises:
            TypeError: `config` is something else.
        """
        if not hasattr(config, "oft_block_size"):
            raise TypeError(f"config must be a peft.OFTConfig, got {config!r}; give settings by name.")
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    def blocks(self, in_features: int, adjust: Callable[[int, int], int]) -> tuple[int, int]:
        """Number of blocks and block size for a layer; a value that is not a divisor is adjusted, with a warning.

        Args:
            in_features: of the layer.
            adjust: PEFT's `OFTLayer.adjust_oft_parameters`, which returns the nearest divisor.
        """
        name, wanted = ("r", self.r) if self.r else ("oft_block_size", self.oft_block_size)
        value = wanted
        if in_features % wanted != 0 or wanted > in_features:
            value = adjust(in_features, wanted)
            warnings.warn(f"Invalid `{name}` ({wanted})! Adjusted `{name}` to ({value}).", stacklevel=2)
        other = in_features // value
        return (value, other) if self.r else (other, value)
