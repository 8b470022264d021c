"""Loss and accuracy over the epochs of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mocosfl_jax.pictures.figure import save


def plot_curves(path: Path, metrics: Sequence[Mapping[str, float]]) -> None:
    """Plot loss and kNN accuracy over epochs.

    Args:
      path: the PNG file.
      metrics: the lines of metrics.jsonl.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots()
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

    save(path, (9, 4), draw)
