"""Plots show every class under its own name, and none of them can stop a run."""

import itertools
import pathlib
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from mocosfl_jax.pictures import curves, figure, partition


def plot(path: pathlib.Path, names: list[str], clients: int = 4) -> None:
    """Client i holds i images of each class."""
    labels = np.tile(np.arange(len(names)), clients * (clients - 1) // 2)
    parts = np.split(np.arange(len(labels)), np.cumsum(np.arange(clients))[:-1] * len(names))
    partition.plot_partition(path, labels, parts, names)


ODD = ["$", "$$", "$aa$", r"$\frac{$", "_x", "a_b^c", "%", r"\n"]


def test_names_are_drawn_as_they_are(tmp_path: pathlib.Path, said: list[str], drawn: list[Figure]) -> None:
    plot(tmp_path / "partition.png", [*ODD, "a\nb", "\udcff", "x" * 300])
    assert said == []
    (axes, _) = drawn[0].axes
    shown = axes.get_yticklabels()
    assert [label.get_text() for label in shown] == [
        *ODD,
        *("a\N{REPLACEMENT CHARACTER}b", "\N{REPLACEMENT CHARACTER}"),
        "x" * 29 + "\N{HORIZONTAL ELLIPSIS}",
    ]
    # As mathematics, the dollars would take no room.
    widths = [label.get_window_extent(FigureCanvasAgg(drawn[0]).get_renderer()).width for label in shown]
    assert 1.8 * widths[0] < widths[1] < 2.2 * widths[0] and widths[2] > 2.5 * widths[0]
    assert [path.name for path in tmp_path.iterdir()] == ["partition.png"]


@pytest.mark.parametrize("classes, clients", [(3, 2), (10, 20), (21, 5), (100, 100), (300, 20), (1000, 1000)])
def test_labels_do_not_overlap(
    classes: int, clients: int, tmp_path: pathlib.Path, said: list[str], drawn: list[Figure]
) -> None:
    names = [f"class {number}" for number in range(classes)]
    labels = np.arange(max(classes, clients)) % classes
    parts = np.array_split(np.arange(len(labels)), clients)
    partition.plot_partition(tmp_path / "partition.png", labels, parts, names)
    assert said == []
    axes = drawn[0].axes[0]
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    boxes = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
    assert len(boxes) >= min(classes, 90)
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))
    for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        assert label.get_text() == f"class {int(tick)}"
    rows = axes.get_window_extent(renderer).height / classes
    assert rows >= (4 if classes <= 300 else 1)  # pixels
    with Image.open(tmp_path / "partition.png") as image:
        assert max(image.size) <= 2000


def test_letters_that_the_font_lacks_are_one_line(tmp_path: pathlib.Path, said: list[str]) -> None:
    plot(tmp_path / "partition.png", ["日本", "中国", "a"])
    (line,) = said
    assert "partition.png: Glyph" in line and "\n" not in line
    assert (tmp_path / "partition.png").exists()


def test_a_plot_that_fails_is_one_line(
    tmp_path: pathlib.Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **how: Any) -> None:
        raise RuntimeError("no\nroom")

    (tmp_path / "curves.png").write_bytes(b"the last one")
    monkeypatch.setattr(Figure, "savefig", fail)
    curves.plot_curves(tmp_path / "curves.png", [{"epoch": 0, "knn_backbone": 0.5}])
    assert said == [f"{tmp_path / 'curves.png'} is not drawn (RuntimeError: no room)"]
    assert (tmp_path / "curves.png").read_bytes() == b"the last one"
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]

    plot(tmp_path / "nowhere" / "partition.png", ["a"])
    monkeypatch.undo()
    monkeypatch.setattr(figure.logging, "warning", lambda text, *args: said.append(text % args))
    plot(tmp_path / "nowhere" / "partition.png", ["a"])
    assert len(said) == 3 and "No such file" in said[2]
