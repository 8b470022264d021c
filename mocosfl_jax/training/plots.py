"""Plots of a run, as PNG files. A plot that fails stops nothing: a warning of one line says why."""

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from mocosfl_jax.errors import one_line, printable

_LONGEST_LABEL = 30  # characters of a class name
# Inches: the figure grows with classes and clients up to these, and each label needs so much of the height.
_TALLEST = 16.0
_WIDEST = 16.0
_LABEL_HEIGHT = 0.13


def plot_partition(path: Path, labels: np.ndarray, parts: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Plot how many images of each class each client holds.

    Class names are drawn as they are, without reading `$` as mathematics. Where there is no room for all of
    them, one in two, three, ... is drawn.

    Args:
      path: the PNG file.
      labels: [n] integers, of the training images.
      parts: indices of each client's images.
      names: of the classes.
    """
    width = min(max(9.0, len(parts) / 60), _WIDEST)
    height = min(max(4.0, 1.5 + 0.17 * len(names)), _TALLEST)
    every = math.ceil(len(names) * _LABEL_HEIGHT / (height - 1.5))

    def draw(figure: Any, axes: Any) -> None:
        counts = np.stack([np.bincount(labels[part], minlength=len(names)) for part in parts], axis=1)
        image = axes.imshow(counts, aspect="auto", interpolation="auto", cmap="viridis")
        axes.set(xlabel="client", title="Images of each class on each client")
        axes.set_ylabel("class" if every == 1 else f"class (one in {every} named)")
        size = 10 if len(names) <= 20 else 7
        shown = [_label(name) for name in names[::every]]
        axes.set_yticks(range(0, len(names), every), shown, fontsize=size, parse_math=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        bar = figure.colorbar(image, label="images", aspect=5 * height)
        bar.ax.yaxis.get_major_locator().set_params(integer=True)

    _save(path, (width, height), draw)


def _label(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"


def plot_curves(path: Path, metrics: Sequence[Mapping[str, float]]) -> None:
    """Plot loss and kNN accuracy over epochs.

    Args:
      path: the PNG file.
      metrics: the lines of metrics.jsonl.
    """

    def draw(figure: Any, axes: Any) -> None:
        losses = [(m["epoch"], m["loss"]) for m in metrics if "loss" in m]
        axes.set(xlabel="epoch", ylabel="loss (InfoNCE)", title="Contrastive loss and kNN accuracy")
        axes.xaxis.get_major_locator().set_params(integer=True)
        if losses:
            axes.plot(*zip(*losses, strict=True), marker=".", color="tab:gray", label="loss")
        accuracy = axes.twinx()
        accuracy.set_ylabel("kNN accuracy on the test images")
        for field, color in (("knn_backbone", "tab:blue"), ("knn_projection", "tab:orange")):
            points = [(m["epoch"], m[field]) for m in metrics if field in m]
            if points:
                accuracy.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    color=color,
                    label=field.replace("knn_", "kNN on "),
                )
        for m in metrics:
            if "knn_raw_pixels" in m:
                accuracy.axhline(m["knn_raw_pixels"], color="tab:green", ls="--", label="kNN on raw pixels")
        figure.legend(loc="outside lower center", ncols=4)

    _save(path, (9, 4), draw)


def _save(path: Path, size: tuple[float, float], draw: Callable[[Any, Any], None]) -> None:
    """Write a figure of `size` inches, or warn in one line. `draw` gets the figure and its axes."""
    temporary = path.with_suffix(".tmp")
    try:
        # Imported lazily, since it takes a second. Figure needs no display and no global state.
        from matplotlib.figure import Figure

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, figure.subplots())
            figure.savefig(temporary, format="png", dpi=120)
        temporary.replace(path)
    except Exception as error:  # whatever it is, the run matters more
        logging.warning("%s is not drawn (%s)", path, one_line(error))
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return
    if caught:  # such as a letter that the font lacks
        logging.warning("%s: %s", path, " ".join(str(caught[0].message).split()))
