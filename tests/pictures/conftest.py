"""What the tests of pictures watch: warnings, and the figures that are saved."""

from typing import Any

import pytest
from matplotlib.figure import Figure

from mocosfl_jax.pictures import figure


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings, one a line."""
    lines: list[str] = []
    monkeypatch.setattr(figure.logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    savefig = Figure.savefig

    def keep(drawn: Figure, *args: Any, **how: Any) -> None:
        figures.append(drawn)
        savefig(drawn, *args, **how)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures
