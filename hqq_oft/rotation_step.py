"""`D = R - I` of many adapters, made together in one launch per setting for one training forward.

What is shared are values: each layer's node still sends its gradient to its own parameter, and a layer that finds no
value here computes its own. So nothing can be wrong where sharing does not reach, as in the second forward of gradient
checkpointing, in another thread, or where a parameter is sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import functional


@dataclass
class Member:
    """One adapter of one layer.

    Attributes:
        v: its parameter.
        arguments: what `functional.cayley` takes besides.
        dtype: of its `D`.
        begin: what a layer does before it uses `v` in a forward (constrained OFT projects it).
        version: autograd's count of changes of `v` when `d` was made.
        d: the rotation, once it is made.
    """

    v: Tensor
    arguments: dict[str, Any]
    dtype: torch.dtype
    begin: Callable[[], object]
    version: int = field(init=False, default=-1)
    d: Tensor | None = field(init=False, default=None)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What adapters that share a launch have in common."""
        return (self.v.dtype, self.v.device, self.dtype, *self.arguments.values())


def can_share(v: Tensor) -> bool:
    """Whether a parameter is whole and counts its changes: neither a shard, which FSDP gathers layer by layer, nor made
    in inference mode.
    """
    return type(v) is nn.Parameter and not v.is_inference() and v.device.type != "meta"


class RotationStep:
    """The rotations of one forward of `owner`; those of a kind are made when the first of them is asked for."""

    def __init__(self, owner: nn.Module, members: Iterable[Member]) -> None:
        self.owner = owner
        self._members = {member.v: member for member in members}

    def rotation(self, v: Tensor) -> Tensor | None:
        """`D` of a parameter; None if it is no member, or has changed since its `D` was made."""
        member = self._members.get(v)
        if member is None:
            return None
        if member.d is None:
            self._make(member.kind)
        return member.d if member.version == v._version else None

    @torch.no_grad()
    def _make(self, kind: tuple[Any, ...]) -> None:
        group = [member for member in self._members.values() if member.kind == kind]
        for member in group:
            member.begin()
        first = group[0]
        made = functional.cayley_many([member.v for member in group], dtype=first.dtype, **first.arguments)
        for member, d in zip(group, made, strict=True):
            member.version, member.d = member.v._version, d


# Per thread, as forwards in several threads may be of different models; innermost last.
_steps: ContextVar[tuple[RotationStep, ...]] = ContextVar("hqq_oft_rotation_steps", default=())


def current() -> RotationStep | None:
    """The step of the innermost forward that shares rotations in this thread."""
    steps = _steps.get()
    return steps[-1] if steps else None


def enter(step: RotationStep) -> None:
    """Make `step` the current one; one of the same owner that an interrupt has left behind is dropped."""
    _steps.set((*(other for other in _steps.get() if other.owner is not step.owner), step))


def leave(owner: nn.Module) -> None:
    """Go back to the step before the current one, if that is one of `owner`: its forward may have failed before it."""
    steps = _steps.get()
    if steps and steps[-1].owner is owner:
        _steps.set(steps[:-1])
