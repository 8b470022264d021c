"""Curves of several runs in one plot."""

from collections.abc import Sequence
from typing import Any

from mocosfl_jax.page.contents import RunOnPage, points
from mocosfl_jax.pictures.figure import label, render

_PANELS = {
    "loss": "loss (InfoNCE)",
    "top1": "contrastive accuracy",
    "knn_backbone": "kNN on the backbone, test images",
    "divergence": "divergence of the clients",
}
_MARKED = 30  # points up to which each has a marker


def curves(runs: Sequence[RunOnPage]) -> bytes:
    """Return loss, contrastive accuracy, kNN accuracy and divergence over epochs, as SVG.

    All runs are in the same panels, each in its colour. Dashed lines are raw pixels.
    """
    names = [label(run.name) for run in runs]

    def draw(figure: Any) -> None:
        from matplotlib import colormaps

        colours = colormaps["tab10" if len(runs) <= 10 else "tab20"]
        handles = []
        for (field, title), axes in zip(_PANELS.items(), figure.subplots(2, 2).flat, strict=True):
            axes.set(title=title, xlabel="epoch")
            axes.grid(alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
            several = []
            for number, run in enumerate(runs):
                colour = colours(number % colours.N)
                found = points(run.metrics, field)
                marker = "." if len(found) <= _MARKED else ""
                x, y = zip(*found, strict=True) if found else ((), ())
                several += axes.plot(x, y, marker=marker, color=colour)
                if field == "knn_backbone":
                    for _, accuracy in points(run.metrics, "knn_raw_pixels"):
                        axes.axhline(accuracy, color=colour, ls="--", lw=1)
            handles = several
            if not any(points(run.metrics, field) for run in runs):
                axes.text(0.5, 0.5, "none yet", ha="center", transform=axes.transAxes, color="0.4")
        legend = figure.legend(handles, names, loc="outside lower center", ncols=3)
        for text in legend.get_texts():
            text.set_parse_math(False)

    return render((9.5, 6.5 + 0.2 * (len(runs) // 3)), draw, "svg").file
