"""A warning in a test is an error, regardless of the installed plugins of pytest."""

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture
def warned() -> Iterator[list[str]]:
    caught = []

    def warn(when: str) -> None:
        try:
            warnings.warn(f"within a fixture's {when}", stacklevel=2)
        except UserWarning as warning:
            caught.append(str(warning))

    warn("setup")
    yield caught
    warn("teardown")
    assert caught == ["within a fixture's setup", "within a fixture's teardown"]


@pytest.mark.parametrize("category", [UserWarning, DeprecationWarning, ResourceWarning])
def test_a_warning_is_an_error(category: type[Warning], warned: list[str]) -> None:
    assert warned == ["within a fixture's setup"]
    with pytest.raises(category, match="of another module"):
        warnings.warn_explicit("of another module", category, "other.py", 1, module="other")


@pytest.mark.filterwarnings("ignore:expected")
def test_a_test_may_allow_a_warning() -> None:
    warnings.warn("expected", stacklevel=1)
    with pytest.raises(UserWarning, match="another"):
        warnings.warn("another", stacklevel=1)
