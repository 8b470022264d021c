"""Features of test images in two dimensions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mocosfl_jax.evaluation.examples import Rows
from mocosfl_jax.pictures.figure import COLOURS, class_colours, label, save

IMAGES = 1000  # at most
_LEAST = 4  # images for an embedding
_EQUAL = 1e-6  # standard deviation of unit vectors below which they are all equal


def plot_embedding(path: Path, test: Rows, labels: np.ndarray, names: Sequence[str]) -> None:
    """Plot features by t-SNE (van der Maaten and Hinton 2008), coloured by class.

    Of more than 20 classes, 20 are drawn, evenly spaced; of more than 1,000 images, 1,000.

    Args:
      path: the PNG file.
      test: [m, D] features of the test images.
      labels: [m] integers.
      names: of the classes.
    """

    def draw(figure: Any) -> None:
        rows, classes = chosen(labels)
        places = embed(np.asarray(test)[rows])
        axes = figure.subplots()
        handles = []
        for number, colour in class_colours(classes.tolist(), len(names)).items():
            mine = places[labels[rows] == number]
            handles.append(axes.scatter(*mine.T, s=9, color=colour, linewidths=0))
        some = f", {len(classes)} of {len(names)} classes" if len(classes) < len(np.unique(labels)) else ""
        axes.set(title=f"Features of {len(rows):,} test images by t-SNE{some}", xticks=[], yticks=[])
        shown = [label(names[number]) for number in classes]
        legend = figure.legend(handles, shown, loc="outside right center", fontsize=8, markerscale=2)
        for text in legend.get_texts():
            text.set_parse_math(False)

    save(path, (8.5, 6), draw)


def chosen(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the images in the picture, evenly spaced.

    Args:
      labels: [m] integers.

    Returns:
      Indices of at most 1,000 images, ascending, and their classes, at most 20.
    """
    classes = np.unique(labels)
    if len(classes) > COLOURS:
        classes = classes[np.linspace(0, len(classes) - 1, COLOURS).astype(int)]
    rows = np.flatnonzero(np.isin(labels, classes))
    rows = rows[np.linspace(0, len(rows) - 1, min(IMAGES, len(rows))).astype(int)]
    return rows, classes


def embed(features: np.ndarray) -> np.ndarray:
    """Return features in two dimensions, by t-SNE on the unit sphere, the same at every call.

    Args:
      features: [n, D].

    Returns:
      [n, 2].

    Raises:
      ValueError: if there are fewer than 4, or all have the same direction.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    if len(features) < _LEAST:
        raise ValueError(f"found {len(features)} images, allowed: {_LEAST} or more")
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / np.maximum(norms, 1e-12)
    if unit.std(axis=0).max() < _EQUAL:
        raise ValueError("the features of all images are equal")
    perplexity = min(30.0, (len(unit) - 1) / 3)
    # On a machine that does other work, several threads wait for each other in each of the many small steps.
    with threadpool_limits(1):
        return TSNE(perplexity=perplexity, max_iter=500, init="pca", random_state=0).fit_transform(unit)
