"""kNN and batch norm against loops, and the probes on features of known quality."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import Features
from mocosfl_jax.errors import UserError
from mocosfl_jax.evaluation import classifiers, knn
from mocosfl_jax.evaluation.features import Encode, extract, extract_batches


def plain_knn(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int, t: float
) -> list[int]:
    predicted = []
    unit = train / np.linalg.norm(train, axis=1, keepdims=True)
    for row in test / np.linalg.norm(test, axis=1, keepdims=True):
        similarity = unit @ row
        votes = np.zeros(classes)
        for i in np.argsort(-similarity)[:k]:
            votes[labels[i]] += np.exp(similarity[i] / t)
        predicted.append(int(votes.argmax()))
    return predicted


@pytest.mark.parametrize("k", [1, 7, 200])
@pytest.mark.parametrize("block_bytes", [4 * 60 * 7, 2**28])
def test_knn_equals_a_loop_for_any_block_size(
    monkeypatch: pytest.MonkeyPatch, k: int, block_bytes: int
) -> None:
    monkeypatch.setattr(knn, "BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 25)
    centres = rng.normal(size=(4, 6))
    train = (centres[labels] + rng.normal(size=(60, 6))).astype(np.float32)
    test = (centres[truth] + rng.normal(size=(25, 6))).astype(np.float32)
    expected = np.mean(np.array(plain_knn(train, labels, test, 4, k, 0.1)) == truth)
    got = knn.knn_accuracy(train, labels, test, truth, num_classes=4, k=k, temperature=0.1)
    assert got == pytest.approx(expected)
    assert 0 < got < 1


def test_extract_keeps_order_and_drops_padding() -> None:
    images = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
    shapes = set()

    @jax.jit
    def encode(state: Any, batch: jax.Array) -> Features:
        shapes.add(batch.shape)  # runs once per trace
        flat = batch.reshape(len(batch), -1).astype(jnp.float32)
        return Features(flat, state * flat)

    def head(state: Any, backbone: np.ndarray) -> jax.Array:
        return jnp.asarray(backbone) / (state * backbone.sum())

    flat = images.reshape(7, 4)
    for seven in (
        extract(Encode(encode, None), 2, images, batch_size=3),  # type: ignore[arg-type]
        extract_batches(Encode(encode, None), 2, np.split(images, [1, 4]), batch_size=3),  # type: ignore[arg-type]
    ):
        assert all(isinstance(x, np.ndarray) for x in seven)  # on no device until somebody needs them
        np.testing.assert_array_equal(seven.backbone, flat)
        np.testing.assert_array_equal(seven.projection, 2 * flat)
    mixed = extract(Encode(encode, head), 2, images, batch_size=3)  # type: ignore[arg-type]
    np.testing.assert_allclose(mixed.projection, flat / (2 * flat.sum()), rtol=1e-6)
    assert shapes == {(3, 2, 2, 1)}


def test_linear_probe_learns_only_separable_classes() -> None:
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 3, 600), rng.integers(0, 3, 300)
    centres = 4 * np.eye(3, 5)

    def probe(scale: float) -> classifiers.Probe:
        train = (scale * centres[labels] + rng.normal(size=(600, 5))).astype(np.float32)
        test = (scale * centres[truth] + rng.normal(size=(300, 5))).astype(np.float32)
        return classifiers.linear_probe(
            jax.random.key(0), train, labels, test, truth, num_classes=3, epochs=100, batch_size=100
        )

    informative, noise = probe(1.0), probe(0.0)
    assert informative.last_epoch > 0.95
    assert 0.2 < noise.last_epoch < 0.5
    assert noise.last_epoch <= noise.best_on_test


def test_stratified_counts_of_each_class() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [200, 26, 8, 1]))

    def draw(seed: int, fraction: float) -> np.ndarray:
        return classifiers.stratified(jax.random.key(seed), labels, fraction)

    indices = draw(0, 0.1)
    assert np.bincount(labels[indices]).tolist() == [20, 3, 1, 1]  # 20, 2.6, 0.8 and 0.1 images
    assert (np.diff(indices) > 0).all()
    np.testing.assert_array_equal(draw(0, 0.1), indices)
    assert draw(1, 0.1).tolist() != indices.tolist()
    np.testing.assert_array_equal(draw(0, 1.0), np.arange(len(labels)))


def test_stratified_draws_every_image_of_a_class_equally_often() -> None:
    labels = np.repeat([0, 1], [4, 8])
    draws = [classifiers.stratified(jax.random.key(seed), labels, 0.5) for seed in range(400)]
    shares = np.bincount(np.concatenate(draws), minlength=12) / 400
    np.testing.assert_allclose(shares, 0.5, atol=4 * 0.5 / np.sqrt(400))  # four standard errors


def test_batch_norm_equals_numpy_over_a_few_batches() -> None:
    """PyTorch's definition: the batch's biased variance, the running unbiased variance, momentum 0.1."""
    rng = np.random.default_rng(0)
    scale, bias = rng.normal(size=(2, 5))
    params = {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
    stats = classifiers.BatchStats(jnp.zeros(5), jnp.ones(5))
    running_mean, running_var = np.zeros(5), np.ones(5)
    for batch in rng.normal(2, 3, size=(3, 7, 5)):
        got, stats = classifiers._batch_norm(params, stats, jnp.asarray(batch, jnp.float32), True)
        expected = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-5) * scale + bias
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        running_mean = 0.9 * running_mean + 0.1 * batch.mean(0)
        running_var = 0.9 * running_var + 0.1 * batch.var(0, ddof=1)
        np.testing.assert_allclose(stats.mean, running_mean, rtol=1e-5)
        np.testing.assert_allclose(stats.var, running_var, rtol=1e-5)
    got, after = classifiers._batch_norm(params, stats, jnp.asarray(batch, jnp.float32), False)
    expected = (batch - running_mean) / np.sqrt(running_var + 1e-5) * scale + bias
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert after is stats


@pytest.mark.parametrize("fraction", [0.1, 0.01])
def test_semi_supervised_learns_from_few_labels(fraction: float) -> None:
    """Classes are far apart but not linearly separable: each lies on both sides of the origin."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.integers(0, 3, count)
        centres = 4 * np.eye(3, 5)[labels] * rng.choice([-1, 1], (count, 1))
        return (centres + 0.3 * rng.normal(size=(count, 5))).astype(np.float32), labels

    (train, labels), (test, truth) = draw(3000), draw(200)

    def probe(labels: np.ndarray) -> classifiers.Probe:
        return classifiers.semi_supervised(
            jax.random.key(0), train, labels, test, truth, num_classes=3, fraction=fraction, batch_size=60
        )

    informative, noise = probe(labels), probe(rng.integers(0, 3, 3000))
    assert informative.last_epoch > 0.97
    assert 0.1 < noise.last_epoch < 0.6
    assert noise.last_epoch <= noise.best_on_test
    linear = classifiers.linear_probe(jax.random.key(0), train, labels, test, truth, num_classes=3, epochs=5)
    assert linear.last_epoch < 0.6


def test_semi_supervised_uses_the_drawn_labels_only() -> None:
    """Labels that were not drawn may have any value."""
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(2, 40, 4)).astype(np.float32)
    labels, truth = np.arange(40) % 2, np.arange(40) % 2

    def probe(train: np.ndarray) -> classifiers.Probe:
        return classifiers.semi_supervised(
            jax.random.key(3), train, labels, test, truth, num_classes=2, fraction=0.25, epochs=3
        )

    drawn = classifiers.stratified(jax.random.split(jax.random.key(3), 3)[0], labels, 0.25)
    others = np.setdiff1d(np.arange(40), drawn)
    changed = train.copy()
    changed[others] = np.nan
    assert len(drawn) == 10
    assert probe(changed) == probe(train)
    changed[drawn] *= -1
    assert probe(changed) != probe(train)


def test_knn_of_50_000_by_10_000_fits_in_2_gb() -> None:
    """According to the compiler's count of arguments and temporaries, for features as wide as ResNet-50's."""
    rows = knn.BLOCK_BYTES // (4 * 50_000)
    compiled = knn.predict.lower(
        jax.ShapeDtypeStruct((50_000, 2048), jnp.float32),
        jax.ShapeDtypeStruct((50_000,), jnp.int32),
        jax.ShapeDtypeStruct((rows, 2048), jnp.float32),
        10,
        200,
        0.1,
    ).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 2 * 10**9


def test_labels_may_be_lists() -> None:
    features, labels = np.eye(6, dtype=np.float32), np.arange(6) % 2

    def accuracies(labels: Any) -> list[Any]:
        given = features, labels, features, labels
        return [
            knn.knn_accuracy(*given, num_classes=2, k=1),
            classifiers.linear_probe(jax.random.key(0), *given, num_classes=2, epochs=2),
            classifiers.semi_supervised(jax.random.key(0), *given, num_classes=2, fraction=0.5, epochs=2),
        ]

    assert accuracies(labels.tolist()) == accuracies(labels)


ROWS, LABELS = np.eye(4, 3, dtype=np.float32), np.array([0, 1, 2, 0])
NAN = np.full((4, 3), np.nan, np.float32)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"train_labels": LABELS[:3]},
            r"^train_labels: found an array of shape \(3,\), allowed: \(4,\), a la",
        ),
        (
            {"test_labels": LABELS[:, None]},
            r"^test_labels: found an array of shape \(4, 1\), allowed: \(4,\)",
        ),
        ({"test": ROWS[:, :2]}, r"^test: found 2 features a row, allowed: 3 as in train"),
        ({"train": ROWS[0]}, r"^train: found an array of shape \(3,\), allowed: \[n, D\]"),
        ({"test": ROWS[:0], "test_labels": LABELS[:0]}, r"^test: found an array of shape \(0, 3\), allowed:"),
        ({"train_labels": LABELS + 1}, "^train_labels: found 1 to 3, allowed: 0 to 2"),
        ({"test_labels": LABELS - 1}, "^test_labels: found -1 to 1, allowed: 0 to 2"),
        ({"train_labels": LABELS / 2}, "^train_labels: found float64, allowed: integers"),
        ({"num_classes": 2}, "^train_labels: found 0 to 2, allowed: 0 to 1"),
        ({"num_classes": 0}, "^num_classes: found 0, allowed: an integer of 1 or more"),
        ({"train": NAN}, "^train: found features that are not finite, allowed: finite ones"),
        ({"test": jnp.asarray(ROWS).at[3, 2].set(-jnp.inf)}, "^test: found features that are not finite"),
    ],
)
def test_rows_and_labels_that_do_not_match_are_refused(change: dict[str, Any], message: str) -> None:
    sets: dict[str, Any] = {"train": ROWS, "train_labels": LABELS, "test": ROWS, "test_labels": LABELS}
    given = sets | {"num_classes": 3} | change
    with pytest.raises(UserError, match=message):
        knn.knn_accuracy(**given)
    with pytest.raises(UserError, match=message):
        classifiers.linear_probe(jax.random.key(0), **given)
    with pytest.raises(UserError, match=message):
        classifiers.semi_supervised(jax.random.key(0), fraction=1.0, **given)


@pytest.mark.parametrize(
    "function, change, message",
    [
        (knn.knn_accuracy, {"k": 0}, "^k: found 0, allowed: an integer of 1 or more"),
        (knn.knn_accuracy, {"k": 2.5}, "^k: found 2.5, allowed: an integer of 1 or more"),
        (knn.knn_accuracy, {"temperature": -1}, "^temperature: found -1, allowed: more than 0"),
        (knn.knn_accuracy, {"temperature": float("nan")}, "^temperature: found nan, allowed: more than 0"),
        (classifiers.linear_probe, {"epochs": 0}, "^epochs: found 0, allowed: an integer of 1 or more"),
        (
            classifiers.linear_probe,
            {"batch_size": 0},
            "^batch_size: found 0, allowed: an integer of 1 or more",
        ),
        (classifiers.linear_probe, {"learning_rate": 0.0}, "^learning_rate: found 0.0, allowed: more than 0"),
        (
            classifiers.semi_supervised,
            {"fraction": 1.5},
            "^fraction: found 1.5, allowed: more than 0, at most 1",
        ),
    ],
)
def test_impossible_settings_of_classifiers_are_refused(
    function: Any, change: dict[str, Any], message: str
) -> None:
    rng = () if function is knn.knn_accuracy else (jax.random.key(0),)
    with pytest.raises(UserError, match=message):
        function(*rng, ROWS, LABELS, ROWS, LABELS, num_classes=3, **change)
