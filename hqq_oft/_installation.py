"""The version, stated only here, and which installation of the package is running."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

__version__ = "0.1.0"

PACKAGE = Path(__file__).resolve().parent


def is_checkout() -> bool:
    """Whether the package runs from its source folder: in place, or as an editable installation."""
    return (PACKAGE.parent / "csrc" / "build.py").is_file()


def other_installation() -> Path | None:
    """The package's folder in an installation that this one hides, as Python started in a checkout does."""
    for distribution in metadata.distributions(name="hqq-oft"):
        folder = Path(str(distribution.locate_file("hqq_oft")))
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            folder = Path(url2pathname(urlsplit(origin["url"]).path), "hqq_oft")
        if (folder / "__init__.py").is_file() and folder.resolve() != PACKAGE:
            return folder
    return None


def describe() -> str:
    """One line that names the running installation and, if it hides another, that one."""
    if not is_checkout():
        return f"the installation in {PACKAGE}"
    other = other_installation()
    hides = f", which hides the installation in {other}: start Python in another folder to use that" if other else ""
    return f"the source folder {PACKAGE.parent}{hides}"
