"""A directory that is there complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new, empty directory beside `target` that takes its place when the block ends, after its files are on disk.

    If the block raises, what it wrote is removed and `target` is as it was. A process that is killed meanwhile leaves
    `target` alone and a hidden sibling `.<name>.partial-...`, which can be deleted; one killed in the instant in which
    an old `target` is exchanged leaves that as `.<name>.replaced-...`.

    Args:
        target: the directory to make; missing parents are made too.
        overwrite: whether `target` may be a model's directory, which is replaced: one that holds a `config.json`.

    Yields:
        The directory to write into.

    Raises:
        FileExistsError: `target` is there and must not be replaced; nothing was written.
        OSError: of the first write that failed, with `target` in its message.
    """
    target = target.resolve()
    check_replaceable(target, overwrite)
    staging = _sibling(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        for path in [*staging.rglob("*"), staging]:
            _flush(path)
        _install(staging, target, overwrite)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{error.strerror}: writing {target}, where nothing was changed") from error
        raise
    _flush(target.parent)


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless `staged_directory` may put a directory at `target`."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a directory; choose another name.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; choose another name, or replace it: overwrite=True, --force.")
    if not (target / "config.json").is_file():
        raise FileExistsError(f"{target} holds no config.json, so it is no model's directory: it is not overwritten.")


def _sibling(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}-{secrets.token_hex(4)}"


def _flush(path: Path) -> None:
    """Have the disk hold a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _install(staging: Path, target: Path, overwrite: bool) -> None:
    if not overwrite or not target.exists():
        staging.rename(target)  # fails where another has put something meanwhile
        return
    replaced = _sibling(target, "replaced")
    target.rename(replaced)
    try:
        staging.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)  # the new one is in place: what can't be removed is no failure
