"""The reference has one entry for every public name, and every public member has what its entry shows: a docstring."""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
from collections import Counter
from pathlib import Path

import pytest
from peft.tuners.oft.model import OFTModel

import hqq_oft
from hqq_oft import functional

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"
ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)


def functions():
    names = [name for name, value in vars(functional).items() if inspect.isfunction(value) and name[0] != "_"]
    return [name for name in names if getattr(functional, name).__module__ == functional.__name__]


def public():
    """Every public name that needs an entry, with its value."""
    names = {f"hqq_oft.{name}": getattr(hqq_oft, name) for name in hqq_oft.__all__ if name != "functional"}
    names |= {f"hqq_oft.functional.{name}": getattr(functional, name) for name in functions()}
    # Not exported, but users call its methods on an adapted model. docs/hooks.py gives it this name.
    tuners = {cls.__name__: cls for cls in OFTModel.__subclasses__() if cls.__module__.startswith("hqq_oft.")}
    return names | {"hqq_oft.HqqOFTModel": tuners["HqqOFTModel"]}


def members(cls):
    """The public methods and properties that this package defines for a class."""
    for base in cls.__mro__:
        if base.__module__.startswith("hqq_oft"):
            for name, value in vars(base).items():
                function = getattr(value, "__func__", value)  # of a classmethod or staticmethod
                if name[0] != "_" and (inspect.isfunction(function) or isinstance(function, property)):
                    yield f"{base.__name__}.{name}", function


CLASSES = {name: value for name, value in public().items() if inspect.isclass(value)}


def test_every_public_name_has_one_entry_in_the_reference():
    entries = Counter(name for page in REFERENCE.glob("*.md") for name in ENTRY.findall(page.read_text()))
    assert {name for name, count in entries.items() if count > 1} == set()
    missing, unknown = public().keys() - entries.keys(), entries.keys() - public().keys()
    assert not missing, "add to a page in docs/reference: " + ", ".join(f"`::: {name}`" for name in sorted(missing))
    assert not unknown, "entries of names that are not public: " + ", ".join(sorted(unknown))


def test_no_public_name_is_also_a_submodule():
    # whose page the reference would show instead
    modules = {module.name for module in pkgutil.iter_modules(hqq_oft.__path__)}
    assert modules & set(hqq_oft.__all__) == {"functional"}


def test_every_function_of_functional_is_found():
    assert {"cayley", "cayley_many", "rotate", "dequantize", "dequantize_rotate", "linear"} <= set(functions())


@pytest.mark.parametrize("name", public())
def test_every_public_name_has_a_docstring(name):
    assert public()[name].__doc__


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_method_and_property_has_a_docstring(name):
    undocumented = [member for member, function in members(CLASSES[name]) if not function.__doc__]
    assert undocumented == [], "without a docstring, the reference does not show these"


@pytest.mark.parametrize("name", [name for name, cls in CLASSES.items() if dataclasses.is_dataclass(cls)])
def test_every_field_of_a_public_dataclass_is_documented(name):
    documented = set(re.findall(r"^    (\w+): ", inspect.getdoc(CLASSES[name]), re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(CLASSES[name]) if field.name[0] != "_"}
    assert fields <= documented, "missing in the docstring's Attributes"
