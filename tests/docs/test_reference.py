"""The reference has every public name, and its examples give what they show."""

import doctest
import pathlib
import pkgutil
import re

import pytest

import mocosfl_jax

PAGES = sorted((pathlib.Path(__file__).parents[2] / "docs" / "reference").glob("*.md"))
EXAMPLES = {
    page.stem: "".join(re.findall(r"```pycon\n(.*?)```", page.read_text(), re.DOTALL)) for page in PAGES
}


def test_every_public_name_is_documented() -> None:
    directives = [name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.M)]
    documented = [pkgutil.resolve_name(name) for name in directives]  # each of them exists
    for name in mocosfl_jax.__all__:
        value = getattr(mocosfl_jax, name)
        module = pkgutil.resolve_name(value.__module__)
        assert any(entry is value or entry is module for entry in documented), name


@pytest.mark.parametrize("page", [name for name, example in EXAMPLES.items() if example])
def test_the_examples_are_true(page: str) -> None:
    test = doctest.DocTestParser().get_doctest(EXAMPLES[page], {}, page, f"docs/reference/{page}.md", 0)
    results = doctest.DocTestRunner().run(test)
    assert results.attempted > 0 and results.failed == 0
