"""Options and fixtures of the tests."""

import pathlib
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden-dir",
        default=str(pathlib.Path(__file__).parent / "golden"),
        help="folder with the NAME.json / NAME.npz cases of test_golden.py",
    )


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
