"""The examples in docstrings run and give the results shown."""

import doctest
import importlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "mocosfl_jax"
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text()
}
PUBLIC = {"mocosfl_jax.algorithm.mocosfl", "mocosfl_jax.models.split", "mocosfl_jax.feed.augment"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed


def test_the_main_functions_have_an_example() -> None:
    assert MODULES >= PUBLIC
