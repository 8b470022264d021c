"""Test images, each with the training images whose features are most similar."""

from pathlib import Path
from typing import Any

import numpy as np

from mocosfl_jax.data import Dataset
from mocosfl_jax.evaluation.examples import Rows
from mocosfl_jax.evaluation.knn import nearest
from mocosfl_jax.pictures.figure import class_colours, label, save

IMAGES = 12  # test images, a row each
NEIGHBOURS = 8  # of each
SAME_CLASS: Any = "solid"  # the line of a frame
OTHER_CLASS: Any = (0, (1.5, 1.0))
_CELL = (0.78, 0.95)  # inches: width and height of an image with its label
_LONGEST_LABEL = 13  # characters of a class name


def plot_neighbours(path: Path, dataset: Dataset, train: Rows, test: Rows) -> None:
    """Plot a dozen test images, each in a row with its eight nearest training images.

    Nearest is by cosine similarity of the features. A frame has the colour of its image's class. It is dashed
    where that is not the class of the test image. Only the images in the picture are read.

    Args:
      path: the PNG file.
      dataset: its images and class names.
      train: [n, D] features of the training images.
      test: [m, D] features of the test images.
    """

    def draw(figure: Any) -> None:
        from matplotlib.patches import Patch, Rectangle

        chosen = spread_over_classes(dataset.y_test, IMAGES)
        neighbours = nearest(train, test[chosen], min(NEIGHBOURS, len(dataset.y_train)))
        axes = figure.subplots()
        present = np.union1d(dataset.y_test[chosen], dataset.y_train[neighbours.ravel()])
        colours = class_colours(present.tolist(), len(dataset.class_names))
        for row, query in enumerate(chosen):
            cells = [(dataset.x_test[query : query + 1][0], int(dataset.y_test[query]))]
            for image, each in zip(dataset.x_train[neighbours[row]], neighbours[row], strict=True):
                cells.append((image, int(dataset.y_train[each])))
            for column, (image, number) in enumerate(cells):
                # A gap of a third of an image separates the test image from its neighbours.
                left, top = column + (column > 0) / 3, row * _CELL[1] / _CELL[0]
                axes.imshow(
                    image, extent=(left + 0.08, left + 0.92, top + 0.84, top), interpolation="nearest"
                )
                frame = Rectangle(
                    (left + 0.08, top),
                    0.84,
                    0.84,
                    fill=False,
                    edgecolor=colours[number],
                    linewidth=3,
                    linestyle=SAME_CLASS if number == dataset.y_test[query] else OTHER_CLASS,
                )
                axes.add_patch(frame)
                name = label(dataset.class_names[number], _LONGEST_LABEL)
                axes.text(left + 0.5, top + 0.91, name, ha="center", va="top", fontsize=6, parse_math=False)
        width = 1 + 1 / 3 + neighbours.shape[1]
        axes.set(xlim=(0, width), ylim=(len(chosen) * _CELL[1] / _CELL[0], -0.1))
        axes.axis("off")
        axes.text(0.5, -0.15, "test image", ha="center", fontsize=8)
        axes.text(4 / 3 + neighbours.shape[1] / 2, -0.15, "nearest training images", ha="center", fontsize=8)
        figure.legend(
            handles=[
                Patch(fill=False, linestyle=SAME_CLASS, linewidth=2, label="class of the test image"),
                Patch(fill=False, linestyle=OTHER_CLASS, linewidth=2, label="another class"),
            ],
            loc="outside lower center",
            ncols=2,
        )

    rows = min(IMAGES, len(dataset.y_test))
    save(path, ((NEIGHBOURS + 1.5) * _CELL[0], rows * _CELL[1] + 0.8), draw)


def spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose images so that classes are as evenly represented as they can be.

    Of each class, the first images are taken. If there are more classes than images, evenly spaced classes
    are.

    Args:
      labels: [n] integers.
      count: number of images.

    Returns:
      [min(n, count)] indices, sorted by class.

    Example:
      >>> spread_over_classes(np.array([2, 2, 2, 0, 1, 1]), 4).tolist()
      [3, 4, 5, 0]
    """
    present = np.unique(labels)
    if len(present) > count:
        present = present[np.linspace(0, len(present) - 1, count).astype(int)]
    rest = [np.flatnonzero(labels == each).tolist() for each in present]
    taken: list[list[int]] = [[] for _ in present]
    while sum(map(len, taken)) < count and any(rest):
        for mine, left in zip(taken, rest, strict=True):
            if left and sum(map(len, taken)) < count:
                mine.append(left.pop(0))
    return np.array([index for mine in taken for index in mine])
