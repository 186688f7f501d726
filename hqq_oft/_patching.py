"""Reversible changes of other packages: applied once per process, undone in reverse order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Patch:
    """A set of changes, active while a permanent call, at least one block or an active patch that includes it wants it.

    Args:
        change: applies the changes through `set` and `on_undo` of the patch that it gets.
        included: another patch, which is active with this one.
    """

    def __init__(self, change: Callable[[Patch], None], included: Patch | None = None) -> None:
        self._change, self._included = change, included
        self._includers: set[Patch] = set()
        self._undo: list[Callable[[], object]] = []
        self.lasting = False
        self.blocks = 0

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, and restore or delete it when the patch is undone."""
        if name in vars(owner):
            restore = functools.partial(setattr, owner, name, vars(owner)[name])
        else:
            restore = functools.partial(delattr, owner, name)
        setattr(owner, name, value)
        self.on_undo(restore)

    def set_item(self, owner: dict[Any, Any], key: Any, value: Any) -> None:
        """Replace an existing item of a dictionary until the patch is undone."""
        self.on_undo(functools.partial(owner.__setitem__, key, owner[key]))
        owner[key] = value

    def on_undo(self, action: Callable[[], object]) -> None:
        """Call `action` when the patch is undone."""
        self._undo.append(action)

    def apply(self) -> None:
        """Apply the changes unless they are active, and the included patch if it was removed meanwhile.

        If a change fails, those before it are undone.
        """
        try:
            if self._included is not None:
                self._included.apply()
                self._included._includers.add(self)
            if not self._undo:
                self._change(self)
        except BaseException:
            self._undo_all()
            raise

    def enter(self) -> None:
        """Apply the changes, and keep them until `leave`."""
        self.apply()
        self.blocks += 1

    def leave(self) -> None:
        """Undo the changes if nothing else wants them."""
        self.blocks = max(0, self.blocks - 1)
        self._undo_unless_wanted()

    def remove(self) -> None:
        """Undo the changes, even inside a `with` block."""
        self.lasting, self.blocks = False, 0
        self._includers.clear()
        self._undo_unless_wanted()

    def _undo_unless_wanted(self) -> None:
        if not self.lasting and self.blocks == 0 and not self._includers:
            self._undo_all()

    def _undo_all(self) -> None:
        while self._undo:
            self._undo.pop()()
        if self._included is not None:
            self._included._includers.discard(self)
            self._included._undo_unless_wanted()


class PatchHandle:
    """Handle returned by `patch_peft` and `patch_transformers`: in a `with` statement it ends the patch with the block.

    A patch applied before the block, or a permanent one applied inside it, stays active.
    """

    def __init__(self, patch: Patch) -> None:
        self._patch, self._lasting_before = patch, patch.lasting
        patch.apply()
        patch.lasting = True

    def __enter__(self) -> PatchHandle:
        self._patch.lasting = self._lasting_before
        self._patch.enter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._patch.leave()
