"""Classifiers trained on frozen features: a linear probe, and a small network on few labels."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from mocosfl_jax.algorithm import optim
from mocosfl_jax.evaluation.examples import Rows, at_least, check_examples, check_shapes, more_than_zero

HIDDEN = 512  # units of the semi-supervised classifier


class Probe(NamedTuple):
    """Test accuracy of a classifier trained on frozen features, as a fraction."""

    last_epoch: float  # the result to report
    best_on_test: float  # of the epoch that is best on the test set, as the official code reports


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
    """Train a linear classifier on frozen features, by Adam and a cosine schedule (Li et al. 2023, sec. 4).

    It starts from zeros, and minimises the cross-entropy. The features are taken as they are.

    Args:
      rng: key for the order of the batches.
      train: [n, D] floats, backbone features of the training images.
      train_labels: [n] integers.
      test: [m, D] floats, backbone features of the test images.
      test_labels: [m] integers.
      num_classes: labels are 0..num_classes - 1.
      epochs: passes over the training features; an incomplete last batch is dropped.
      batch_size: features per step; all of them if there are fewer.
      learning_rate: in the first epoch.

    Returns:
      The test accuracy of the last epoch and of the best one, from 0 to 1.

    Raises:
      UserError: If numbers of rows and labels differ, a label is out of range, a feature is not finite, or
        another argument is not positive. The message names the argument.

    Example:
      >>> features, labels = np.eye(4, dtype=np.float32), np.array([0, 0, 1, 1])
      >>> key = jax.random.key(0)
      >>> linear_probe(key, features, labels, features, labels, num_classes=2, epochs=5)
      Probe(last_epoch=1.0, best_on_test=1.0)
    """
    check_examples(train, train_labels, test, test_labels, num_classes=num_classes)
    zeros = {"kernel": jnp.zeros((train.shape[1], num_classes)), "bias": jnp.zeros(num_classes)}
    return _probe(
        rng,
        (zeros, ()),
        train,
        train_labels,
        test,
        test_labels,
        classifier=_linear,
        schedule="cosine",
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )


def semi_supervised(
    rng: Array,
    train: Rows,
    train_labels: Rows,
    test: Rows,
    test_labels: Rows,
    *,
    num_classes: int,
    fraction: float,
    epochs: int = 100,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
) -> Probe:
    """Train a small network on frozen features, with the labels of a few images (Li et al. 2023, section 4).

    The network is D -> 512 -> BatchNorm -> ReLU -> classes. It is trained by Adam; the learning rate drops to
    a tenth at 60 % and again at 80 % of the epochs.

    Args:
      rng: key for the choice of labelled images, the initialization and the order of the batches.
      train: [n, D] floats, backbone features of the training images.
      train_labels: [n] integers.
      test: [m, D] floats, backbone features of the test images.
      test_labels: [m] integers.
      num_classes: labels are 0..num_classes - 1.
      fraction: of each class's images whose labels are used, in (0, 1], see `stratified`.
      epochs: passes over the labelled features; an incomplete last batch is dropped.
      batch_size: features per step; all labelled ones if there are fewer.
      learning_rate: in the first epoch.

    Returns:
      The test accuracy of the last epoch and of the best one, from 0 to 1.

    Raises:
      UserError: As `linear_probe`, for the images whose labels are used.
    """
    check_shapes("train", train, train_labels)
    rng_labelled, rng_model, rng_order = jax.random.split(rng, 3)
    labelled = stratified(rng_labelled, train_labels, fraction)
    train, train_labels = train[labelled], np.asarray(train_labels)[labelled]
    check_examples(train, train_labels, test, test_labels, num_classes=num_classes)
    return _probe(
        rng_order,
        _init_mlp(rng_model, train.shape[1], num_classes),
        train,
        train_labels,
        test,
        test_labels,
        classifier=_mlp,
        schedule="multistep",
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )


def stratified(rng: Array, labels: Rows, fraction: float) -> np.ndarray:
    """Draw `fraction` of the images of each class: round(fraction * count), but at least one.

    Args:
      rng: key for the draw.
      labels: [n] integers.
      fraction: more than 0, at most 1.

    Returns:
      [k] integers: the indices of the images drawn, in ascending order.

    Raises:
      UserError: If the fraction is not more than 0 and at most 1.

    Example:
      >>> labels = np.array([0, 0, 0, 0, 1, 1])
      >>> labels[stratified(jax.random.key(0), labels, 0.5)]
      array([0, 0, 1])
    """
    more_than_zero("fraction", fraction, most=1)
    labels = np.asarray(labels)
    order = np.asarray(jax.random.permutation(rng, len(labels)))
    drawn = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        drawn.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(drawn))


# params, running statistics, features [b, D], training -> logits [b, classes], statistics
Classifier = Callable[[Any, Any, Array, bool], tuple[Array, Any]]


def _linear(params: dict[str, Array], stats: tuple[()], x: Array, training: bool) -> tuple[Array, tuple[()]]:
    return _affine(params, x), stats


def _affine(params: dict[str, Array], x: Array) -> Array:
    return jnp.matmul(x, params["kernel"], precision=jax.lax.Precision.HIGHEST) + params["bias"][None]


class BatchStats(NamedTuple):
    """Running statistics of BatchNorm: exponential means over the batches."""

    mean: Array  # [units]
    var: Array  # [units], unbiased


def _init_mlp(rng: Array, width: int, num_classes: int) -> tuple[dict[str, Any], BatchStats]:
    """Return parameters and BatchNorm statistics, initialized as in PyTorch."""

    def affine(rng: Array, fan_in: int, fan_out: int) -> dict[str, Array]:
        rng_kernel, rng_bias = jax.random.split(rng)
        bound = fan_in**-0.5
        return {
            "kernel": jax.random.uniform(rng_kernel, (fan_in, fan_out), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(rng_bias, (fan_out,), minval=-bound, maxval=bound),
        }

    rng_hidden, rng_output = jax.random.split(rng)
    params = {
        "hidden": affine(rng_hidden, width, HIDDEN),
        "norm": {"scale": jnp.ones(HIDDEN), "bias": jnp.zeros(HIDDEN)},
        "output": affine(rng_output, HIDDEN, num_classes),
    }
    return params, BatchStats(jnp.zeros(HIDDEN), jnp.ones(HIDDEN))


def _mlp(params: dict[str, Any], stats: BatchStats, x: Array, training: bool) -> tuple[Array, BatchStats]:
    hidden, stats = _batch_norm(params["norm"], stats, _affine(params["hidden"], x), training)
    return _affine(params["output"], jax.nn.relu(hidden)), stats


def _batch_norm(
    params: dict[str, Array], stats: BatchStats, x: Array, training: bool
) -> tuple[Array, BatchStats]:
    """BatchNorm as in PyTorch: momentum 0.1, batch variance biased, variance in the statistics unbiased.

    Args:
      params: scale and bias, [units] each.
      stats: running statistics.
      x: [b, units].
      training: normalise by this batch and update the statistics, instead of normalising by the statistics.

    Returns:
      [b, units] and the statistics.
    """
    mean, var = stats
    if training:
        mean, var = jnp.mean(x, axis=0), jnp.var(x, axis=0)
        unbiased = var * len(x) / max(len(x) - 1, 1)
        stats = BatchStats(0.9 * stats.mean + 0.1 * mean, 0.9 * stats.var + 0.1 * unbiased)
    unit = (x - mean[None]) / jnp.sqrt(var[None] + 1e-5)
    return params["scale"][None] * unit + params["bias"][None], stats


def _probe(
    rng: Array,
    model: tuple[Any, Any],
    train: Rows,
    train_labels: Rows,
    test: Rows,
    test_labels: Rows,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    **static: Any,
) -> Probe:
    """Train a classifier from the given parameters and statistics."""
    at_least("epochs", epochs, 1)
    at_least("batch_size", batch_size, 1)
    more_than_zero("learning_rate", learning_rate)
    arrays = map(jnp.asarray, (train, train_labels, test, test_labels))
    accuracies = np.asarray(
        _test_accuracies(
            rng,
            model,
            *arrays,
            epochs=epochs,
            batch_size=min(batch_size, len(train)),
            learning_rate=learning_rate,
            **static,
        )
    )
    return Probe(float(accuracies[-1]), float(accuracies.max()))


@partial(jax.jit, static_argnames=("classifier", "schedule", "epochs", "batch_size", "learning_rate"))
def _test_accuracies(
    rng: Array,
    model: tuple[Any, Any],
    x: Array,
    y: Array,
    x_test: Array,
    y_test: Array,
    *,
    classifier: Classifier,
    schedule: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> Array:
    """Return the test accuracy after each epoch, [epochs]."""
    params, stats = model
    steps = len(x) // batch_size
    optimizer = optax.adam(optim.schedule(schedule, learning_rate, epochs=epochs, steps_per_epoch=steps))

    def loss(params: Any, stats: Any, x: Array, y: Array) -> tuple[Array, Any]:
        logits, stats = classifier(params, stats, x, True)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y)), stats

    def step(carry: tuple, batch: Array) -> tuple[tuple, None]:
        params, stats, opt_state = carry
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, x[batch], y[batch])
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), None

    def epoch(carry: tuple, rng_epoch: Array) -> tuple[tuple, Array]:
        order = jax.random.permutation(rng_epoch, len(x))[: steps * batch_size]
        carry, _ = jax.lax.scan(step, carry, order.reshape(steps, batch_size))
        params, stats, _ = carry
        logits, _ = classifier(params, stats, x_test, False)
        return carry, jnp.mean(jnp.argmax(logits, axis=1) == y_test)

    return jax.lax.scan(epoch, (params, stats, optimizer.init(params)), jax.random.split(rng, epochs))[1]
