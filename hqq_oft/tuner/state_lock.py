"""Many forwards at a time, or one change of what they compute with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast


class StateLock:
    """A readers-writer lock: forwards read, merging and changing adapters write. Copies and pickles of it are new.

    A writer that waits keeps new readers out, so that busy forwards can't hold it off for ever. A thread that reads may
    read again, and write: hooks call what they like. It waits for other readers then.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers: dict[int, int] = {}  # how often each thread reads
        self._writer: int | None = None
        self._depth = 0
        self._waiting = 0
        self._upgrading = False  # whether a thread that reads waits to write

    def __reduce__(self) -> tuple[type[StateLock], tuple[()]]:
        return StateLock, ()

    def reading(self) -> StateLock:
        """Keep the state as it is for a block. Every forward enters one, so it is no generator, which costs more."""
        return self

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._condition:
            if me not in self._readers and self._writer != me:
                while self._waiting or self._writer is not None:
                    self._condition.wait()
            self._readers[me] = self._readers.get(me, 0) + 1

    def __exit__(self, *exception: object) -> None:
        me = threading.get_ident()
        with self._condition:
            self._readers[me] -= 1
            if not self._readers[me]:
                del self._readers[me]
                if self._waiting:
                    self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Have the state alone for a block.

        Raises:
            RuntimeError: this thread and another one are in a forward, and both want to change the state from inside
                it: each would wait for the other for ever.
        """
        me = threading.get_ident()
        with self._condition:
            upgrades = me in self._readers and self._writer != me
            if upgrades and self._upgrading:
                raise RuntimeError(
                    "a forward in another thread waits to change this layer, and so does this one: change adapters, "
                    "merge and unmerge outside of forwards, or in one thread."
                )
            self._upgrading |= upgrades
            self._waiting += 1
            try:
                while self._writer not in (None, me) or self._readers.keys() - {me}:
                    self._condition.wait()
                self._writer, self._depth = me, self._depth + 1
            finally:
                self._waiting -= 1
                if upgrades:
                    self._upgrading = False
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._condition.notify_all()


_Method = TypeVar("_Method", bound=Callable[..., Any])


def alone(method: _Method) -> _Method:
    """Keep forwards of other threads, and other such methods, out while this one changes an object with a `_lock`."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock.writing():
            return method(self, *args, **kwargs)

    return cast(_Method, call)
