"""Reversible changes of other packages: applied once per process, undone in reverse order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Patch:
    """A set of changes, active while a permanent call or at least one block wants it.

    Args:
        change: applies the changes through `set` and `on_undo` of the patch that it gets.
    """

    def __init__(self, change: Callable[[Patch], None]) -> None:
        self._change = change
        self._undo: list[Callable[[], object]] = []
        self.lasting = False
        self.blocks = 0

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, and restore or delete it when the patch is undone."""
        if name in vars(owner):
            self.on_undo(functools.partial(setattr, owner, name, vars(owner)[name]))
        else:
            self.on_undo(functools.partial(delattr, owner, name))
        setattr(owner, name, value)

    def set_item(self, owner: dict[Any, Any], key: Any, value: Any) -> None:
        """Replace an existing item of a dictionary until the patch is undone."""
        self.on_undo(functools.partial(owner.__setitem__, key, owner[key]))
        owner[key] = value

    def on_undo(self, action: Callable[[], object]) -> None:
        """Call `action` when the patch is undone."""
        self._undo.append(action)

    def apply(self) -> None:
        """Apply the changes unless they are active."""
        if not self._undo:
            self._change(self)

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
        self._undo_unless_wanted()

    def _undo_unless_wanted(self) -> None:
        if not self.lasting and self.blocks == 0:
            while self._undo:
                self._undo.pop()()


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
