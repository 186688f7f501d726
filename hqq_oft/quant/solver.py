"""Which solver quantizes a weight: the names, and their validation."""

from __future__ import annotations

from typing import Literal, get_args

Solver = Literal["hqq", "search"]
"""How scales and zeros are found: by HQQ's own algorithm, or by `hqq_oft.quant.search`, which lowers the error."""


def check_solver(solver: Solver) -> None:
    """Raise ValueError if `solver` is not a valid `Solver`."""
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {get_args(Solver)}, got {solver!r}.")
