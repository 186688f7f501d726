"""What `mkdocs.yml` cannot express: pages from outside docs/, and the methods of an adapted model."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
OUTSIDE = ("ENVS.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "csrc/README.md", "bench/results/**/*.md")
IMAGES = ("bench/results/**/*.png",)
LINK = re.compile(r"\[([^\]\n]+)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Add the pages from outside docs/, at their paths in the repository."""
    for path in sorted(path for pattern in OUTSIDE + IMAGES for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, files: Files, **kwargs: Any) -> str:
    """Convert links that are relative to the repository: to pages of the site, or to text if there is no such page."""
    source = Path(page.file.abs_src_path)

    def convert(link: re.Match[str]) -> str:
        text, target, anchor = link[1], (source.parent / link[2]).resolve(), link[3] or ""
        if not target.exists():
            return link[0]  # a broken link, which a strict build reports
        path = target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT).as_posix()
        if files.get_file_from_path(path) is None:
            return text
        return f"[{text}]({Path(os.path.relpath(path, Path(page.file.src_uri).parent)).as_posix()}{anchor})"

    return LINK.sub(convert, markdown)


class AdaptedModel(griffe.Extension):
    """Makes the class of an adapted model's tuner, which is not exported, available as `hqq_oft.HqqOFTModel`."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Add an alias of the class."""
        if pkg.path == "hqq_oft":
            found = _find(pkg, "HqqOFTModel")
            if found is None:
                raise LookupError("hqq_oft has no class HqqOFTModel; rename it in docs/hooks.py, too.")
            pkg.set_member(found.name, griffe.Alias(found.name, found, parent=pkg))


def _find(module: griffe.Module, name: str) -> griffe.Class | None:
    """The class of that name in a module or its submodules."""
    member = module.members.get(name)
    if isinstance(member, griffe.Class):
        return member
    children = [child for child in module.modules.values() if not child.is_alias]
    return next((found for child in children if (found := _find(child, name))), None)
