"""How the images of each class are distributed over the clients."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mocosfl_jax.pictures.figure import label, save

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

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        counts = np.stack([np.bincount(labels[part], minlength=len(names)) for part in parts], axis=1)
        image = axes.imshow(counts, aspect="auto", interpolation="auto", cmap="viridis")
        axes.set(xlabel="client", title="Images of each class on each client")
        axes.set_ylabel("class" if every == 1 else f"class (one in {every} named)")
        size = 10 if len(names) <= 20 else 7
        shown = [label(name) for name in names[::every]]
        axes.set_yticks(range(0, len(names), every), shown, fontsize=size, parse_math=False)
        axes.xaxis.get_major_locator().set_params(integer=True)
        bar = figure.colorbar(image, label="images", aspect=5 * height)
        bar.ax.yaxis.get_major_locator().set_params(integer=True)

    save(path, (width, height), draw)
