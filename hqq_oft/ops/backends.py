"""Backend dispatch: which backend runs an operation, and why others were skipped.

A backend maps an operation's name to a function with the contract of `hqq_oft.ops.reference`. A function that
does not support a call raises `Unsupported` with a reason, before any side effect; every other exception is a bug and
propagates. With `auto`, dispatch then tries the next backend and logs the reason once; a backend selected by name has
no fallback.
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
from . import reference

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
    """A backend does not support this call; the message is the reason, written for users."""


class BackendError(RuntimeError):
    """The backend selected by name does not support the call."""


@dataclass(frozen=True)
class Backend:
    """A named table of operations.

    Attributes:
        name: `triton`, `native` or `reference`.
        operations: operation name -> function with the contract of `hqq_oft.ops.reference`.
        reason: why operations missing from the table are not supported.
    """

    name: str
    operations: Mapping[str, Callable[..., Any]] = field(default_factory=lambda: MappingProxyType({}))
    reason: str = ""

    def why_not(self, operation: str) -> str | None:
        """The reason why this backend lacks the operation; None if it has it."""
        if operation in self.operations:
            return None
        return self.reason or f"the {self.name} backend has no kernel for {operation}"


def _reference() -> Backend:
    return Backend("reference", MappingProxyType({name: getattr(reference, name) for name in OPERATIONS}))


def _from_package(name: str, package: str, absent: str) -> Backend:
    """The backend of `package.OPERATIONS`; one without operations if the package is missing."""
    if importlib.util.find_spec(package) is None:
        return Backend(name, reason=absent)
    module = importlib.import_module(package)
    return Backend(name, MappingProxyType(dict(module.OPERATIONS)), reason=getattr(module, "REASON", ""))


def load_backends() -> dict[str, Backend]:
    """All backends by name, in the order in which `auto` tries them."""
    # On a GPU with both, the native kernels reject calls for which they were not measured to be faster.
    return {
        "native": _from_package("native", "hqq_oft.ops.native", "this installation of hqq_oft has no native kernels"),
        "triton": _from_package(
            "triton", "hqq_oft.triton_kernels", "this installation of hqq_oft has no Triton kernels"
        ),
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
    """The name of the current selection: the innermost `backend(...)`, else `HQQ_OFT_BACKEND`, else `auto`."""
    return _selected if _selected is not None else backend_from_environment()


@contextmanager
def backend(name: BackendName) -> Iterator[None]:
    """Choose the backend of every operation inside the `with` block.

    The choice is process-wide, not per thread: autograd runs the backward of GPU operations in its own threads, which
    must use the same kernels.

    Args:
        name: `auto` uses for each call the first backend that supports it; `triton`, `native` and `reference` use only
            that backend, and an unsupported call raises `BackendError`.

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


def _log_once(backend_name: str, operation: str, reason: str) -> None:
    key = (backend_name, operation, reason)
    if key not in _logged:
        _logged.add(key)
        logger.info("%s is not supported by the %s backend: %s", operation, backend_name, reason)


def dispatch(operation: str, *args: Any) -> Any:
    """Run an operation on the selected backend.

    Raises:
        BackendError: the backend selected by name does not support the call; the message says why and what to do.
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
                f"the {name} backend does not support {operation}: {reason}. Choose another backend, or `auto` to use "
                "the first that does."
            )
        _log_once(candidate.name, operation, reason)
    raise AssertionError(f"the reference backend rejected {operation}")  # it supports every call
