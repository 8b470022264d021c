"""Checks of features with labels: rows and labels that do not belong together give no accuracy."""

import math

import numpy as np
from jax import Array

from mocosfl_jax.errors import UserError

Rows = np.ndarray | Array  # [n, D] features, or [n] labels


def check_examples(
    train: Rows, train_labels: Rows, test: Rows, test_labels: Rows, *, num_classes: int
) -> None:
    """Check features and labels of both sets.

    Args:
      train: [n, D] features of the training images.
      train_labels: [n] integers.
      test: [m, D] features of the test images.
      test_labels: [m] integers.
      num_classes: labels are 0..num_classes - 1.

    Raises:
      UserError: If numbers of rows and labels differ, a label is out of range or a feature is not finite. The
        message names the argument.
    """
    at_least("num_classes", num_classes, 1)
    for name, rows, labels in (("train", train, train_labels), ("test", test, test_labels)):
        check_shapes(name, rows, labels)
        labels = np.asarray(labels)
        lowest, highest = labels.min(), labels.max()
        if lowest < 0 or highest >= num_classes:
            raise UserError(f"{name}_labels: found {lowest} to {highest}, allowed: 0 to {num_classes - 1}")
        if not all(math.isfinite(value) for value in (rows.min(), rows.max())):
            raise UserError(f"{name}: found features that are not finite, allowed: finite ones")
    if test.shape[1] != train.shape[1]:
        raise UserError(f"test: found {test.shape[1]} features a row, allowed: {train.shape[1]} as in train")


def check_shapes(name: str, rows: Rows, labels: Rows) -> None:
    """Check that there is one integer label for each row, and at least one row.

    Raises:
      UserError: If not. The message names `name` or its labels.
    """
    shape, labels = np.shape(rows), np.asarray(labels)
    if len(shape) != 2 or 0 in shape:
        raise UserError(f"{name}: found an array of shape {shape}, allowed: [n, D] with one row or more")
    if labels.shape != shape[:1]:
        raise UserError(
            f"{name}_labels: found an array of shape {labels.shape}, allowed: {shape[:1]}, a label for each "
            f"row of {name}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{name}_labels: found {labels.dtype}, allowed: integers")


def at_least(name: str, value: int, least: int) -> None:
    """Raise UserError unless the argument `name` is an integer of `least` or more."""
    if not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name}: found {value}, allowed: an integer of {least} or more")


def more_than_zero(name: str, value: float, most: float = math.inf) -> None:
    """Raise UserError unless the argument `name` is finite, more than 0 and at most `most`."""
    if not 0 < value <= most or value == math.inf:
        limit = "" if most == math.inf else f", at most {most:g}"
        raise UserError(f"{name}: found {value}, allowed: more than 0{limit}")
