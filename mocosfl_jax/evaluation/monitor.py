"""The accuracies that a run reports: kNN and probes on the features of its data set."""

import math

import jax
import numpy as np
from jax import Array

from mocosfl_jax.config import Eval
from mocosfl_jax.data import Dataset
from mocosfl_jax.evaluation import classifiers, collapse
from mocosfl_jax.evaluation.examples import Rows
from mocosfl_jax.evaluation.features import BATCH, Encode, Extracted, State, extract
from mocosfl_jax.evaluation.knn import knn_accuracy
from mocosfl_jax.feed import augment

Evaluated = tuple[Extracted, Extracted]  # of the training and of the test images
RAW_PIXELS_LIMIT = 2**30  # bytes of float images; above it, raw pixels are not evaluated


def features(dataset: Dataset, state: State, encode: Encode) -> Evaluated:
    """Compute the features of the training and of the test images."""
    return extract(encode, state, dataset.x_train), extract(encode, state, dataset.x_test)


def collapsed(images: np.ndarray, state: State, encode: Encode) -> dict[str, float]:
    """Return the spread of the projections of `images`, and 1 or 0 for whether they have collapsed.

    Both are fields of metrics.jsonl. Nothing can be said of a single image.
    """
    if len(images) < 2:
        return {}
    spread = collapse.spread(extract(encode, state, images).projection)
    return {"spread": spread, "collapsed": int(spread < collapse.COLLAPSED)}


def few(dataset: Dataset) -> np.ndarray:
    """Return one batch of test images, evenly spaced, for `collapsed`: [at most BATCH, H, W, 3] uint8."""
    count = len(dataset.x_test)
    return dataset.x_test[np.linspace(0, count - 1, min(BATCH, count)).astype(int)]


def knn(dataset: Dataset, settings: Eval, evaluated: Evaluated) -> dict[str, float]:
    """Return kNN accuracies on projection and backbone features, as fields of metrics.jsonl."""
    train, test = evaluated
    return {
        "knn_projection": _knn_accuracy(dataset, settings, train.projection, test.projection),
        "knn_backbone": _knn_accuracy(dataset, settings, train.backbone, test.backbone),
    }


def knn_raw_pixels(dataset: Dataset, settings: Eval) -> dict[str, float]:
    """Return the kNN accuracy on normalised pixels, or nothing if they would take too much memory."""
    pixels = _raw_pixels(dataset)
    return {"knn_raw_pixels": _knn_accuracy(dataset, settings, *pixels)} if pixels else {}


def _raw_pixels(dataset: Dataset) -> tuple[Rows, Rows] | None:
    """Normalised pixels of the training and of the test images, if they take little memory."""
    if 4 * sum(math.prod(x.shape) for x in (dataset.x_train, dataset.x_test)) > RAW_PIXELS_LIMIT:
        return None
    train, test = (
        augment.normalise(x[:], dataset.mean, dataset.std).reshape(len(x), -1)
        for x in (dataset.x_train, dataset.x_test)
    )
    return train, test


def _knn_accuracy(dataset: Dataset, settings: Eval, train: Rows, test: Rows) -> float:
    return knn_accuracy(
        train,
        dataset.y_train,
        test,
        dataset.y_test,
        num_classes=len(dataset.class_names),
        k=settings.knn_k,
        temperature=settings.knn_temperature,
    )


def linear_probe(dataset: Dataset, settings: Eval, evaluated: Evaluated, rng: Array) -> dict[str, float]:
    """Return the accuracies of a linear probe on backbone features, as fields of metrics.jsonl.

    And that of logistic regression on normalised pixels, trained in the same way, unless they would take too
    much memory.
    """
    train, test = evaluated
    probe = _linear_probe(rng, dataset, settings, train.backbone, test.backbone)
    numbers = {"linear_probe": probe.last_epoch, "linear_probe_best_on_test": probe.best_on_test}
    pixels = _raw_pixels(dataset)
    if pixels:
        of_pixels = _linear_probe(rng, dataset, settings, *pixels)
        numbers |= {
            "linear_probe_raw_pixels": of_pixels.last_epoch,
            "linear_probe_raw_pixels_best_on_test": of_pixels.best_on_test,
        }
    return numbers


def _linear_probe(rng: Array, dataset: Dataset, settings: Eval, train: Rows, test: Rows) -> classifiers.Probe:
    return classifiers.linear_probe(
        rng,
        train,
        dataset.y_train,
        test,
        dataset.y_test,
        num_classes=len(dataset.class_names),
        epochs=settings.probe_epochs,
    )


def semi_supervised(dataset: Dataset, settings: Eval, evaluated: Evaluated, rng: Array) -> dict[str, float]:
    """Return the accuracies of a small network on backbone features, from 10 % and from 1 % of the labels.

    Their draws are independent: the percentage is folded into `rng`.
    """
    train, test = evaluated
    numbers = {}
    for percent in (10, 1):
        probe = classifiers.semi_supervised(
            jax.random.fold_in(rng, percent),
            train.backbone,
            dataset.y_train,
            test.backbone,
            dataset.y_test,
            num_classes=len(dataset.class_names),
            fraction=percent / 100,
            epochs=settings.probe_epochs,
        )
        numbers[f"semi_supervised_{percent}_percent"] = probe.last_epoch
        numbers[f"semi_supervised_{percent}_percent_best_on_test"] = probe.best_on_test
    return numbers
