"""The queue, the loss and the momentum update against a deque, NumPy and explicit formulas."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mocosfl_jax.algorithm import moco


@pytest.mark.parametrize("size, keys", [(7, 3), (6, 3), (5, 5), (9, 4)])
def test_queue_equals_deque(size: int, keys: int) -> None:
    queue = moco.init_queue(jax.random.key(0), size, 2)
    deque = collections.deque(np.asarray(queue.keys), maxlen=size)
    for step in range(11):
        new = jax.random.normal(jax.random.key(step), (keys, 2))
        queue = jax.jit(moco.enqueue)(queue, new)
        deque.extend(np.asarray(new))
        oldest_first = np.roll(queue.keys, -int(queue.cursor), axis=0)
        np.testing.assert_array_equal(oldest_first, np.stack(deque))


def test_queue_starts_with_unit_rows() -> None:
    queue = moco.init_queue(jax.random.key(3), 50, 16)
    np.testing.assert_allclose(np.linalg.norm(queue.keys, axis=1), 1, rtol=1e-6)
    assert queue.cursor == 0


def test_info_nce_equals_numpy(x64: None) -> None:
    rng = np.random.default_rng(0)
    query, key, keys = (moco.normalise(jnp.asarray(rng.normal(size=(n, 4)))) for n in (6, 6, 20))
    loss, top1 = moco.info_nce(query, key, moco.similarities(moco.MoCoQueue(keys, jnp.int32(0)), query), 0.1)
    losses: list[float] = []
    hits: list[bool] = []
    for q, k in zip(np.asarray(query), np.asarray(key), strict=True):
        logits = np.array([q @ k, *(q @ other for other in np.asarray(keys))]) / 0.1
        losses.append(float(np.log(np.exp(logits).sum()) - logits[0]))
        hits.append(bool(logits.argmax() == 0))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-12)
    assert float(top1) == sum(hits) / len(hits)


def test_perfect_match_has_full_accuracy_and_small_loss() -> None:
    rows = jnp.eye(8)
    loss, top1 = moco.info_nce(rows[:4], rows[:4], rows[:4] @ rows[4:].T, 0.1)
    assert top1 == 1
    np.testing.assert_allclose(loss, np.log(1 + 4 * np.exp(-10)), rtol=1e-2)


def test_normalise_has_a_finite_gradient_at_zero() -> None:
    x = jnp.zeros((2, 3)).at[1].set(jnp.array([3.0, 0, 4]))
    np.testing.assert_allclose(moco.normalise(x), np.array([[0, 0, 0], [0.6, 0, 0.8]]), rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: moco.normalise(x).sum())(x)).all()


def test_momentum_update_is_the_weighted_mean() -> None:
    old, new = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, -2.0])}
    np.testing.assert_allclose(moco.momentum_update(old, new, 0.99)["a"], [1.02, 1.96], rtol=1e-6)
