"""How good are features? Weighted kNN and linear probe. Takes features and labels, not models."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mocosfl_jax.models import Features

Rows = np.ndarray | Array  # [n, D] features, or [n] labels

KNN_BLOCK_BYTES = 256 * 2**20  # of similarities held at a time


def extract(encode: Callable[[np.ndarray], Features], images: np.ndarray, batch_size: int = 250) -> Features:
    """Features of all `images`, computed once, in batches of one shape.

    Args:
      encode: images [batch_size, H, W, 3] -> Features; jitted by the caller.
      images: [n, H, W, 3] uint8, on the host.
      batch_size: images at a time; the last batch is padded with images that are then dropped.

    Returns:
      Features of all n images.
    """
    batches: list[list[np.ndarray]] = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        padding = np.zeros((batch_size - len(batch), *images.shape[1:]), images.dtype)
        features = encode(np.concatenate([batch, padding]))
        batches.append([np.asarray(x)[: len(batch)] for x in features])
    backbone, projection = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return Features(jnp.asarray(backbone), jnp.asarray(projection))


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
    """Share of test images that a weighted kNN classifies rightly (Wu et al. 2018, section 3.4).

    The k nearest by cosine similarity vote with weight exp(similarity / temperature). Similarities are
    computed for a block of test images at a time and stay below `KNN_BLOCK_BYTES`.

    Args:
      train: [n, D] features of the labelled images; k is at most n.
      train_labels: [n] integers.
      test: [m, D].
      test_labels: [m].
      num_classes: labels are 0..num_classes - 1.
      k: neighbours; all n where there are fewer.
      temperature: of the weights.

    Returns:
      A fraction.
    """
    k = min(k, len(train))
    block = min(len(test), max(1, KNN_BLOCK_BYTES // (4 * len(train))))
    train_rows, labels = _unit_rows(jnp.asarray(train)), jnp.asarray(train_labels)
    right = 0
    for start in range(0, len(test), block):
        rows = test[start : start + block]
        padded = np.concatenate([rows, np.zeros((block - len(rows), rows.shape[1]), rows.dtype)])
        predicted = _knn_predict(train_rows, labels, padded, num_classes, k, temperature)
        right += int(np.sum(np.asarray(predicted)[: len(rows)] == test_labels[start : start + block]))
    return right / len(test)


def _unit_rows(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@partial(jax.jit, static_argnames=("num_classes", "k"))
def _knn_predict(
    train_rows: Array, train_labels: Array, test: Array, num_classes: int, k: int, temperature: float
) -> Array:
    similarities = jnp.matmul(_unit_rows(test), train_rows.T, precision=jax.lax.Precision.HIGHEST)
    similarity, neighbours = jax.lax.top_k(similarities, k)
    # Less the largest similarity: the same vote, and exp cannot overflow at a small temperature. It is
    # not taken as similarity[:, :1], since XLA would then sort whole rows instead of finding the top k.
    weights = jnp.exp((similarity - jnp.max(similarity, axis=1, keepdims=True)) / temperature)
    votes = jax.vmap(partial(jax.ops.segment_sum, num_segments=num_classes))(
        weights, train_labels[neighbours]
    )
    return jnp.argmax(votes, axis=1)


class Probe(NamedTuple):
    """Test accuracy of a linear probe, as fractions."""

    last_epoch: float  # the result
    best_on_test: float  # best of all epochs by the test set itself, which is what the official code reports


def linear_probe(
    rng: Array,
    train: Rows,
    train_labels: Rows,
    test: Rows,
    test_labels: Rows,
    *,
    num_classes: int,
    epochs: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
) -> Probe:
    """A linear classifier on frozen features: Adam, cosine over epochs (Li et al. 2023, section 4).

    Args:
      rng: order of the batches.
      train: [n, D] pooled features of the training images.
      train_labels: [n] integers.
      test: [m, D].
      test_labels: [m].
      num_classes: labels are 0..num_classes - 1.
      epochs: passes over the training features; an incomplete last batch is left out.
      batch_size: features a step.
      learning_rate: of the first epoch.
    """
    batch_size = min(batch_size, len(train))
    accuracies = np.asarray(
        _probe_accuracies(
            rng,
            jnp.asarray(train),
            jnp.asarray(train_labels),
            jnp.asarray(test),
            jnp.asarray(test_labels),
            num_classes=num_classes,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
        )
    )
    return Probe(float(accuracies[-1]), float(accuracies.max()))


@partial(jax.jit, static_argnames=("num_classes", "epochs", "batch_size", "learning_rate"))
def _probe_accuracies(
    rng: Array,
    x: Array,
    y: Array,
    x_test: Array,
    y_test: Array,
    *,
    num_classes: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> Array:
    """Test accuracy after each epoch, [epochs]."""
    steps = len(x) // batch_size
    cosine = optax.cosine_decay_schedule(learning_rate, epochs)
    optimizer = optax.adam(lambda step: cosine(step // steps))
    params = {"kernel": jnp.zeros((x.shape[1], num_classes)), "bias": jnp.zeros((1, num_classes))}

    def logits(params: dict[str, Array], x: Array) -> Array:
        return jnp.matmul(x, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"]

    def loss(params: dict[str, Array], x: Array, y: Array) -> Array:
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y))

    def step(carry: tuple, batch: Array) -> tuple[tuple, None]:
        params, opt_state = carry
        grads = jax.grad(loss)(params, x[batch], y[batch])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def epoch(carry: tuple, rng_epoch: Array) -> tuple[tuple, Array]:
        order = jax.random.permutation(rng_epoch, len(x))[: steps * batch_size]
        carry, _ = jax.lax.scan(step, carry, order.reshape(steps, batch_size))
        return carry, jnp.mean(jnp.argmax(logits(carry[0], x_test), axis=1) == y_test)

    return jax.lax.scan(epoch, (params, optimizer.init(params)), jax.random.split(rng, epochs))[1]
