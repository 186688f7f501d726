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
    read again, and write where no other reads: hooks call what they like.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers: dict[int, int] = {}  # how often each thread reads
        self._writer: int | None = None
        self._depth = 0
        self._waiting = 0
        self._reading = _Reading(self)

    def __reduce__(self) -> tuple[type[StateLock], tuple[()]]:
        return StateLock, ()

    def reading(self) -> _Reading:
        """Keep the state as it is for a block."""
        return self._reading

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Have the state alone for a block."""
        me = threading.get_ident()
        with self._condition:
            self._waiting += 1
            try:
                while self._writer not in (None, me) or self._readers.keys() - {me}:
                    self._condition.wait()
                self._writer, self._depth = me, self._depth + 1
            finally:
                self._waiting -= 1
                self._condition.notify_all()
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                    self._condition.notify_all()


class _Reading:
    """The block of a reader. Every forward enters one, so that it is no generator, which would cost five times as much.

    It holds nothing of its own: one serves all readers at once.
    """

    def __init__(self, lock: StateLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock, me = self._lock, threading.get_ident()
        with lock._condition:
            if me not in lock._readers and lock._writer != me:
                while lock._waiting or lock._writer is not None:
                    lock._condition.wait()
            lock._readers[me] = lock._readers.get(me, 0) + 1

    def __exit__(self, *exception: object) -> None:
        lock, me = self._lock, threading.get_ident()
        with lock._condition:
            lock._readers[me] -= 1
            if not lock._readers[me]:
                del lock._readers[me]
                if lock._waiting:
                    lock._condition.notify_all()


_Method = TypeVar("_Method", bound=Callable[..., Any])


def alone(method: _Method) -> _Method:
    """Keep forwards of other threads, and other such methods, out while this one changes an object with a `_lock`."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._lock.writing():
            return method(self, *args, **kwargs)

    return cast(_Method, call)
