"""Backend selection: which backend serves an operation, and why another does not.

A backend maps an operation's name to a planner. `planner(by_name, *args)` returns the function that computes every call
whose tensors have the same dtypes, shapes, strides, devices and alignment, and whose other arguments are the same, or
raises `Unsupported` with the reason; `by_name` says whether the user selected this backend instead of `auto`. Any other
exception is a bug and propagates. `auto` then tries the next backend and logs the reason once; a backend selected by
name has no fallback.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, get_args

from .._config import BackendName, backend_from_environment
from .._installation import describe
from .verified import warn_if_unverified

logger = logging.getLogger("hqq_oft")

Planner = Callable[..., Callable[..., Any]]


class Unsupported(NotImplementedError):  # noqa: N818
    """A backend does not support this call; the message gives the reason."""


class BackendError(RuntimeError):
    """The backend selected by name does not support the call."""


@dataclass(frozen=True)
class Backend:
    """A named table of planners.

    Attributes:
        name: `triton`, `native` or `reference`.
        operations: operation name -> planner.
        reason: why operations that are not in the table are not supported.
    """

    name: str
    operations: Mapping[str, Planner] = field(default_factory=lambda: MappingProxyType({}))
    reason: str = ""

    def why_not(self, operation: str) -> str | None:
        """The reason why this backend does not have the operation; None if it has it."""
        if operation in self.operations:
            return None
        return self.reason or f"the {self.name} backend has no kernel for {operation}"

    def plan(self, operation: str, by_name: bool, args: tuple[Any, ...]) -> Callable[..., Any]:
        """The function that computes such calls.

        Raises:
            Unsupported: this backend does not support them.
        """
        reason = self.why_not(operation)
        if reason is not None:
            raise Unsupported(reason)
        return self.operations[operation](by_name, *args)


# In the order in which `auto` tries them: on a GPU, where both may support a call, the native kernels accept only what
# was measured to be faster with them.
_PACKAGES = {"native": "hqq_oft.ops.native", "triton": "hqq_oft.triton_kernels", "reference": "hqq_oft.ops.reference"}


def load_backends() -> dict[str, Backend]:
    """All backends by name, in the order in which `auto` tries them.

    A package lists its planners in `OPERATIONS` and says in `REASON` why that table is empty.
    """
    backends = {}
    for name, package in _PACKAGES.items():
        if importlib.util.find_spec(package) is None:  # the Triton kernels, in a checkout that is not installed
            backends[name] = Backend(name, reason=f"there are no {name} kernels in {describe()}")
            continue
        module = importlib.import_module(package)
        backends[name] = Backend(name, MappingProxyType(dict(module.OPERATIONS)), getattr(module, "REASON", ""))
    return backends


_registry: dict[str, Backend] | None = None
_selected: str | None = None
_logged: set[tuple[str, str, str]] = set()
_plans: dict[str, dict[tuple[Any, ...], Callable[..., Any]]] = {}


def registry() -> dict[str, Backend]:
    """The backends of this process by name, loaded on first use."""
    global _registry
    if _registry is None:
        _registry = load_backends()
    return _registry


def selected_backend() -> str:
    """The name in effect: that of the innermost `backend(...)`, else `HQQ_OFT_BACKEND`, else `auto`."""
    return _selected if _selected is not None else backend_from_environment()


@contextmanager
def backend(name: BackendName) -> Iterator[None]:
    """Select the backend of every operation inside the `with` block.

    The selection applies to the whole process, not to one thread: autograd runs the backward pass of GPU work in its
    own threads, which must use the same kernels.

    Args:
        name: `auto` takes for each call the first backend that supports it; `triton`, `native` and `reference` take
            only that one, and a call it does not support raises `BackendError`.

    Raises:
        ValueError: no backend has that name.
    """
    global _selected
    accepted = get_args(BackendName)
    if name not in accepted:
        raise ValueError(f"unknown backend {name!r}; choose one of {', '.join(accepted)}.")
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


def plans_of(operation: str) -> dict[tuple[Any, ...], Callable[..., Any]]:
    """The plans kept for an operation, by what they depend on; always the same dictionary."""
    return _plans.setdefault(operation, {})


def forget_plans() -> None:
    """Plan every call again: a backend, or what it decides by, has changed."""
    for plans in _plans.values():
        plans.clear()


def plan(operation: str, selected: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that computes such calls on the selected backend.

    Raises:
        BackendError: the backend selected by name does not support the call; the message says why and what to do.
    """
    if selected != "auto":
        try:
            return registry()[selected].plan(operation, True, args)
        except Unsupported as refusal:
            raise BackendError(
                f"the {selected} backend does not support {operation}: {refusal}. Select another backend, or `auto` to "
                "take the first that supports the call."
            ) from refusal
    for candidate in registry().values():
        try:
            planned = candidate.plan(operation, False, args)
        except Unsupported as refusal:
            key = (candidate.name, operation, str(refusal))
            if key not in _logged:
                _logged.add(key)
                logger.info("%s is not supported by the %s backend: %s", operation, candidate.name, refusal)
            continue
        if candidate.name != "reference":
            warn_if_unverified(args[0].device)
        return planned
    raise AssertionError(f"the reference backend does not support {operation}")  # it supports every call
