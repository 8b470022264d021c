"""Writes a smaller CIFAR-10 as one npz file: the first images of each class.

    python -m scripts.subset --data_dir=data --train=500 --test=500 --out=runs/cifar5000.npz

--data_dir has CIFAR-10. --train and --test are numbers of images of each class; by default all are taken.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mocosfl_jax import data
from mocosfl_jax.errors import UserError
from mocosfl_jax.paths import replacing


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="data")
    parser.add_argument("--train", type=int)
    parser.add_argument("--test", type=int)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        write(cifar10(options.data_dir), options.out, train=options.train, test=options.test)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def cifar10(directory: str) -> data.Dataset:
    """CIFAR-10 in memory.

    Raises:
      UserError: If the folder does not hold it.
    """
    return data.in_memory(data.load("cifar10", directory, image_size=None))


def write(
    dataset: data.Dataset,
    path: Path,
    *,
    classes: Sequence[int] | None = None,
    train: int | None = None,
    test: int | None = None,
) -> None:
    """Write the first images of each class to an npz file, in their order.

    Args:
      dataset: In memory.
      path: Of the file, whose folder is made.
      classes: Those that are taken, and numbered anew; None: all.
      train: Training images of each class; None: all.
      test: Test images of each class; None: all.
    """
    classes = range(len(dataset.class_names)) if classes is None else classes
    number = np.full(len(dataset.class_names), -1)
    number[list(classes)] = np.arange(len(classes))
    rows = [
        np.sort(np.concatenate([np.flatnonzero(labels == c)[:most] for c in classes]))
        for labels, most in ((dataset.y_train, train), (dataset.y_test, test))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            x_train=dataset.x_train[rows[0]],
            y_train=number[dataset.y_train[rows[0]]],
            x_test=dataset.x_test[rows[1]],
            y_test=number[dataset.y_test[rows[1]]],
            class_names=np.array([dataset.class_names[c] for c in classes]),
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
