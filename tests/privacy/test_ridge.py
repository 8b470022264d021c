"""The linear attacker, against NumPy's least squares."""

import jax
import numpy as np
import pytest

from mocosfl_jax.errors import UserError
from mocosfl_jax.privacy.ridge import ridge


def pairs(count: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Images of 3x3 pixels and smashed data that depend on them linearly, 2 attackers."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, count, 3, 3, 3)).astype(np.uint8)
    mixing = rng.normal(size=(27, 40))
    smashed = (images.reshape(2, count, 27) / 255) @ mixing + 3 + noise * rng.normal(size=(2, count, 40))
    return smashed.reshape(2, count, 2, 4, 5).astype(np.float32), images


@pytest.mark.parametrize("count", [30, 200])  # fewer, and more, than the 40 numbers of smashed data
def test_one_penalty_gives_the_solution_of_the_augmented_least_squares(count: int) -> None:
    """Ridge regression is least squares with rows of zeros added: sqrt(penalty) I on the left."""
    smashed, images = pairs(count, noise=0.5)
    victims = smashed[:, :7] + 0.1
    rngs = jax.random.split(jax.random.key(1), 2)
    relative = 0.3
    found = ridge(rngs, smashed, images, victims, penalties=(relative,))
    assert found.shape == (2, 7, 3, 3, 3)
    for attacker in range(2):
        order = np.asarray(jax.random.permutation(rngs[attacker], count))[round(0.1 * count) :]
        x = smashed[attacker].reshape(count, 40)[order].astype(np.float64)
        y = images[attacker].reshape(count, 27)[order] / 255
        z = victims[attacker].reshape(7, 40).astype(np.float64)
        centred = (x - x.mean(0)) / x.std(0)
        squares = np.linalg.svd(centred, compute_uv=False) ** 2
        dimensions = 40 if len(x) >= 40 else len(x)
        penalty = relative * squares.sum() / dimensions
        augmented = np.vstack([centred, np.sqrt(penalty) * np.eye(40)])
        solution = np.linalg.lstsq(augmented, np.vstack([y - y.mean(0), np.zeros((40, 27))]), rcond=None)[0]
        expected = np.clip((z - x.mean(0)) / x.std(0) @ solution + y.mean(0), 0, 1)
        np.testing.assert_allclose(found[attacker].reshape(7, 27), expected, atol=2e-4)


def test_the_penalty_is_chosen_by_held_out_images() -> None:
    """Without noise a small penalty reconstructs; a bad one in the choice changes nothing."""
    smashed, images = pairs(200)
    victims, truth = smashed[:, :5], images[:, :5] / 255
    rngs = jax.random.split(jax.random.key(0), 2)
    good = ridge(rngs, smashed, images, victims, penalties=(1e-5,))
    both = ridge(rngs, smashed, images, victims, penalties=(100.0, 1e-5, 1000.0))
    np.testing.assert_array_equal(both, good)
    np.testing.assert_allclose(good, truth, atol=5e-3)


def test_a_system_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mocosfl_jax.privacy.ridge._DIMENSIONS", 20)
    smashed, images = pairs(30)
    with pytest.raises(UserError, match=r"found 30 with 40 numbers of smashed data each, allowed: 20 images"):
        ridge(jax.random.split(jax.random.key(0), 2), smashed, images, smashed)
