"""What `mkdocs.yml` cannot express: pages from outside docs/, notebooks, and the methods of an adapted model."""

from __future__ import annotations

import json
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
NOTEBOOKS = ("examples/*.ipynb",)
LINK = re.compile(r"\[([^\]\n]+)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Add the pages from outside docs/, at their paths in the repository."""
    for path in sorted(path for pattern in OUTSIDE + IMAGES for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted(path for pattern in NOTEBOOKS for path in ROOT.glob(pattern)):
        page = path.relative_to(ROOT).with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=notebook_page(json.loads(path.read_text("utf-8")))))
    return files


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook's text, code and recorded outputs as Markdown; plots are embedded."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![plot](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif output.get("name") != "stderr":
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, files: Files, **kwargs: Any) -> str:
    """Convert links that are relative to the repository: to pages of the site, or to text if there is no such page."""
    source = Path(page.file.abs_src_path or ROOT / page.file.src_uri)

    def convert(link: re.Match[str]) -> str:
        text, target, anchor = link[1], (source.parent / link[2]).resolve(), link[3] or ""
        if not target.exists():
            return link[0]  # a broken link, which a strict build reports
        path = target.relative_to(DOCS if target.is_relative_to(DOCS) else ROOT).as_posix()
        if path.endswith(".ipynb"):
            path = path.removesuffix(".ipynb") + ".md"
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
