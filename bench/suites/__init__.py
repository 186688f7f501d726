"""The suites of cases, by name; in each, `cases(profile)` lists them for a profile of sizes."""

from __future__ import annotations

from ..session import Case
from . import layer, merge, ops
from . import model as whole
from .profile import PROFILES, Profile

SUITES = {"ops": ops.cases, "layer": layer.cases, "model": whole.cases, "merge": merge.cases}


def cases(suite: str, profile: Profile) -> list[Case]:
    """A suite's cases in order of value."""
    return sorted(SUITES[suite](profile), key=lambda case: case.priority)


__all__ = ["PROFILES", "SUITES", "Profile", "cases"]
