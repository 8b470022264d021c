"""Noise on smashed data, against numpy and against a step that is put together by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from mocosfl_jax import SplitModel
from mocosfl_jax.algorithm import optim
from mocosfl_jax.algorithm.noise import Noise, clipped, disturb
from mocosfl_jax.errors import UserError
from tests.support.algorithms import LR, B, Build, N, assert_trees_close
from tests.support.toy import random_views


def bounded(smashed: np.ndarray, clip: float) -> np.ndarray:
    """Image by image."""
    rows = smashed.reshape(-1, *smashed.shape[-3:]).copy()
    for row in rows:
        rms = np.sqrt(np.mean(row**2))
        if rms > clip:
            row *= clip / rms
    return rows.reshape(smashed.shape)


def smashed_data() -> np.ndarray:
    """Of six images: some within a bound of 1, some beyond it, one of zeros."""
    scales = np.array([0.0, 0.2, 0.9, 1.1, 5.0, 300.0]).reshape(3, 2, 1, 1, 1)
    return (scales * np.random.default_rng(0).normal(size=(3, 2, 4, 4, 5))).astype(np.float32)


@pytest.mark.parametrize("clip", [1.0, 0.3, 100.0])
def test_smashed_data_are_scaled_down_to_the_bound(clip: float) -> None:
    smashed = smashed_data()
    np.testing.assert_allclose(clipped(jnp.asarray(smashed), clip), bounded(smashed, clip), rtol=1e-5)


def test_the_noise_has_the_stated_deviation_and_no_two_draws_are_alike() -> None:
    noise = Noise(jax.random.key(0), std=0.5, clip=2.0)
    zeros = jnp.zeros((50, 4, 4, 8))
    draws = [np.asarray(disturb(zeros, noise, *numbers)) for numbers in ((0, 0), (0, 1), (1, 0))]
    for number, draw in enumerate(draws):
        assert draw.mean() == pytest.approx(0, abs=0.05) and draw.std() == pytest.approx(1.0, abs=0.02)
        for other in draws[:number]:
            assert abs(np.corrcoef(draw.ravel(), other.ravel())[0, 1]) < 0.05
    np.testing.assert_array_equal(draws[1], disturb(zeros, noise, 0, 1))


def test_the_noise_is_gaussian_in_bfloat16_too() -> None:
    """Draws in bfloat16 would end at 2.9 standard deviations."""
    noise = Noise(jax.random.key(0), std=1.0)
    draw = np.asarray(disturb(jnp.zeros((100, 4, 4, 64), jnp.bfloat16), noise), np.float32)
    assert np.abs(draw).max() > 3.5 and len(np.unique(draw)) > 1000
    beyond = np.mean(np.abs(draw) > 2)
    assert beyond == pytest.approx(0.0455, abs=0.004)


def test_gradients_are_those_of_finite_differences(x64: None) -> None:
    smashed = jnp.asarray(smashed_data(), float)[:, :, :2, :2]
    weights = jnp.asarray(np.random.default_rng(1).normal(size=smashed.shape))

    def loss(x: Array) -> Array:
        return jnp.sum(weights * clipped(x, 1.0))

    grad = np.asarray(jax.grad(loss)(smashed))
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(grad[0, 0], weights[0, 0])  # zeros are within the bound
    direction = jnp.asarray(np.random.default_rng(2).normal(size=smashed.shape))
    step = 1e-6
    along = (loss(smashed + step * direction) - loss(smashed - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(grad, direction), along, rtol=1e-6)


def test_a_step_is_one_on_disturbed_smashed_data(build: Build, toy_model: SplitModel) -> None:
    """The server sees the noise, and each client's gradient passes through the bound."""
    noise = Noise(jax.random.key(3), std=0.2, clip=0.3)
    algorithm, state = build(toy_model, noise=noise, client_optimizer=optim.sgd(LR, 0.0, 0.0))
    state = state._replace(step=jnp.asarray(5, jnp.int32))
    views = random_views(1, N, B)
    new, info = algorithm.step(state, views)

    plain, _ = build(toy_model)
    _, without = plain.step(state, views)
    assert info.smashed is not None and without.smashed is not None
    shape = (N, B, *without.smashed.query.shape[1:])
    for kind, (found, clean) in enumerate(zip(info.smashed, without.smashed, strict=True)):
        rng = jax.random.fold_in(jax.random.fold_in(noise.rng, 5), kind)
        drawn = 0.2 * 0.3 * np.asarray(jax.random.normal(rng, shape))
        expected = bounded(np.asarray(clean).reshape(shape), 0.3) + drawn
        np.testing.assert_allclose(np.asarray(found).reshape(shape), expected, rtol=1e-5, atol=1e-6)

    assert plain.replay is not None  # the server's half, on these smashed data
    served, by_server = plain.replay.train(state, info.smashed)
    np.testing.assert_allclose(info.loss, by_server.loss, rtol=1e-6)
    assert_trees_close(new.server, served.server, rtol=1e-5, atol=1e-7)
    assert by_server.smashed_grad is not None

    def sent(params: Array) -> Array:
        return clipped(jax.vmap(toy_model.client)(params, views.query), 0.3)

    _, pullback = jax.vjp(sent, state.clients.params)
    (grads,) = pullback(by_server.smashed_grad.reshape(shape))
    moved = jax.tree.map(lambda param, grad: param - LR * grad, state.clients.params, grads)
    assert_trees_close(new.clients.params, moved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "noise, message",
    [
        ({"std": -0.1}, "noise.std: found -0.1, allowed: 0 or more"),
        ({"std": float("nan")}, "noise.std: found nan"),
        ({"std": 1.0, "clip": 0.0}, "noise.clip: found 0.0, allowed: more than 0"),
    ],
)
def test_impossible_noise_is_refused(
    noise: dict[str, float], message: str, build: Build, toy_model: SplitModel
) -> None:
    with pytest.raises(UserError, match=message):
        build(toy_model, noise=Noise(jax.random.key(0), **noise))
