"""The accuracies that a run reports beside those of its features."""

import pathlib

import jax
import numpy as np
import pytest

from mocosfl_jax import data
from mocosfl_jax.config import Eval
from mocosfl_jax.evaluation import classifiers, monitor
from mocosfl_jax.evaluation.features import Extracted


def test_raw_pixels_are_probed_as_features_are(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 6, 6, 3)).astype(np.uint8), np.arange(60) % 3
    images[labels == 1, :3] //= 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    dataset = data.load("npz", str(tmp_path / "a.npz"), None)
    settings, key = Eval(probe_epochs=5), jax.random.key(3)
    features = rng.normal(size=(60, 4)).astype(np.float32)
    evaluated = (Extracted(features, features), Extracted(features[:20], features[:20]))
    found = monitor.linear_probe(dataset, settings, evaluated, key)

    pixels = ((images / 255 - dataset.mean) / np.array(dataset.std)).reshape(60, -1).astype(np.float32)
    expected = classifiers.linear_probe(
        key, pixels, labels, pixels[:20], labels[:20], num_classes=3, epochs=5
    )
    assert found["linear_probe_raw_pixels"] == pytest.approx(expected.last_epoch)
    assert found["linear_probe_raw_pixels_best_on_test"] == pytest.approx(expected.best_on_test)
    assert found["linear_probe_raw_pixels"] > found["linear_probe"]  # these features know nothing

    monkeypatch.setattr(monitor, "RAW_PIXELS_LIMIT", 4 * images.size)  # not enough with the test images
    assert not any("raw" in name for name in monitor.linear_probe(dataset, settings, evaluated, key))
