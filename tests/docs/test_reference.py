"""The reference lists every public name."""

import pathlib
import pkgutil
import re

import mocosfl_jax

PAGES = sorted((pathlib.Path(__file__).parents[2] / "docs" / "reference").glob("*.md"))


def test_every_public_name_is_documented() -> None:
    directives = [name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)]
    documented = [pkgutil.resolve_name(name) for name in directives]  # fails if a name does not exist
    for name in mocosfl_jax.__all__:
        value = getattr(mocosfl_jax, name)
        module = pkgutil.resolve_name(value.__module__)
        assert any(entry is value or entry is module for entry in documented), name
