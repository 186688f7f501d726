"""A page for each public name, from its signature and docstring: `python docs/make_api.py` writes docs/api/."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import hqq_oft
from hqq_oft import functional

FOLDER = Path(__file__).parent / "api"
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")


def public() -> dict[str, Any]:
    """Every public class and function by its full name."""
    names = {f"hqq_oft.{name}": getattr(hqq_oft, name) for name in hqq_oft.__all__ if name != "functional"}
    for name, value in vars(functional).items():
        if inspect.isfunction(value) and value.__module__ == functional.__name__ and not name.startswith("_"):
            names[f"hqq_oft.functional.{name}"] = value
    return dict(sorted(names.items()))


def page(name: str, value: Any) -> str:
    """Title, signature and docstring as Markdown, and a class's public methods below."""
    parts = [f"# `{name}`", _signature(name, value), _body(inspect.getdoc(value) or "")]
    if inspect.isclass(value) and not issubclass(value, BaseException):
        members: dict[str, Any] = {}
        for base in reversed([base for base in value.__mro__ if base.__module__.startswith("hqq_oft")]):
            members.update(vars(base))
        for member, method in sorted(members.items()):
            function = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
            if not member.startswith("_") and inspect.isfunction(function) and inspect.getdoc(function):
                parts += [f"## `{member}`", _signature(member, function), _body(inspect.getdoc(function) or "")]
    return "\n\n".join(part for part in parts if part) + "\n"


class _Text(str):
    """An annotation that prints as it was written."""

    def __repr__(self) -> str:
        return str(self)


def _signature(name: str, value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, BaseException):
        return ""
    # Defaults that print with an address would change from run to run.
    text = re.sub(r" at 0x[0-9a-f]+", "", str(_unquoted(inspect.signature(value))))
    return f"```python\n{name.rpartition('.')[2]}{text}\n```"


def _unquoted(signature: inspect.Signature) -> inspect.Signature:
    parameters = [
        p.replace(annotation=_Text(p.annotation)) if isinstance(p.annotation, str) else p
        for p in signature.parameters.values()
    ]
    result = signature.return_annotation
    return signature.replace(
        parameters=parameters, return_annotation=_Text(result) if isinstance(result, str) else result
    )


def _body(doc: str) -> str:
    """The docstring's sections as headings with lists; the rest as it stands."""
    lines, out, section = doc.splitlines(), [], ""
    for line in lines:
        title = line.strip().removesuffix(":")
        if line.endswith(":") and title in SECTIONS and not line.startswith(" "):
            section = title
            out += [f"**{title}**", ""]
        elif section and section not in ("Returns", "Yields", "Example") and re.match(r"    \S[^:]*: ", line):
            item, _, text = line.strip().partition(": ")
            out.append(f"- `{item}`: {text}")
        elif section and line.strip():
            out.append(f"  {line.strip()}" if out[-1].startswith(("- ", "  ")) else line.strip())
        else:
            section = section if line.strip() == "" else ""
            out.append(line)
    return "\n".join(out).strip()


def index(names: dict[str, Any]) -> str:
    """The list of pages."""
    lines = ["# Public names", ""]
    for name, value in names.items():
        summary = (inspect.getdoc(value) or "").split("\n")[0]
        lines.append(f"- [`{name}`]({name}.md): {summary}")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """File name to contents."""
    names = public()
    return {"README.md": index(names)} | {f"{name}.md": page(name, value) for name, value in names.items()}


def main() -> None:
    """Write all pages, and remove those of names that are gone."""
    FOLDER.mkdir(exist_ok=True)
    wanted = pages()
    for old in FOLDER.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (FOLDER / name).write_text(text)
    print(f"{len(wanted)} pages in {FOLDER}")


if __name__ == "__main__":
    main()
