"""The suites of cases, by name; in each, `cases(profile)` lists them for a profile of sizes."""

from __future__ import annotations

from ..session import Case
from . import host, layer, merge, ops
from . import model as whole
from .profile import PROFILES, Profile

SUITES = {"ops": ops.cases, "layer": layer.cases, "model": whole.cases, "merge": merge.cases, "host": host.cases}


def cases(suite: str, profile: Profile) -> list[Case]:
    """A suite's cases in order of value; of those of one name, the first that the suite lists."""
    first: dict[str, Case] = {}
    for case in SUITES[suite](profile):
        first.setdefault(case.name, case)
    return sorted(first.values(), key=lambda case: case.priority)


__all__ = ["PROFILES", "SUITES", "Profile", "cases"]
