"""The reference has every public name, and its examples give what they show."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import mocosfl_jax

PAGES = sorted((pathlib.Path(__file__).parents[2] / "docs" / "reference").glob("*.md"))
PACKAGE = pathlib.Path(mocosfl_jax.__path__[0])
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]


def test_every_public_name_is_documented() -> None:
    directives = [name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)]
    documented = [pkgutil.resolve_name(name) for name in directives]  # each of them exists
    for name in mocosfl_jax.__all__:
        value = getattr(mocosfl_jax, name)
        module = pkgutil.resolve_name(value.__module__)
        assert any(entry is value or entry is module for entry in documented), name


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_docstrings_are_true(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0 and results.failed == 0
