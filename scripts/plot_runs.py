"""Plots the kNN accuracy and the client divergence of several runs in one figure.

python scripts/plot_runs.py OUT.png WORKDIR ...
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from mocosfl_jax.training import workdir


def main(out: str, *folders: str) -> None:
    figure = Figure(figsize=(9, 4), layout="constrained")
    accuracy, divergence = figure.subplots(1, 2)
    for folder in map(Path, folders):
        metrics = workdir.read_metrics(folder)
        for axes, field in ((accuracy, "knn_backbone"), (divergence, "divergence")):
            points = [(m["epoch"], m[field]) for m in metrics if field in m]
            axes.plot(*zip(*points, strict=True), marker="o", label=folder.name)
    accuracy.set(xlabel="epoch", ylabel="kNN accuracy, backbone features", title="Test images")
    divergence.set(xlabel="epoch", ylabel="mean divergence", title="Clients at the last synchronization")
    accuracy.legend()
    for axes in (accuracy, divergence):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
