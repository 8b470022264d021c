"""Weighted k-nearest-neighbour classification of features."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mocosfl_jax.evaluation.examples import Rows, at_least, check_examples, more_than_zero

BLOCK_BYTES = 256 * 2**20  # of similarities held at a time


def knn_accuracy(
    train: Rows,
    train_labels: Rows,
    test: Rows,
    test_labels: Rows,
    *,
    num_classes: int,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Return the accuracy of a weighted kNN classifier (Wu et al. 2018, section 3.4).

    The k nearest neighbours by cosine similarity vote with weight exp(similarity / temperature). Similarities
    are computed for one block of test images at a time and take at most `BLOCK_BYTES`.

    Args:
      train: [n, D] features of the labelled images.
      train_labels: [n] integers.
      test: [m, D] features of the test images.
      test_labels: [m] integers.
      num_classes: labels are 0..num_classes - 1.
      k: number of neighbours; if n is smaller, all n vote.
      temperature: of the weights.

    Returns:
      The share of test images that are classified correctly.

    Raises:
      UserError: If numbers of rows and labels differ, a label is out of range, a feature is not finite, or k
        or the temperature is not positive. The message names the argument.

    Example:
      >>> train, labels = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), np.array([0, 0, 1])
      >>> test, test_labels = np.array([[2.0, 0.1], [0.1, 3.0]]), np.array([0, 1])
      >>> knn_accuracy(train, labels, test, test_labels, num_classes=2, k=1)
      1.0
    """
    check_examples(train, train_labels, test, test_labels, num_classes=num_classes)
    at_least("k", k, 1)
    more_than_zero("temperature", temperature)
    k = min(k, len(train))
    block = block_rows(len(train), len(test))
    train_rows, labels = _unit_rows(jnp.asarray(train)), jnp.asarray(train_labels)
    correct = 0
    for start in range(0, len(test), block):
        rows = test[start : start + block]
        padded = np.concatenate([rows, np.zeros((block - len(rows), rows.shape[1]), rows.dtype)])
        predicted = predict(train_rows, labels, padded, num_classes, k, temperature)
        correct += int(np.sum(np.asarray(predicted)[: len(rows)] == test_labels[start : start + block]))
    return correct / len(test)


def block_rows(train: int, test: int) -> int:
    """The number of test images that are classified at a time, given the numbers of images."""
    return min(test, max(1, BLOCK_BYTES // (4 * train)))


def nearest(train: Rows, test: Rows, k: int) -> np.ndarray:
    """Return the rows of `train` that are most similar to each row of `test`, by cosine similarity.

    Args:
      train: [n, D] features.
      test: [m, D] features, few: all similarities [m, n] are held at once.
      k: number of neighbours, at most n.

    Returns:
      [m, k] indices into `train`, the most similar first; of equal ones, the lower index first.

    Example:
      >>> nearest(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.array([[3.0, 0.1]]), k=2).tolist()
      [[0, 2]]
    """
    return np.asarray(_nearest(_unit_rows(jnp.asarray(train)), jnp.asarray(test), k))


def _unit_rows(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames=("num_classes", "k"))
def predict(
    train_rows: Array, train_labels: Array, test: Array, num_classes: int, k: int, temperature: float
) -> Array:
    """The classes [b] of a block of test features [b, D], by the votes of `train_rows` [n, D] of unit length.

    The labels are [n] integers; the other arguments are those of `knn_accuracy`.
    """
    similarity, neighbours = _most_similar(train_rows, test, k)
    # Subtracting the largest similarity keeps the vote, and exp cannot overflow at a small temperature.
    # jnp.max, since with similarity[:, :1] XLA sorts whole rows instead of finding the top k.
    weights = jnp.exp((similarity - jnp.max(similarity, axis=1, keepdims=True)) / temperature)
    votes = jax.vmap(partial(jax.ops.segment_sum, num_segments=num_classes))(
        weights, train_labels[neighbours]
    )
    return jnp.argmax(votes, axis=1)


@partial(jax.jit, static_argnames="k")
def _nearest(train_rows: Array, test: Array, k: int) -> Array:
    return _most_similar(train_rows, test, k)[1]


def _most_similar(train_rows: Array, test: Array, k: int) -> tuple[Array, Array]:
    """Cosine similarities [b, k] of the nearest `train_rows`, of unit length, and their indices [b, k]."""
    similarities = jnp.matmul(_unit_rows(test), train_rows.T, precision=jax.lax.Precision.HIGHEST)
    similarity, neighbours = jax.lax.top_k(similarities, k)
    return similarity, neighbours
