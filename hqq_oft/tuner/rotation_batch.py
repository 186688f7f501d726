"""`D = R - I` of many adapters, computed in one launch per setting for one training forward.

Only values are shared: each layer's autograd node still computes the gradient of its own parameter. A layer that finds
no value here falls back to per-layer computation, as in the recomputation of gradient checkpointing, in another thread,
or with sharded parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional


@dataclass
class Member:
    """One adapter of one layer.

    Attributes:
        v: its parameter.
        arguments: the other arguments of `functional.cayley`.
        dtype: of its `D`.
        begin: called before `v` is used in a forward (constrained OFT projects it).
        version: version counter of `v` when `d` was computed.
        d: the rotation, once computed.
    """

    v: Tensor
    arguments: dict[str, Any]
    dtype: torch.dtype
    begin: Callable[[], object]
    version: int = field(init=False, default=-1)
    d: Tensor | None = field(init=False, default=None)

    @property
    def kind(self) -> tuple[Any, ...]:
        """The key by which adapters are grouped into a launch."""
        return (self.v.dtype, self.v.device, self.dtype, *self.arguments.values())


def can_share(v: Tensor) -> bool:
    """Whether a parameter is whole, not a shard that FSDP gathers layer by layer, and has a version counter."""
    return type(v) is nn.Parameter and not v.is_inference() and v.device.type != "meta"


class RotationStep:
    """The rotations of one forward of `owner`; all of a kind are computed on first use of one of them."""

    def __init__(self, owner: nn.Module, members: Iterable[Member]) -> None:
        self.owner = owner
        self._members = {member.v: member for member in members}

    def rotation(self, v: Tensor) -> Tensor | None:
        """`D` of a parameter; None if it is not a member, or has changed since its `D` was computed."""
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


# Per thread, as several threads may run different models; innermost last.
_steps: ContextVar[tuple[RotationStep, ...]] = ContextVar("hqq_oft_rotation_steps", default=())


def current() -> RotationStep | None:
    """The step of the innermost forward that shares rotations in this thread."""
    steps = _steps.get()
    return steps[-1] if steps else None


def enter(step: RotationStep) -> None:
    """Push `step`; a step of the same owner left over from an interrupted forward is dropped."""
    _steps.set((*(other for other in _steps.get() if other.owner is not step.owner), step))


def leave(owner: nn.Module) -> None:
    """Pop the current step if it belongs to `owner`; the forward may have failed before pushing one."""
    steps = _steps.get()
    if steps and steps[-1].owner is owner:
        _steps.set(steps[:-1])
