"""How good the features of a run are: kNN and probes of its TrainState."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import numpy as np
from jax import Array

from mocosfl_jax import augment, probes
from mocosfl_jax.experiment import Run
from mocosfl_jax.mocosfl import Algorithm, TrainState
from mocosfl_jax.models import Features

Encode = Callable[[TrainState, np.ndarray], Features]  # images [n, H, W, 3] uint8
Evaluated = tuple[Features, Features]  # of the training and of the test images
RAW_PIXELS_LIMIT = 2**30  # bytes of float images up to which raw pixels are evaluated


def make_encode(algorithm: Algorithm, mean: Sequence[float], std: Sequence[float]) -> Encode:
    """The compiled encoder of un-augmented images."""
    return jax.jit(lambda state, images: algorithm.encode(state, augment.normalise(images, mean, std)))


def features(run: Run, state: TrainState, encode: Encode) -> Evaluated:
    """Features of the training and of the test images."""
    encode_batch = partial(encode, state)
    return (
        probes.extract(encode_batch, run.dataset.x_train),
        probes.extract(encode_batch, run.dataset.x_test),
    )


def knn(run: Run, evaluated: Evaluated) -> dict[str, float]:
    """kNN accuracies on projection and backbone features, as fields of metrics.jsonl."""
    train, test = evaluated
    return {
        "knn_projection": _knn_accuracy(run, train.projection, test.projection),
        "knn_backbone": _knn_accuracy(run, train.backbone, test.backbone),
    }


def knn_raw_pixels(run: Run) -> dict[str, float]:
    """kNN accuracy of the normalised pixels themselves; nothing where they would fill the memory."""
    dataset = run.dataset
    if 4 * sum(math.prod(x.shape) for x in (dataset.x_train, dataset.x_test)) > RAW_PIXELS_LIMIT:
        return {}
    train, test = (
        augment.normalise(x[:], dataset.mean, dataset.std).reshape(len(x), -1)
        for x in (dataset.x_train, dataset.x_test)
    )
    return {"knn_raw_pixels": _knn_accuracy(run, train, test)}


def _knn_accuracy(run: Run, train: probes.Rows, test: probes.Rows) -> float:
    return probes.knn_accuracy(
        train,
        run.dataset.y_train,
        test,
        run.dataset.y_test,
        num_classes=len(run.dataset.class_names),
        k=run.config.eval.knn_k,
        temperature=run.config.eval.knn_temperature,
    )


def linear_probe(run: Run, evaluated: Evaluated, rng: Array) -> dict[str, float]:
    """Accuracies of a linear probe on backbone features, as fields of metrics.jsonl."""
    train, test = evaluated
    probe = probes.linear_probe(
        rng,
        train.backbone,
        run.dataset.y_train,
        test.backbone,
        run.dataset.y_test,
        num_classes=len(run.dataset.class_names),
        epochs=run.config.eval.probe_epochs,
    )
    return {"linear_probe": probe.last_epoch, "linear_probe_best_on_test": probe.best_on_test}


def semi_supervised(run: Run, evaluated: Evaluated, rng: Array) -> dict[str, float]:
    """Accuracies of a small network on backbone features, from 10 % and from 1 % of the labels."""
    train, test = evaluated
    numbers = {}
    for percent in (10, 1):
        probe = probes.semi_supervised(
            rng,
            train.backbone,
            run.dataset.y_train,
            test.backbone,
            run.dataset.y_test,
            num_classes=len(run.dataset.class_names),
            fraction=percent / 100,
            epochs=run.config.eval.probe_epochs,
        )
        numbers[f"semi_supervised_{percent}_percent"] = probe.last_epoch
        numbers[f"semi_supervised_{percent}_percent_best_on_test"] = probe.best_on_test
    return numbers
