"""What the features of a trained network have learned, in two pictures."""

from pathlib import Path

from mocosfl_jax.data import Dataset
from mocosfl_jax.evaluation.monitor import Evaluated
from mocosfl_jax.pictures.embedding import plot_embedding
from mocosfl_jax.pictures.neighbours import plot_neighbours


def plot_features(folder: Path, dataset: Dataset, evaluated: Evaluated, ending: str = "") -> list[str]:
    """Write neighbours.png and embedding.png, of backbone features. Nothing that fails is raised.

    Args:
      folder: where the files go.
      dataset: whose images the features are of.
      evaluated: features of its training and test images.
      ending: of the files' names, for another data set.

    Returns:
      The names of those two files that are now in the folder.
    """
    train, test = evaluated
    neighbours, embedding = (f"{name}{ending}.png" for name in ("neighbours", "embedding"))
    plot_neighbours(folder / neighbours, dataset, train.backbone, test.backbone)
    plot_embedding(folder / embedding, test.backbone, dataset.y_test, dataset.class_names)
    return [name for name in (neighbours, embedding) if (folder / name).exists()]
