"""Which backend serves an operation, and why another does not.

A backend is a table from an operation's name to a function with the contract of `hqq_oft.reference`. A function that
cannot serve a call raises `Unsupported` with a reason, before it has done anything; every other exception is a bug and
surfaces. Under `auto` the next backend is asked then, and the reason is logged once; a backend asked for by name never
gives way to another.
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

from . import reference
from ._config import BackendName, backend_from_environment

logger = logging.getLogger("hqq_oft")

OPERATIONS = (
    "cayley",
    "cayley_backward",
    "rotate",
    "rotate_backward",
    "dequantize",
    "dequantize_rotate",
    "linear",
    "linear_backward",
)


class Unsupported(NotImplementedError):  # noqa: N818
    """A backend cannot serve this call; the message is the reason, in words a user can read."""


class BackendError(RuntimeError):
    """The backend asked for by name cannot serve the call."""


@dataclass(frozen=True)
class Backend:
    """A named table of operations.

    Attributes:
        name: `triton`, `native` or `reference`.
        operations: operation name -> function with the contract of `hqq_oft.reference`.
        reason: why the operations that are not in the table are not served.
    """

    name: str
    operations: Mapping[str, Callable[..., Any]] = field(default_factory=lambda: MappingProxyType({}))
    reason: str = ""

    def why_not(self, operation: str) -> str | None:
        """The reason why this backend has no such operation; None if it has it."""
        if operation in self.operations:
            return None
        return self.reason or f"the {self.name} backend has no kernel for {operation}"


def _reference() -> Backend:
    return Backend("reference", MappingProxyType({name: getattr(reference, name) for name in OPERATIONS}))


def _from_package(name: str, package: str, absent: str) -> Backend:
    """The backend that `package.OPERATIONS` lists; one that serves nothing if there is no such package or table."""
    if importlib.util.find_spec(package) is None:
        return Backend(name, reason=absent)
    module = importlib.import_module(package)
    return Backend(name, MappingProxyType(dict(module.OPERATIONS)), reason=getattr(module, "REASON", ""))


def load_backends() -> dict[str, Backend]:
    """All backends by name, in the order in which `auto` asks them."""
    return {
        "triton": _from_package(
            "triton", "hqq_oft.triton_kernels", "this installation of hqq_oft has no Triton kernels"
        ),
        "native": _from_package("native", "hqq_oft._native", "this installation of hqq_oft has no native kernels"),
        "reference": _reference(),
    }


_registry: dict[str, Backend] | None = None
_selected: str | None = None
_logged: set[tuple[str, str, str]] = set()


def registry() -> dict[str, Backend]:
    """The backends of this process by name, loaded on first use."""
    global _registry
    if _registry is None:
        _registry = load_backends()
    return _registry


def selected_backend() -> str:
    """The name in force: the innermost `backend(...)`, else `HQQ_OFT_BACKEND`, else `auto`."""
    return _selected if _selected is not None else backend_from_environment()


@contextmanager
def backend(name: BackendName) -> Iterator[None]:
    """Choose the backend of every operation inside the `with` block.

    The choice holds for the whole process, not for a thread: autograd runs the backward of GPU work in threads of its
    own, which must use the same kernels.

    Args:
        name: `auto` takes for each call the first backend that can serve it; `triton`, `native` and `reference` take
            that one alone, and a call it can't serve raises `BackendError`.

    Raises:
        ValueError: no backend has that name.
    """
    global _selected
    accepted = get_args(BackendName)
    if name not in accepted:
        raise ValueError(f"there is no backend {name!r}; choose one of {', '.join(accepted)}.")
    previous, _selected = _selected, name
    try:
        yield
    finally:
        _selected = previous


def _log_once(backend_name: str, operation: str, reason: str) -> None:
    key = (backend_name, operation, reason)
    if key not in _logged:
        _logged.add(key)
        logger.info("%s is not served by the %s backend: %s", operation, backend_name, reason)


def dispatch(operation: str, *args: Any) -> Any:
    """Run an operation on the selected backend.

    Raises:
        BackendError: the backend selected by name cannot serve the call; the message says why and what to do.
    """
    name = selected_backend()
    backends = registry()
    for candidate in backends.values() if name == "auto" else (backends[name],):
        reason = candidate.why_not(operation)
        if reason is None:
            try:
                return candidate.operations[operation](*args)
            except Unsupported as refusal:
                reason = str(refusal)
        if name != "auto":
            raise BackendError(
                f"the {name} backend cannot serve {operation}: {reason}. Choose another backend, or `auto` to take the "
                "first that can."
            )
        _log_once(candidate.name, operation, reason)
    raise AssertionError(f"the reference backend refused {operation}")  # it serves every call
