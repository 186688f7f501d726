"""Atomic creation and replacement of directories."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new, empty sibling of `target` that is synced to disk and renamed to `target` when the block ends.

    If the block raises, the new directory is removed and `target` is unchanged. If the process is killed, `target` is
    unchanged and a hidden sibling `.<name>.partial-...` remains, which can be deleted. If it is killed between the two
    renames that replace an old `target`, the old directory remains as `.<name>.replaced-...`.

    Args:
        target: the directory to create; missing parents are created too.
        overwrite: whether to replace `target` if it is a model directory, that is, contains a `config.json`.

    Yields:
        The directory to write into.

    Raises:
        FileExistsError: `target` exists and must not be replaced; nothing was written.
        OSError: a write failed; the message names `target`.
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
            raise OSError(error.errno, f"{error.strerror}: writing {target}; nothing was changed") from error
        raise
    _flush(target.parent)


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Raise FileExistsError unless `staged_directory` may create or replace `target`."""
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} exists and is not a directory; choose another name.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists; choose another name, or replace it with overwrite=True (--force).")
    if not (target / "config.json").is_file():
        raise FileExistsError(f"{target} contains no config.json; only model directories are overwritten.")


def _sibling(target: Path, role: str) -> Path:
    return target.parent / f".{target.name}.{role}-{secrets.token_hex(4)}"


def _flush(path: Path) -> None:
    """Sync a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _install(staging: Path, target: Path, overwrite: bool) -> None:
    if not overwrite or not target.exists():
        staging.rename(target)  # fails if another process has created a non-empty target
        return
    replaced = _sibling(target, "replaced")
    target.rename(replaced)
    try:
        staging.rename(target)
    except BaseException:
        replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)  # the replacement is complete; leftovers are harmless
