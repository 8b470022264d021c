"""kNN against a loop, the probe on features of known quality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax import Features, probes


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
def test_knn_equals_a_loop_whatever_the_block(
    monkeypatch: pytest.MonkeyPatch, k: int, block_bytes: int
) -> None:
    monkeypatch.setattr(probes, "KNN_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 25)
    centres = rng.normal(size=(4, 6))
    train = (centres[labels] + rng.normal(size=(60, 6))).astype(np.float32)
    test = (centres[truth] + rng.normal(size=(25, 6))).astype(np.float32)
    expected = np.mean(np.array(plain_knn(train, labels, test, 4, k, 0.1)) == truth)
    got = probes.knn_accuracy(train, labels, test, truth, num_classes=4, k=k, temperature=0.1)
    assert got == pytest.approx(expected)
    assert 0 < got < 1


def test_extract_keeps_order_and_drops_padding() -> None:
    images = np.arange(7 * 4, dtype=np.uint8).reshape(7, 2, 2, 1)
    shapes = set()

    @jax.jit
    def encode(batch: jax.Array) -> Features:
        shapes.add(batch.shape)  # once a trace
        flat = batch.reshape(len(batch), -1).astype(jnp.float32)
        return Features(flat, 2 * flat)

    features = probes.extract(encode, images, batch_size=3)
    np.testing.assert_array_equal(features.backbone, images.reshape(7, 4))
    np.testing.assert_array_equal(features.projection, 2 * features.backbone)
    assert shapes == {(3, 2, 2, 1)}


def test_linear_probe_separates_what_is_separable_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    labels, truth = rng.integers(0, 3, 600), rng.integers(0, 3, 300)
    centres = 4 * np.eye(3, 5)

    def probe(scale: float) -> probes.Probe:
        train = (scale * centres[labels] + rng.normal(size=(600, 5))).astype(np.float32)
        test = (scale * centres[truth] + rng.normal(size=(300, 5))).astype(np.float32)
        return probes.linear_probe(
            jax.random.key(0), train, labels, test, truth, num_classes=3, epochs=100, batch_size=100
        )

    informative, noise = probe(1.0), probe(0.0)
    assert informative.last_epoch > 0.95
    assert 0.2 < noise.last_epoch < 0.5
    assert noise.last_epoch <= noise.best_on_test


def test_knn_of_50_000_by_10_000_fits_in_2_gb() -> None:
    """By the compiler's own account of arguments and temporaries, for features of ResNet-50's width."""
    rows = probes.KNN_BLOCK_BYTES // (4 * 50_000)
    compiled = probes._knn_predict.lower(
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
