"""Plots of a run, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_partition(path: Path, labels: np.ndarray, parts: Sequence[np.ndarray], names: Sequence[str]) -> None:
    """Plot how many images of each class each client holds.

    Args:
      path: the PNG file.
      labels: [n] integers, of the training images.
      parts: indices of each client's images.
      names: of the classes.
    """
    counts = np.stack([np.bincount(labels[part], minlength=len(names)) for part in parts], axis=1)
    figure, axes = _figure(9, 4)
    image = axes.imshow(counts, aspect="auto", interpolation="nearest", cmap="viridis")
    axes.set(xlabel="client", ylabel="class", title="Images of each class on each client")
    if len(names) <= 20:
        axes.set_yticks(range(len(names)), names)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, label="images")
    figure.savefig(path, dpi=120)


def plot_curves(path: Path, metrics: Sequence[Mapping[str, float]]) -> None:
    """Plot loss and kNN accuracy over epochs.

    Args:
      path: the PNG file.
      metrics: the lines of metrics.jsonl.
    """
    figure, axes = _figure(9, 4)
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
                *zip(*points, strict=True), marker="o", color=color, label=field.replace("knn_", "kNN on ")
            )
    for m in metrics:
        if "knn_raw_pixels" in m:
            accuracy.axhline(m["knn_raw_pixels"], color="tab:green", ls="--", label="kNN on raw pixels")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Imported lazily, since it takes a second. Figure needs no display and no global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()
